"""Adaptation of the shared prior to one task: the loop that objectives, learners and users share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.utils._pytree import tree_map

from bmaml_ppl.compile import Mode, Recorded
from bmaml_ppl.density import Density
from bmaml_ppl.implicit import conjugate_gradients, implicit_optimum
from bmaml_ppl.inference.curvature import exact_hessian
from bmaml_ppl.inference.derivatives import FirstOrder
from bmaml_ppl.memory import Memory
from bmaml_ppl.task_density import TaskDensity
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, LogDensity, Start, Tensors

__all__ = [
    "Adapter",
    "TaskData",
    "as_task_data",
    "check_inference",
    "even_parts",
    "one_task",
    "over_tasks",
    "resolve_start",
    "take_tasks",
]


_DENSE_LIMIT = 128
_RECORDED = (
    "_begin",
    "_prepare",
    "_first",
    "_update",
    "_settle",
    "_measure",
    "_score",
    "_hessian",
    "_multiply",
    "_log_joint",
    "_log_likelihood",
)


class TaskData(NamedTuple):
    """What the model sees of one task, or of a batch of tasks with a leading dimension.

    Attributes:
        data: The model's keyword tensors, standardised where the tasks are.
        mask: Real observations, or None where all are.
    """

    data: dict[str, Tensor]
    mask: Tensor | None


def as_task_data(tasks: Tasks) -> TaskData:
    """Standardises tasks where they carry a scaling and joins their observations and constants."""
    scaled = tasks.scaled()
    return TaskData({**scaled.data, **scaled.constants}, scaled.mask)


def one_task(batch: TaskData, index: int = 0) -> TaskData:
    """One task of a batch."""
    mask = None if batch.mask is None else batch.mask[index]
    return TaskData({k: v[index] for k, v in batch.data.items()}, mask)


def take_tasks(batch: TaskData, rows: Tensor | slice) -> TaskData:
    """Some tasks of a batch."""
    mask = None if batch.mask is None else batch.mask[rows]
    return TaskData({name: value[rows] for name, value in batch.data.items()}, mask)


def even_parts(num_tasks: int, chunk_size: int) -> list[Tensor]:
    """Positions of at most so many tasks at a time, in parts of one size, so that one recording serves all.

    The last part is filled up with the first tasks again: what comes after `num_tasks` is to be dropped.
    """
    count = -(-num_tasks // chunk_size)
    size = -(-num_tasks // max(count, 1))
    return [torch.arange(part * size, (part + 1) * size) % num_tasks for part in range(count)]


@dataclass(frozen=True)
class Adapter:
    """An inference algorithm bound to a task density, for a batch of T tasks at once.

    Attributes:
        density: Log density of a task.
        inference: The algorithm.
        start: Where particles start, "free" or "prior".
        first_order: Whether outer gradients stop at the scores.
        randomness: Whether tasks share the draws that adaptation makes ("same": a task's result does not depend on the
            others), or have their own ("different": results of tasks are independent).
        mode: How a step, and each density, runs: "eager", "recorded" as a graph of tensor operations when it is
            first called with a layout of arguments, or "compiled" from that; see `bmaml_ppl.compile`.
        memory: What the unrolled loop keeps for the outer gradient.
    """

    density: Density
    inference: Inference
    start: Start
    first_order: bool = False
    mode: Mode = "eager"
    memory: Memory = Memory()
    randomness: Literal["same", "different"] = "same"

    def __post_init__(self) -> None:
        for name in _RECORDED:
            function = getattr(self, name)
            object.__setattr__(self, name, function if self.mode == "eager" else Recorded(function, self.mode))

    def steps(self) -> dict[str, Recorded]:
        """What is recorded, by the name of the function; empty where all is eager."""
        return {name: step for name in _RECORDED if isinstance(step := getattr(self, name), Recorded)}

    def begin(self, prior: Tensors, tasks: TaskData) -> Any:
        """Each task's state before the first step; draws come from torch's generator, see `randomness`."""
        state = self._begin(dict(prior), tasks)
        if self.start == "prior" and self.inference.prepare is not None:
            state = self._prepare(state, dict(prior), tasks)
        return state

    def run(self, state: Any, prior: Tensors, tasks: TaskData, num_steps: int) -> Any:
        """Each task's state after so many steps more."""

        def step(state: Any, prior: Tensors) -> Any:
            return self._update(state, dict(prior), tasks)

        return self.memory.run(step, state, prior, num_steps)

    def adapt(self, prior: Tensors, tasks: TaskData, num_steps: int | None = None) -> Any:
        """Each task's state after adaptation, measured."""
        steps = self.inference.num_steps if num_steps is None else num_steps
        if not self.inference.implicit:
            state = self._run_from_start(prior, tasks, max(steps - self.inference.num_draws, 0))
            state = self._collect(state, prior, tasks, min(steps, self.inference.num_draws))
            return self.measure(self.settle(state, prior, tasks), prior, tasks)
        with torch.no_grad():
            state = self._run_to_optimum(self.begin(prior, tasks), prior, tasks, steps)
            state = self.settle(state, prior, tasks)
        return self.measure(self._differentiate(state, prior, tasks), prior, tasks)

    def _run_from_start(self, prior: Tensors, tasks: TaskData, num_steps: int) -> Any:
        """Each task's state after its first steps. A start that tasks share is not copied: what the first step computes
        of it alone is computed once."""
        if self.start == "prior" or num_steps == 0 or self.memory != Memory():
            return self.run(self.begin(prior, tasks), prior, tasks, num_steps)
        return self.run(self._first(dict(prior), tasks), prior, tasks, num_steps - 1)

    def _collect(self, state: Any, prior: Tensors, tasks: TaskData, num_steps: int) -> Any:
        """Each task's state after so many steps more, all of them kept."""
        if self.inference.visit is None or self.inference.collect is None:
            return state
        visits = []
        for _ in range(num_steps):
            state = self.run(state, prior, tasks, 1)
            visits.append(self.inference.visit(state))
        return vmap(self.inference.collect)(state, tree_map(lambda *steps: torch.stack(steps, 1), *visits))

    def _run_to_optimum(self, state: Any, prior: Tensors, tasks: TaskData, num_steps: int) -> Any:
        """Each task's state after so many steps more, or after fewer where none of them moves any more."""
        for _ in range(num_steps):
            before, state = state.particles, self.run(state, prior, tasks, 1)
            # A Newton step this short leaves an error of its square, far below rounding error.
            still = torch.finfo(before.dtype).eps ** (2 / 3)
            if bool(((state.particles - before).abs() <= still * (1 + before.abs())).all()):
                break
        return state

    def settle(self, state: Any, prior: Tensors, tasks: TaskData) -> Any:
        """Each task's state after what the inference does with particles that went astray."""
        if self.inference.settle is None:
            return state
        return self._settle(state, dict(prior), tasks)

    def measure(self, state: Any, prior: Tensors, tasks: TaskData) -> Any:
        """Each task's state with what the inference measures of the density where its particles are."""
        if self.inference.measure is None:
            return state
        return self._measure(state, dict(prior), tasks)

    def _differentiate(self, state: Any, prior: Tensors, tasks: TaskData) -> Any:
        """The same optima, as functions of the prior."""
        if not torch.is_grad_enabled():
            return state
        optimum = state.particles.detach()
        fixed = {name: value.detach() for name, value in prior.items()}

        def solve(v: Tensor) -> Tensor:
            if optimum.shape[-1] <= _DENSE_LIMIT:
                # A singular Hessian gives non-finite gradients, and the outer loop stops at its last good prior.
                return torch.linalg.solve_ex(self._hessian(optimum, fixed, tasks), v.unsqueeze(-1)).result.squeeze(-1)
            precision = getattr(self.measure(state, fixed, tasks), "precision", None)
            return conjugate_gradients(
                lambda v: self._multiply(optimum, v, fixed, tasks),
                v,
                (lambda v: v) if precision is None else lambda v: _solve(precision, v),
            )

        score = self._score(optimum, dict(prior), tasks)
        if not score.requires_grad:
            return state
        return state._replace(particles=implicit_optimum(optimum, score, solve))

    def log_joint(self, particles: Tensor, prior: Tensors, tasks: TaskData) -> Tensor:
        """Log joint density of each task at each of its particles: (T, M, D) -> (T, M)."""
        return self._log_joint(particles, dict(prior), tasks)

    def log_likelihood(self, particles: Tensor, prior: Tensors, tasks: TaskData) -> Tensor:
        """Log-likelihood of all of a task's observations at each of its particles: (T, M, D) -> (T, M)."""
        return self._log_likelihood(particles, dict(prior), tasks)

    def draw_prior(self, prior: Tensors, tasks: TaskData, num_draws: int) -> Tensor:
        """Reparameterised draws of z from the model's prior, (T, num_draws, D); see `randomness`."""

        def draw(task: TaskData) -> Tensor:
            count = torch.zeros(num_draws, device=next(iter(task.data.values())).device)
            return vmap(lambda _: self.density.draw_prior(prior, task.data), randomness="different")(count)

        return over_tasks(draw, tasks, randomness=self.randomness)

    def draw_unadapted(self, prior: Tensors, tasks: TaskData, num_draws: int) -> Tensor:
        """Draws of z before any observation, (T, num_draws, D): from the model's prior, or from the learned start."""
        if self.start == "prior":
            return self.draw_prior(prior, tasks, num_draws)
        state = self.begin(prior, tasks)
        return vmap(lambda s: self.inference.sample(s, num_draws, None), randomness="same")(state)

    def log_density(self, prior: Tensors, task: TaskData) -> LogDensity:
        """One task's log joint density as a function of z alone."""
        exact = self._bind(prior, task)
        return FirstOrder(exact) if self.first_order else exact

    def _bind(self, prior: Tensors, task: TaskData) -> TaskDensity:
        return TaskDensity(self.density, prior, task.data, task.mask)

    def _begin(self, prior: dict[str, Tensor], tasks: TaskData) -> Any:
        if self.start == "free":
            return over_tasks(lambda task: self.inference.init(prior), tasks)
        drawn = self.draw_prior(prior, tasks, self.inference.num_particles)
        return over_tasks(lambda task, z: self.inference.init({**prior, "particles": z}), tasks, drawn)

    def _prepare(self, state: Any, prior: dict[str, Tensor], tasks: TaskData) -> Any:
        assert self.inference.prepare is not None
        prepare = self.inference.prepare
        return over_tasks(lambda task, s: prepare(s, self.log_density(prior, task)), tasks, state)

    def _settle(self, state: Any, prior: dict[str, Tensor], tasks: TaskData) -> Any:
        assert self.inference.settle is not None
        settle = self.inference.settle
        return over_tasks(lambda task, s: settle(s, self.log_density(prior, task)), tasks, state)

    def _measure(self, state: Any, prior: dict[str, Tensor], tasks: TaskData) -> Any:
        assert self.inference.measure is not None
        measure = self.inference.measure
        return over_tasks(lambda task, s: measure(s, self.log_density(prior, task)), tasks, state)

    def _score(self, particles: Tensor, prior: dict[str, Tensor], tasks: TaskData) -> Tensor:
        def of_task(task: TaskData, z: Tensor) -> Tensor:
            return vmap(grad(self._bind(prior, task)))(z)

        return over_tasks(of_task, tasks, particles)

    def _hessian(self, particles: Tensor, prior: dict[str, Tensor], tasks: TaskData) -> Tensor:
        def of_task(task: TaskData, z: Tensor) -> Tensor:
            exact = self._bind(prior, task)
            return vmap(lambda particle: exact_hessian(exact, particle))(z)

        return over_tasks(of_task, tasks, particles)

    def _multiply(self, particles: Tensor, v: Tensor, prior: dict[str, Tensor], tasks: TaskData) -> Tensor:
        """Products of the negative Hessians with v, (T, M, D)."""

        def of_task(task: TaskData, z: Tensor, v: Tensor) -> Tensor:
            exact = self._bind(prior, task)
            return vmap(lambda particle, w: -vjp(grad(exact), particle)[1](w)[0])(z, v)

        return over_tasks(of_task, tasks, particles, v)

    def _update(self, state: Any, prior: dict[str, Tensor], tasks: TaskData) -> Any:

        def of_task(task: TaskData, state: Any) -> Any:
            return self.inference.update(state, self.log_density(prior, task))

        return over_tasks(of_task, tasks, state, randomness=self.randomness)

    def _first(self, prior: dict[str, Tensor], tasks: TaskData) -> Any:
        """The first step from a free start."""

        def of_task(task: TaskData) -> Any:
            return self.inference.update(self.inference.init(prior), self.log_density(prior, task))

        return over_tasks(of_task, tasks, randomness=self.randomness)

    def _log_joint(self, particles: Tensor, prior: dict[str, Tensor], tasks: TaskData) -> Tensor:
        def of_task(task: TaskData, z: Tensor) -> Tensor:
            return vmap(self._bind(prior, task))(z)

        return over_tasks(of_task, tasks, particles)

    def _log_likelihood(self, particles: Tensor, prior: dict[str, Tensor], tasks: TaskData) -> Tensor:
        def of_task(task: TaskData, z: Tensor) -> Tensor:
            return vmap(self._bind(prior, task).log_likelihood)(z)

        return over_tasks(of_task, tasks, particles)


