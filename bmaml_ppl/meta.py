"""The outer loop: meta-learns the shared prior by gradients through, or at, task posteriors."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bmaml_ppl.adaptation import Adapter, TaskData, as_task_data, check_inference, one_task, resolve_start
from bmaml_ppl.allocator import freed_memory_kept
from bmaml_ppl.checkpoints import Checkpoints
from bmaml_ppl.checks import check_count
from bmaml_ppl.compile import Compile, choose_mode
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.distributed import join_world
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import ALGORITHMS, svgd
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.loop import Loop, MetaStep, Optimizer, Schedule, needs_masks
from bmaml_ppl.memory import Memory, full
from bmaml_ppl.memory_estimate import MemoryEstimate, MemoryProbe
from bmaml_ppl.numerics import Precision, check_precision, dtype_of, reduce_matmuls, tensor_cores
from bmaml_ppl.objectives import Objective, chaser, evidence, marginal_nll, query_nll
from bmaml_ppl.observations import check_observations
from bmaml_ppl.outer import episode_views, unconstrain
from bmaml_ppl.run_settings import describe_run
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.template import Template
from bmaml_ppl.types import Inference, Model, Start

__all__ = ["estimate_memory", "meta_learn"]


def meta_learn(
    model: Model,
    tasks: Tasks,
    *,
    num_support: int | range,
    inference: Inference | None = None,
    objective: Objective | None = None,
    num_steps: int = 1000,
    batch_size: int = 10,
    optimizer: Optimizer | None = None,
    max_grad_norm: float = 10.0,
    first_order: bool = False,
    device: torch.device | str = "auto",
    compile: Compile = "auto",
    memory: Memory = full(),
    chunk_size: int | None = None,
    precision: Precision = "float32",
    progress: bool = True,
    seed: int = 0,
    start: LearnedPrior | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    callbacks: Sequence[Callable[[MetaStep], None]] = (),
) -> LearnedPrior:
    """Meta-learns the shared prior of a task model from many tasks.

    Under `torchrun`, and in an initialised process group of `torch.distributed`, processes share the tasks of each
    batch: all call this with the same arguments and get the same prior; see `bmaml_ppl.distributed`.

    Args:
        model: Pyro model of one task. Each `pyro.param` and each parameter of a registered network is learned.
        tasks: Training tasks.
        num_support: Observations K that a task adapts to; a range draws K for each task anew.
        inference: Adaptation; None is `svgd()`.
        objective: What is minimised. None is `evidence()` for `laplace()`, `marginal_nll()` for `hmc()` and for
            particles that start at the model's own learned prior, and `chaser() + query_nll("mean")` where they are
            learned freely.
        num_steps: Meta-steps.
        batch_size: Tasks a meta-step.
        optimizer: Makes the optimiser from a list of tensors, for example
            `partial(torch.optim.Adam, lr=1e-3)`. None is Adam with a rate of 0.02, and 0.003 for networks and
            particles, on a cosine to zero.
        max_grad_norm: Meta-gradients longer than this are shortened to it.
        first_order: Stop gradients at the scores (first-order MAML).
        device: Where to compute; "auto" is CUDA where there is one.
        compile: True compiles the meta-gradient to machine code, which takes half a minute or so the first time and
            a few seconds once the machine has compiled the same before; what was compiled is checked against what was
            not, on the first batch. "auto" compiles runs of at least 20,000 adaptation steps (`num_steps` times those
            of the inference), and records shorter ones, from 20 meta-steps, as graphs of tensor operations: a second
            or two, and several times faster than Pyro's handlers. False does neither.
        memory: What an unrolled adaptation keeps for the outer gradient: `full()`, `checkpointed()` or
            `truncated(k)` of `bmaml_ppl.memory`, where a table says when to take which.
        chunk_size: Tasks differentiated together; fewer need less memory and give the same gradient. None is all.
        precision: "float32" leaves tasks as they are; "float64" casts them and all that is learned; "bf16" takes the
            products of matrices within the model in bfloat16, "tf32" all of them in TF32 on an NVIDIA GPU, both for
            large networks: meta-gradients then have one or two digits, and bf16 runs are recorded, not compiled.
        progress: Whether to show a progress bar.
        seed: Seed of batches, starts and draws; the same seed gives the same prior, bit for bit on CPU.
        start: A learned prior of the same model to go on from, with its standardisation.
        checkpoint_dir: Folder for checkpoints, of which the newest two are kept, and the prior so far as
            `prior.safetensors`. The same call with the same folder goes on from the newest whole checkpoint, to the
            same prior, bit for bit on CPU, as if it had never been stopped; a finished run returns at once.
            SIGINT (Ctrl-C) and SIGTERM wait for the step and its checkpoint and then do what they always do; the
            second one acts at once.
        checkpoint_every: Meta-steps between two checkpoints; one is written at the end too.
        callbacks: Called with a `MetaStep` after each meta-step of this call, not after those of a checkpoint.

    Returns:
        The learned prior, with the run's history.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the model cannot be a task model, a task has too few observations, `start` belongs
            to another model, or `checkpoint_dir` holds another run's checkpoints (the message names each setting
            that differs) or none that is whole.

    Warns:
        CheckpointWarning: If a damaged checkpoint was passed over, or one could not be written; the run goes on.
        NotConverged: If more than a tenth of the last adaptations stopped short of the optimum at which implicit
            gradients are taken.
        StoppedEarly: If the loss or its gradient became non-finite, or the run was interrupted from the
            keyboard; the last good prior is returned.
    """
    _check_kinds(tasks, inference, objective, start, memory)
    check_count("num_steps", num_steps, least=0)
    check_count("batch_size", batch_size, least=1)
    check_count("checkpoint_every", checkpoint_every, least=1)
    world, where = join_world(_choose_device(device))
    tasks, dtype = _with_units_of(start, tasks.to(where)), dtype_of(precision)
    with world.one_voice():
        _warn_of_units(tasks)
        world.warn_of_idle(min(batch_size, len(tasks)))
    learned = _prepare(model, tasks, inference or svgd(), num_support, seed, start, dtype).to(dtype=dtype)
    tasks = tasks.to(dtype=dtype)
    check_precision(precision, learned.inference, learned.density.dim, where, learned.like.dtype)
    mode = choose_mode(compile, num_steps, learned.inference.num_steps)
    if precision == "bf16" and mode == "compiled":
        mode = "recorded"  # compilers round elsewhere, by which the gradient changes too much to be checked
    density = reduce_matmuls(learned.density, precision)
    adapter = Adapter(density, learned.inference, learned.start, first_order, mode, memory)
    objective = _choose_objective(objective, learned.inference, learned.start)
    schedule = Schedule(num_steps, batch_size, optimizer, max_grad_norm, chunk_size)
    checkpoints = None
    if checkpoint_dir or world.size > 1:
        # A run that ran out of memory may go on in another mode: all but truncation give the same gradient.
        kept = str(memory) if str(memory).startswith("truncated") else "exact"
        given = {"first_order": first_order, "memory": kept, "precision": precision, **schedule.settings}
        run = describe_run(learned, tasks, objective, from_start=start is not None, **given)
        world.require_same(run)
        if checkpoint_dir:
            checkpoints = Checkpoints(Path(checkpoint_dir), run, checkpoint_every, world.writes)
    loop = Loop(learned, adapter, tasks.scaled(), objective, schedule, list(callbacks), world, checkpoints)
    with world.one_voice(), world.held, tensor_cores(precision, where), freed_memory_kept():
        return loop.run(progress)


def estimate_memory(
    model: Model,
    tasks: Tasks,
    *,
    num_support: int | range,
    inference: Inference | None = None,
    objective: Objective | None = None,
    batch_size: int = 10,
    first_order: bool = False,
    device: torch.device | str = "auto",
    memory: Memory = full(),
    chunk_size: int | None = None,
    precision: Precision = "float32",
    seed: int = 0,
) -> MemoryEstimate:
    """What a meta-step of `meta_learn` with these arguments needs in memory, without running one.

    It takes a second or two: meta-steps of one and two tasks and of two and three adaptation steps are run, and what
    they keep alive is extrapolated. In float32 networks it was within a factor 1.5 of the memory that processes took.

    Args:
        model: See `meta_learn`, for these and all others.
        tasks: Training tasks.
        num_support: Observations that a task adapts to.
        inference: Adaptation.
        objective: What is minimised.
        batch_size: Tasks a meta-step.
        first_order: Stop gradients at the scores.
        device: Where to compute.
        memory: What an unrolled adaptation keeps for the outer gradient.
        chunk_size: Tasks differentiated together.
        precision: Of what is computed.
        seed: Of the batch and the starts that are looked at.

    Returns:
        Bytes of the particles, the unrolled graph and the rest, and in total; `str` shows them.
    """
    _check_kinds(tasks, inference, objective, None, memory)
    where, dtype = _choose_device(device), dtype_of(precision)
    learned = _prepare(model, tasks.to(where), inference or svgd(), num_support, seed, None, dtype).to(dtype=dtype)
    check_precision(precision, learned.inference, learned.density.dim, where, learned.like.dtype)
    density = reduce_matmuls(learned.density, precision)
    adapter = Adapter(density, learned.inference, learned.start, first_order, "recorded", memory)
    objective = _choose_objective(objective, learned.inference, learned.start)
    batch = tasks.to(where, dtype).scaled().sample_batch(batch_size, num_support, torch.Generator().manual_seed(seed))
    views = episode_views(batch, needs_masks(tasks, num_support))
    params = unconstrain(learned.params, learned.constraints)
    num_together = min(len(batch.support), batch_size if chunk_size is None else chunk_size)
    return MemoryProbe(adapter, objective, learned.constraints, params, views).estimate(num_together, memory)


def _prepare(
    model: Model,
    tasks: Tasks,
    inference: Inference,
    num_support: int | range,
    seed: int,
    start: LearnedPrior | None,
    dtype: torch.dtype | None,
) -> LearnedPrior:
    """The prior before the first meta-step; the model is traced with tasks of the dtype that its networks have."""
    batch = as_task_data(tasks)
    task = one_task(batch)
    rows = slice(None) if task.mask is None else task.mask
    example = {k: v[rows] if k in tasks.data else v for k, v in task.data.items()}
    with seeded(seed, torch.device("cpu")):  # a model may draw its initial values
        density = from_model(model, example, tasks.constants)
    if needs_masks(tasks, num_support):
        density.refuse_unmaskable(tasks.data)
    initial = density.to(device=_device_of(tasks)).prior
    check_observations(density, initial, batch.data, batch.mask, tasks.names)
    inference = ALGORITHMS[inference.name](**inference.config, sites=density.sites)
    kind = resolve_start(inference, density, TaskData(example, None))
    check_inference(inference, density, initial, TaskData(example, None))
    reserved = inference.parameters(density.dim)
    if kind == "free":
        with seeded(seed, torch.device("cpu")):
            reserved["particles"] = density.initial_particles(inference.num_particles, example)
    _check_names(density, {"particles", "step_size", *reserved})
    like = next((v for v in example.values() if v.is_floating_point()), torch.zeros(())).to(dtype=dtype)
    params = {k: v.detach().to(like) for k, v in {**density.prior, **reserved}.items()}
    if not params:
        raise ValueError(
            'the model declares nothing to learn and particles start at its own prior; write init="free", or give the '
            "prior parameters: pyro.param(name, initial_value)"
        )
    if start is not None:
        params = _go_on(params, start)
    outputs = tuple(key for key in density.observed.values() if key is not None)
    template = Template.of(tasks, tuple(dict.fromkeys((*outputs, *tasks.outputs))))
    return LearnedPrior(density, inference, kind, params, template, tasks.scaling, num_support, seed)


def _check_kinds(tasks: object, inference: object, objective: object, start: object, memory: object) -> None:
    for name, got, kind, write in (
        ("tasks", tasks, Tasks, "Tasks.from_frame(...), or Tasks({name: tensor of shape (T, N)})"),
        ("inference", inference, Inference | None, "inference=svgd(num_particles=20)"),
        ("objective", objective, Objective | None, 'objective=query_nll("mean")'),
        ("start", start, LearnedPrior | None, "start=load_prior(path, model)"),
        ("memory", memory, Memory, "memory=checkpointed()"),
    ):
        if not isinstance(got, kind):
            raise TypeError(f"{name} is {got!r:.80}, a {type(got).__name__}; write {write}")


def _choose_device(device: torch.device | str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device={str(device)!r}, but torch sees no GPU; write device="cpu" or "auto"')
    return device


def _with_units_of(start: LearnedPrior | None, tasks: Tasks) -> Tasks:
    """A prior that goes on keeps its units: its parameters mean nothing in others."""
    if start is None:
        return tasks
    if tasks.scaling is not None and tasks.scaling is not start.scaling:
        raise ValueError(
            "start=... has its own standardisation, which is kept; give the tasks without one (leave out "
            "tasks.standardize())"
        )
    return replace(tasks, scaling=None if start.scaling is None else start.scaling.to(_device_of(tasks)))


def _device_of(tasks: Tasks) -> torch.device:
    """Where the tasks' tensors live."""
    return next(iter(tasks.data.values())).device


