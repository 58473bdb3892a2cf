"""Adaptation of the shared prior to one task: the loop that objectives, learners and users share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.density import Density
from bmaml_ppl.inference.derivatives import FirstOrder
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, LogDensity, Start, Tensors

__all__ = ["Adapter", "TaskData", "as_task_data", "one_task", "resolve_start", "seeded"]


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


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators for the block and puts their states back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: it seeds every GPU, and only `device` is put back.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Adapter:
    """An inference algorithm bound to a task density.

    Attributes:
        density: Log density of a task.
        inference: The algorithm.
        start: Where particles start, "free" or "prior".
        first_order: Whether outer gradients stop at the scores.
    """

    density: Density
    inference: Inference
    start: Start
    first_order: bool = False

    def log_density(self, prior: Tensors, task: TaskData) -> LogDensity:
        """The task's log joint density as a function of z alone."""

        def log_density(z: Tensor) -> Tensor:
            return self.density.log_joint(z, prior, task.data, task.mask)

        return FirstOrder(log_density) if self.first_order else log_density

    def begin(self, prior: Tensors, task: TaskData) -> Any:
        """The algorithm's state before the first step; draws with torch's generator if it starts at the prior."""
        if self.start == "free":
            return self.inference.init(prior)
        return self.inference.init({**prior, "particles": self.draw_prior(prior, task)})

    def draw_prior(self, prior: Tensors, task: TaskData, num_draws: int | None = None) -> Tensor:
        """Reparameterised draws of z from the model's prior, (num_draws or M, D)."""
        like = next(iter(task.data.values()))
        count = torch.zeros(num_draws or self.inference.num_particles, device=like.device)
        return vmap(lambda _: self.density.draw_prior(prior, task.data), randomness="different")(count)

    def run(self, state: Any, log_density: LogDensity, num_steps: int) -> Any:
        """Takes steps from a state."""
        for _ in range(num_steps):
            state = self.inference.update(state, log_density)
        return state

    def adapt(self, prior: Tensors, task: TaskData, num_steps: int | None = None) -> Any:
        """The state after adaptation to one task."""
        steps = self.inference.num_steps if num_steps is None else num_steps
        return self.run(self.begin(prior, task), self.log_density(prior, task), steps)


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
