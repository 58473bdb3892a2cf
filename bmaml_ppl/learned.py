"""The meta-learned prior: what the outer loop returns, and what adapts to new tasks."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint, positive
from torch.func import vmap
from torch.utils._pytree import tree_map

from bmaml_ppl.adaptation import (
    Adapter,
    TaskData,
    as_task_data,
    check_inference,
    even_parts,
    one_task,
    take_tasks,
)
from bmaml_ppl.adapters import Adapters
from bmaml_ppl.allocator import freed_memory_kept
from bmaml_ppl.checks import check_count
from bmaml_ppl.compile import Compile, choose_adapting
from bmaml_ppl.density import Density
from bmaml_ppl.diagnostics.curvature import check_measured
from bmaml_ppl.diagnostics.population import check_population
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import ALGORITHMS
from bmaml_ppl.model_view import learned_model
from bmaml_ppl.observations import check_observations
from bmaml_ppl.posterior import RESTART_STREAM, Posterior
from bmaml_ppl.prediction import simulate
from bmaml_ppl.scaling import Scaling
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.template import Template
from bmaml_ppl.types import Inference, Model, Start

__all__ = ["History", "LearnedPrior", "choose_chunk_size"]

_CHUNK_BYTES = 2**28


@dataclass
class History:
    """What the outer loop saw, one entry a meta-step.

    Attributes:
        loss: Objective, mean over the batch's tasks.
        grad_norm: Norm of the meta-gradient before clipping.
        tasks_per_second: Tasks adapted and differentiated a second.
        num_repaired: Tasks of the batch whose curvature had to be repaired to be positive definite.
        num_unconverged: Tasks of the batch that stopped short of the optimum at which the gradient is taken.
        stopped: Why the loop ended early, or None.
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    tasks_per_second: list[float] = field(default_factory=list)
    num_repaired: list[int] = field(default_factory=list)
    num_unconverged: list[int] = field(default_factory=list)
    stopped: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class LearnedPrior:
    """A shared prior over tasks, with the inference that adapts it.

    Attributes:
        density: Log density of a task.
        inference: The algorithm.
        start: Where particles start: "free" or "prior".
        params: Every meta-parameter by name, constrained: the model's own, `particles` where the start is
            free, and `step_size` where it is learned.
        template: Shape of one task's data.
        scaling: Standardisation of the training tasks, or None.
        num_support: Shots it was learned for.
        seed: Seed of particles' starts and of draws.
        history: What the outer loop saw; empty after loading.
    """

    density: Density
    inference: Inference
    start: Start
    params: dict[str, Tensor]
    template: Template
    scaling: Scaling | None
    num_support: int | range
    seed: int
    history: History = field(default_factory=History)
    _adapters: Adapters = field(default_factory=Adapters, init=False)

    def __repr__(self) -> str:
        shots = self.num_support
        shown = shots if isinstance(shots, int) else f"{shots.start} to {shots[-1]}"
        return (
            f"LearnedPrior(sites: {', '.join(self.density.sites)}; learned for {shown} shots; {self.inference.name}, "
            f"{self.inference.num_particles} particles, {self.start} start)"
        )

    @property
    def model(self) -> Model:
        """The user's model with the learned meta-parameters and networks in place, for Pyro's own tools."""
        return learned_model(self.density, self.params)

    @property
    def constraints(self) -> dict[str, Constraint]:
        """Constraint of every meta-parameter that has one, the inference's own included."""
        return {**self.density.constraints, "step_size": positive}

    @property
    def device(self) -> torch.device:
        """Where the meta-parameters live."""
        return self.like.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LearnedPrior":
        """Moves the prior."""
        params = {k: v.to(device=device, dtype=dtype) for k, v in self.params.items()}
        scaling = None if self.scaling is None else self.scaling.to(device, dtype)
        return replace(self, params=params, density=self.density.to(device, dtype), scaling=scaling)

    def adapt(
        self,
        tasks: Tasks | None = None,
        /,
        *,
        inference: Inference | None = None,
        num_steps: int | None = None,
        num_restarts: int = 1,
        chunk_size: int | None = None,
        compile: Compile = "auto",
        seed: int | None = None,
        **data: Any,
    ) -> Posterior:
        """Adapts to one task or to many at once.

        A second call with data of the same shape records the computation, which takes about a second; later ones
        are fast.

        Args:
            tasks: Tasks to adapt to, in the user's units, or None.
            inference: Another algorithm than the one learned with; a free start needs as many particles.
            num_steps: Adaptation steps; None takes the inference's own.
            num_restarts: R, independent adaptations, whose agreement `check` and R-hat look at; draws come from all.
            chunk_size: Tasks adapted together; None bounds the memory.
            compile: True compiles the steps to machine code, which takes a quarter of a minute or so the first time on
                a machine and makes them two to five times as fast, False runs them as they are, and "auto" compiles
                where `chunk_size` makes 2,000 steps or more of all tasks: thousands of large ones, or long chains.
            seed: Seed of the particles' start and of draws; None takes the prior's.
            **data: One task's observations as keyword tensors, (N, ...), or a batch's, (T, N, ...).

        Returns:
            The posterior.

        Raises:
            TypeError: If something else than Tasks or numbers is given, or num_steps or chunk_size is not an integer.
            ValueError: If data is missing, unknown or of the wrong shape, steps are given to an inference whose number
                of draws they would change (`hmc`), particles became non-finite, or the density
                is flat along a site; the message names the key or the tasks.

        Warns:
            RepairedCurvature: If the curvature of some tasks was not positive definite (`laplace`).
            NotConverged: If the optimiser of some tasks stopped short (implicit gradients).
            UnevenWeights: If few particles stand for the posterior of some tasks (`smc`).
        """
        given, batch, single = self.prepare_tasks(tasks, data)
        adapter = self.bind(inference)
        seed = self.seed if seed is None else seed
        if inference is not None:
            check_inference(adapter.inference, self.density, self.params, one_task(batch))
        steps = _num_steps(adapter.inference, num_steps)
        chunk = choose_chunk_size(adapter, batch) if chunk_size is None else chunk_size
        check_count("chunk_size", chunk, least=1)
        check_count("num_restarts", num_restarts, least=1)
        parts = [take_tasks(batch, rows.to(self.device)) for rows in even_parts(len(given), chunk)]
        mode = choose_adapting(compile, len(parts) * steps * num_restarts)
        adapters = self._adapters.choose(adapter, parts, mode)
        states = []
        for restart in range(num_restarts):
            runs = zip(adapters, parts, strict=True)
            found = (self.run(chosen, part, steps, seed + restart * RESTART_STREAM) for chosen, part in runs)
            with freed_memory_kept() if len(parts) > 1 else nullcontext():
                states.append(_join(found, len(given)))
            _check_finite(states[-1].particles, given)
            check_measured(states[-1], self.density.sites, given.names, must_converge=adapter.inference.implicit)
            check_population(states[-1], given.names)
        return Posterior(self, adapter.inference, states[0], given, single, seed, tuple(states[1:]))

    def predict(self, tasks: Tasks | None = None, /, *, num_samples: int = 1000, **data: Any) -> dict[str, Tensor]:
        """Zero-shot: draws from the prior predictive of a task with no observations.

        Args:
            tasks: Tasks whose inputs to predict at, or None.
            num_samples: S.
            **data: One task's inputs as keyword tensors, (N, ...), or a batch's, (T, N, ...).

        Returns:
            Observed sites in the user's units and deterministic sites, (S, ...) or (S, T, ...); padded rows of
            observed sites are NaN.
        """
        check_count("num_samples", num_samples, least=1)
        batch, single = self._inputs(tasks, data)
        z = self._draw(batch, num_samples)
        draws = simulate(self.density, self.params, z, batch, self.scaling, self.seed)
        return {name: value[0] if single else value.transpose(0, 1) for name, value in draws.items()}

    def sites(self, tasks: Tasks | None = None, /, *, num_samples: int = 1000, **data: Any) -> dict[str, Tensor]:
        """Draws of every latent site of a task with no observations, those under `predict`.

        Args:
            tasks: Tasks whose inputs the latents may depend on, or None.
            num_samples: S.
            **data: The same as keyword tensors.

        Returns:
            Latent sites on their supports, in the model's units, (S, ...) or (S, T, ...).
        """
        check_count("num_samples", num_samples, least=1)
        batch, single = self._inputs(tasks, data)

        def constrain(z: Tensor, task: dict[str, Tensor]) -> dict[str, Tensor]:
            return vmap(lambda particle: self.density.constrain(particle, self.params, task))(z)

        with torch.no_grad():
            values = vmap(constrain)(self._draw(batch, num_samples), batch.data)
        return {name: value[0] if single else value.transpose(0, 1) for name, value in values.items()}

    def _inputs(self, tasks: Tasks | None, data: dict[str, Any]) -> tuple[TaskData, bool]:
        given, single = self.template.to_tasks(tasks, data, need_outputs=False, like=self.like)
        return as_task_data(replace(given, scaling=self.scaling)), single

    def _draw(self, batch: TaskData, num_samples: int) -> Tensor:
        """Unconstrained draws from the learned prior, (T, S, D)."""
        with torch.no_grad(), seeded(self.seed, self.device):
            return self.bind(None).draw_unadapted(self.params, batch, num_samples)

    def to_arviz(
        self,
        tasks: Tasks,
        /,
        *,
        num_samples: int = 1000,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """Exports prior and prior predictive draws to ArviZ; see `Posterior.to_arviz`."""
        from bmaml_ppl.diagnostics.posterior_tree import prior_tree

        check_count("num_samples", num_samples, least=1)
        return prior_tree(self, tasks, num_samples, coords, dims)

    def save(self, path: str | Path) -> None:
        """Writes tensors and the schema of sites and settings to one safetensors file; see `load_prior`."""
        from bmaml_ppl.storage import save_prior

        save_prior(self, path)

    def prepare_tasks(self, tasks: Tasks | None, data: dict[str, Any]) -> tuple[Tasks, TaskData, bool]:
        """Tasks to adapt to, checked: in the user's units, as the model sees them, and whether they are a single task.

        Raises:
            TypeError: If something else than Tasks or numbers is given.
            ValueError: If data is missing, unknown, of the wrong shape or outside a support, or cannot be masked.
        """
        given, single = self.template.to_tasks(tasks, data, need_outputs=True, like=self.like)
        if given.mask is not None:
            self.density.refuse_unmaskable(given.data)
        batch = as_task_data(replace(given, scaling=self.scaling))
        check_observations(self.density, self.params, batch.data, batch.mask, given.names)
        return given, batch, single

    @property
    def like(self) -> Tensor:
        """A meta-parameter, of the dtype and on the device of all."""
        return next(iter(self.params.values()))

    def bind(self, inference: Inference | None = None) -> Adapter:
        """An inference, or the one learned with, bound to the learned density.

        Raises:
            ValueError: If the inference cannot be batched, or needs parameters or particles that were not learned.
        """
        if inference is None:
            return Adapter(self.density, self.inference, self.start)
        if inference.name not in ALGORITHMS:
            raise ValueError(
                f"{inference.name} does not run in a batch of tasks; choose one of {list(ALGORITHMS)}, or call "
                f"{inference.name}(prior, ...) for one task"
            )
        bound = ALGORITHMS[inference.name](**inference.config, sites=self.density.sites)
        _check_learned(bound.parameters(self.density.dim), self.params)
        start = self.start if bound.start == "auto" else bound.start
        if start == "free":
            learned = self.params.get("particles")
            if learned is None or len(learned) != bound.num_particles:
                has = "none" if learned is None else str(len(learned))
                raise ValueError(
                    f"a free start needs {bound.num_particles} learned particles, this prior has {has}; "
                    "change num_particles, or learn again with this inference"
                )
        return Adapter(self.density, bound, start)

    def run(self, adapter: Adapter, batch: TaskData, num_steps: int, seed: int) -> Any:
        """Each task's state after adaptation, without gradients and under a seed of its own."""
        with torch.no_grad(), seeded(seed, self.device), warnings.catch_warnings():
            if adapter.mode == "recorded":  # which nobody asked for
                warnings.filterwarnings("ignore", message="a step could not be recorded")
            return adapter.adapt(self.params, batch, num_steps)


def _num_steps(inference: Inference, num_steps: int | None) -> int:
    if num_steps is None:
        return inference.num_steps
    if inference.num_draws:
        raise ValueError(
            f"num_steps={num_steps} was given for {inference.name}, whose steps are its warm-up and its draws; write "
            f"inference={inference.name}(num_warmup=..., num_draws=...)"
        )
    check_count("num_steps", num_steps, least=0)
    return num_steps


def _check_learned(needed: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    for name, value in needed.items():
        has = tuple(params[name].shape) if name in params else None
        if has != tuple(value.shape):
            raise ValueError(
                f"the inference learns {name!r} of shape {tuple(value.shape)}, this prior has "
                f'{"none" if has is None else has}; learn again with this inference, or write learn_step_size="none"'
            )


def choose_chunk_size(adapter: Adapter, batch: TaskData) -> int:
    """Tasks whose particles, kernels, Hessians and Jacobians fit into a fixed budget together."""
    rows = max(value[0].numel() for value in batch.data.values())
    dim, num = adapter.density.dim, adapter.inference.num_particles
    num *= 1 + adapter.inference.num_draws // 100
    measured = 0 if adapter.inference.measure is None else dim * (min(dim, 128) + 8 * rows)
    kernel = 0 if adapter.inference.name == "smc" else dim * num  # whose particles meet in no matrix
    floats = num * (dim * min(dim, 32) + kernel + 64 * rows * min(dim, 32) + measured)
    return max(1, _CHUNK_BYTES // (8 * floats))


def _join(states: Iterable[Any], num_tasks: int) -> Any:
    """One state of all tasks from states of some each, so that no more than one of these is kept beside it."""
    joined, first = None, 0
    for state in states:
        if joined is None:
            joined = tree_map(lambda x: x.new_empty((num_tasks, *x.shape[1:])), state)
        size = len(state.particles)
        tree_map(lambda whole, x, at=first: whole[at : at + len(x)].copy_(x[: num_tasks - at]), joined, state)
        first += size
    return joined


def _check_finite(particles: Tensor, tasks: Tasks) -> None:
    broken = (~torch.isfinite(particles)).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        names = [tasks.names[i] for i in broken[:5]]
        raise ValueError(
            f"adaptation became non-finite for {len(broken)} of {len(tasks)} tasks, first {names}; use fewer or "
            'shorter steps (num_steps=..., step_size=...), or preconditioner="adaptive"'
        )
