"""The outer loop: meta-learns the shared prior by gradients through, or at, task posteriors."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bmaml_ppl.adaptation import Adapter, TaskData, as_task_data, check_inference, one_task, resolve_start, seeded
from bmaml_ppl.checks import check_count
from bmaml_ppl.compile import Compile, should_record
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.diagnostics.curvature import NotConverged
from bmaml_ppl.inference import ALGORITHMS, svgd
from bmaml_ppl.learned import History, LearnedPrior
from bmaml_ppl.objectives import Objective, chaser, evidence, marginal_nll, query_nll
from bmaml_ppl.observations import check_observations
from bmaml_ppl.outer import clip, constrain, episode_views, meta_gradient, parameter_groups, unconstrain
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.template import Template
from bmaml_ppl.types import Inference, Model, Start

__all__ = ["MetaStep", "StoppedEarly", "meta_learn"]

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

_CHECKPOINT_EVERY = 100
_FEWEST_STEPS, _LAST_STEPS = 20, 50
_MOST_UNCONVERGED = 0.1
_STOPPED = (
    "meta-learning stopped: {}; the last prior with a finite loss and gradient is kept. If it diverged, standardise "
    'the data, or take shorter or adaptive inner steps (preconditioner="adaptive")'
)


class StoppedEarly(UserWarning):
    """The outer loop met a non-finite loss or gradient and kept the last good prior."""


class MetaStep(NamedTuple):
    """What a callback sees after each meta-step.

    Attributes:
        step: Its number, from 1.
        loss: Objective, mean over the batch's tasks.
        grad_norm: Norm of the meta-gradient before clipping.
        params: Current meta-parameters, constrained.
    """

    step: int
    loss: float
    grad_norm: float
    params: dict[str, Tensor]


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
    progress: bool = True,
    seed: int = 0,
    start: LearnedPrior | None = None,
    checkpoint_dir: str | Path | None = None,
    callbacks: Sequence[Callable[[MetaStep], None]] = (),
) -> LearnedPrior:
    """Meta-learns the shared prior of a task model from many tasks.

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
        compile: Whether to record an adaptation step as a graph of tensor operations, which runs several times
            faster than Pyro's handlers and takes a second or two to make; "auto" records runs of 20 steps or more.
        progress: Whether to show a progress bar.
        seed: Seed of batches, starts and draws; the same seed gives the same prior, bit for bit on CPU.
        start: A learned prior of the same model to go on from, with its standardisation.
        checkpoint_dir: Folder that keeps the prior during the run as `prior.safetensors`, every 100 steps and at
            the end.
        callbacks: Called with a `MetaStep` after each meta-step.

    Returns:
        The learned prior, with the run's history.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the model cannot be a task model, a task has too few observations, or `start` belongs
            to another model.

    Warns:
        NotConverged: If more than a tenth of the last adaptations stopped short of the optimum at which implicit
            gradients are taken.
        StoppedEarly: If the loss or its gradient became non-finite, or the run was interrupted from the
            keyboard; the last good prior is returned.
    """
    _check_kinds(tasks, inference, objective, start)
    check_count("num_steps", num_steps, least=0)
    check_count("batch_size", batch_size, least=1)
    tasks = _with_units_of(start, tasks.to(_choose_device(device)))
    _warn_of_units(tasks)
    learned = _prepare(model, tasks, inference or svgd(), num_support, seed, start)
    record = should_record(compile, num_steps)
    adapter = Adapter(learned.density, learned.inference, learned.start, first_order, record)
    loop = _Loop(
        learned,
        adapter,
        tasks.scaled(),
        _choose_objective(objective, learned.inference, learned.start),
        _Schedule(num_steps, batch_size, optimizer, max_grad_norm),
        list(callbacks) + ([_Checkpoint(learned, Path(checkpoint_dir), num_steps)] if checkpoint_dir else []),
    )
    return loop.run(progress)


def _prepare(
    model: Model,
    tasks: Tasks,
    inference: Inference,
    num_support: int | range,
    seed: int,
    start: LearnedPrior | None,
) -> LearnedPrior:
    """The prior before the first meta-step."""
    batch = as_task_data(tasks)
    task = one_task(batch)
    rows = slice(None) if task.mask is None else task.mask
    example = {k: v[rows] if k in tasks.data else v for k, v in task.data.items()}
    with seeded(seed, torch.device("cpu")):  # a model may draw its initial values
        density = from_model(model, example, tasks.constants)
    if _needs_masks(tasks, num_support):
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
    like = next((v for v in example.values() if v.is_floating_point()), torch.zeros(()))
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


def _check_kinds(tasks: object, inference: object, objective: object, start: object) -> None:
    for name, got, kind, write in (
        ("tasks", tasks, Tasks, "Tasks.from_frame(...), or Tasks({name: tensor of shape (T, N)})"),
        ("inference", inference, Inference | None, "inference=svgd(num_particles=20)"),
        ("objective", objective, Objective | None, 'objective=query_nll("mean")'),
        ("start", start, LearnedPrior | None, "start=load_prior(path, model)"),
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


def _needs_masks(tasks: Tasks, num_support: int | range) -> bool:
    """Whether some batch of these tasks is padded."""
    return tasks.mask is not None or isinstance(num_support, range)


def _go_on(params: dict[str, Tensor], start: LearnedPrior) -> dict[str, Tensor]:
    given = {k: tuple(v.shape) for k, v in start.params.items()}
    wanted = {k: tuple(v.shape) for k, v in params.items()}
    if given != wanted:
        raise ValueError(f"start=... holds {given}, but this model and inference need {wanted}; learn without start")
    return {k: start.params[k].detach().to(v) for k, v in params.items()}


def _choose_objective(objective: Objective | None, inference: Inference, start: Start) -> Objective:
    if inference.num_draws:
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


class _Schedule(NamedTuple):
    """How long and how fast the outer loop goes."""

    num_steps: int
    batch_size: int
    optimizer: Optimizer | None
    max_grad_norm: float


class _Checkpoint:
    """A callback that writes the current prior to a folder."""

    def __init__(self, learned: LearnedPrior, folder: Path, num_steps: int) -> None:
        self.learned, self.num_steps = learned, num_steps
        self.path = folder / "prior.safetensors"
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, info: MetaStep) -> None:
        if info.step % _CHECKPOINT_EVERY == 0 or info.step == self.num_steps:
            replace(self.learned, params=info.params).save(self.path)


class _Loop:
    """The outer loop's moving parts."""

    def __init__(
        self,
        learned: LearnedPrior,
        adapter: Adapter,
        tasks: Tasks,
        objective: Objective,
        schedule: _Schedule,
        callbacks: list[Callable[[MetaStep], None]],
    ) -> None:
        self.learned, self.tasks, self.schedule, self.callbacks = learned, tasks, schedule, callbacks
        self.constraints = learned.constraints
        self.gradient = partial(meta_gradient, adapter, objective, self.constraints)
        self.masked = _needs_masks(tasks, learned.num_support)
        free = unconstrain(learned.params, self.constraints)
        self.params = {k: v.detach().clone().requires_grad_() for k, v in free.items()}
        if schedule.optimizer is None:
            slow = learned.density.networks | {"particles"}
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(parameter_groups(self.params, slow))
        else:
            self.optimizer = schedule.optimizer(list(self.params.values()))
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(schedule.num_steps, 1))
        self.generator = torch.Generator().manual_seed(learned.seed)
        self.history = History()

    def run(self, progress: bool) -> LearnedPrior:
        """Takes all meta-steps and returns the learned prior."""
        bar = tqdm(range(1, self.schedule.num_steps + 1), disable=not progress, desc="meta-learning")
        kept = self._snapshot()
        for step in bar:
            # Only what had a finite loss and gradient is good; what the optimiser makes of it is not known yet.
            before = self._snapshot()
            try:
                stopped = self._step(step)
            except KeyboardInterrupt:
                stopped = f"interrupted at meta-step {step}"
            if stopped is not None:
                self.history.stopped = stopped
                warnings.warn(_STOPPED.format(stopped), StoppedEarly, stacklevel=3)
                return replace(self.learned, params=kept, history=self.history)
            kept, h = before, self.history
            rate = sum(h.tasks_per_second[-20:]) / len(h.tasks_per_second[-20:])
            counts = {"repaired": h.num_repaired[-1], "not converged": h.num_unconverged[-1]}
            notes = "".join(f", {count} {what}" for what, count in counts.items() if count)
            shown = f"loss {h.loss[-1]:.3f}, gradient {h.grad_norm[-1]:.2g}, {rate:.0f} tasks/s{notes}"
            bar.set_postfix_str(shown, False)
        self._warn_of_unconverged()
        return replace(self.learned, params=self._snapshot(), history=self.history)

    def _step(self, step: int) -> str | None:
        """Takes one meta-step; returns why the loop must stop, or None."""
        began = perf_counter()
        episode = self.tasks.sample_batch(self.schedule.batch_size, self.learned.num_support, self.generator)
        params = {k: v.detach() for k, v in self.params.items()}
        seed = int(torch.randint(2**62, (), generator=self.generator))
        with seeded(seed, self.learned.device):
            found = self.gradient(params, episode_views(episode, self.masked))
        loss = found.loss
        gradients, norm = clip(found.gradients, self.schedule.max_grad_norm)
        if not torch.isfinite(loss + norm):
            return f"loss {loss.item():g} with gradient norm {norm.item():g} at meta-step {step}"
        self.history.loss.append(loss.item())
        self.history.grad_norm.append(norm.item())
        self.history.num_repaired.append(found.num_repaired)
        self.history.num_unconverged.append(found.num_unconverged)
        for name, value in self.params.items():
            value.grad = gradients[name]
        self.optimizer.step()
        if self.schedule.optimizer is None:
            self.decay.step()
        self.history.tasks_per_second.append(len(episode.support) / (perf_counter() - began))
        for callback in self.callbacks:
            callback(MetaStep(step, loss.item(), norm.item(), self._snapshot()))
        return None

    def _warn_of_unconverged(self) -> None:
        """Speaks up where gradients at optima were taken elsewhere, toward the end of the run."""
        counts = self.history.num_unconverged[-_LAST_STEPS:]
        tasks = len(counts) * self.schedule.batch_size
        if len(counts) >= _FEWEST_STEPS and sum(counts) > _MOST_UNCONVERGED * tasks:
            warnings.warn(
                f"in the last {len(counts)} meta-steps {sum(counts)} of {tasks} adaptations stopped short of the "
                "optimum at which implicit gradients are taken; write more steps in the inference (num_steps=...), or "
                'gradient="unrolled"',
                NotConverged,
                stacklevel=4,
            )

    def _snapshot(self) -> dict[str, Tensor]:
        detached = {k: v.detach().clone() for k, v in self.params.items()}
        return {k: v.clone() for k, v in constrain(detached, self.constraints).items()}