def _check_names(density: Density, reserved: set[str]) -> None:
    if taken := sorted(reserved & set(density.prior)):
        raise ValueError(f"pyro.param {taken} have names that the learner uses itself; rename them in the model")


def _go_on(params: dict[str, Tensor], start: LearnedPrior) -> dict[str, Tensor]:
    given = {k: tuple(v.shape) for k, v in start.params.items()}
    wanted = {k: tuple(v.shape) for k, v in params.items()}
    if given != wanted:
        raise ValueError(f"start=... holds {given}, but this model and inference need {wanted}; learn without start")
    return {k: start.params[k].detach().to(v) for k, v in params.items()}


def _choose_objective(objective: Objective | None, inference: Inference, start: Start) -> Objective:
    if inference.num_draws or inference.name == "smc":
        if objective is not None and any(name != "marginal_nll" for _, name, _ in objective.terms):
            raise ValueError(
                f"objective={objective} needs gradients through the draws of {inference.name}, which are constants; "
                "write objective=marginal_nll()"
            )
        return objective or marginal_nll()
    if objective is not None:
        return objective
    if inference.name == "laplace":
        return evidence()
    return marginal_nll() if start == "prior" else chaser() + query_nll("mean")


def _warn_of_units(tasks: Tasks) -> None:
    """Speaks up where a raw output is far from unit scale, which the default learning rates are made for."""
    scaled = tasks.scaled()
    for name in tasks.outputs:
        values = scaled.data[name] if scaled.mask is None else scaled.data[name][scaled.mask]
        size = values.float().square().mean().sqrt().item()
        if values.is_floating_point() and not 0.05 < size < 20:
            warnings.warn(
                f"output {name!r} has root mean square {size:.3g}; meta-learning is made for values around 1. "
                "Write tasks.standardize() on the training tasks: predictions still come in your units",
                stacklevel=3,
            )