def _solve(precision: Any, v: Tensor) -> Tensor:
    """H^-1 v for the precision of each task's particles, (T, M, D)."""
    solved: Tensor = vmap(vmap(lambda one, w: one.solve(w)))(precision, v)
    return solved


def over_tasks(
    function: Callable[..., Any],
    tasks: TaskData,
    *batched: Any,
    randomness: Literal["same", "different"] = "same",
    chunk_size: int | None = None,
) -> Any:
    """Maps a function of one task over a batch, with other arguments that have a leading task dimension.

    Args:
        function: Of `TaskData`, then of the others.
        tasks: The batch.
        *batched: The others, nested tensors.
        randomness: Whether tasks share random draws.
        chunk_size: Tasks at a time, None for all.
    """
    # vmap refuses None, so that tasks without a mask are passed without that entry.
    extra = {} if tasks.mask is None else {"mask": tasks.mask}

    def of_task(data: dict[str, Tensor], extra: dict[str, Tensor], *rest: Any) -> Any:
        return function(TaskData(data, extra.get("mask")), *rest)

    return vmap(of_task, randomness=randomness, chunk_size=chunk_size)(tasks.data, extra, *batched)


def check_inference(inference: Inference, density: Density, prior: Tensors, task: TaskData) -> None:
    """Raises ValueError where an inference would be wrong for the model, looking at one task."""
    if inference.check is not None:
        like = next(value for value in (*prior.values(), *task.data.values()) if value.is_floating_point())
        z = 0.3 * torch.cos(torch.arange(density.dim, device=like.device) + 0.5).to(like)
        inference.check(TaskDensity(density, prior, task.data, task.mask), z)


def resolve_start(inference: Inference, density: Density, task: TaskData) -> Start:
    """Chooses the start for "auto": "prior" where the prior of a latent depends on a meta-parameter and can
    be drawn from, else "free"."""
    if inference.start not in ("auto", "free", "prior"):
        raise ValueError(f'init={inference.start!r} is not known; choose "auto", "free" or "prior"')
    if inference.start != "auto":
        return inference.start
    if not _prior_is_learned(density, task.data):
        return "free"
    return "prior" if _can_draw(density, task.data) else "free"


def _prior_is_learned(density: Density, data: Mapping[str, Tensor]) -> bool:
    if not density.prior:
        return False
    leaves = {k: v.detach().requires_grad_() for k, v in density.prior.items()}
    z = next(iter(leaves.values())).new_full((density.dim,), 0.1)
    log_prior = density.log_prior(z, leaves, data)
    if not log_prior.requires_grad:
        return False
    grads = torch.autograd.grad(log_prior, list(leaves.values()), allow_unused=True)
    return any(g is not None for g in grads)


def _can_draw(density: Density, data: Mapping[str, Tensor]) -> bool:
    try:
        with torch.random.fork_rng(devices=[]):
            vmap(lambda _: density.draw_prior(density.prior, data), randomness="different")(torch.zeros(2))
    except RuntimeError:
        return False
    return True
