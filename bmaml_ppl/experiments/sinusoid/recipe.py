"""What a method of the study is: its model, how it learns and how it adapts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bmaml_ppl.datasets.sinusoid import SinusoidTasks, sinusoid
from bmaml_ppl.objectives import Objective
from bmaml_ppl.types import Inference, Model

__all__ = ["Recipe", "make_optimizer"]


@dataclass(frozen=True)
class Recipe:
    """One method.

    Attributes:
        title: Its name in tables.
        model: Makes the Pyro model of one task.
        inference: Adaptation in training, by K.
        objective: What is minimised.
        num_steps: Meta-steps.
        batch_size: Tasks a meta-step.
        rate: Of Adam.
        schedule: "cosine" to zero, or "released": times .98 at each hundredth of the run.
        num_points: Observations of a training task, by K.
        num_support: Of these, how many a training task adapts to, by K; None is K.
        shares_shots: Whether one prior serves every K.
        first_order: Whether gradients stop at the scores.
        max_grad_norm: Longer meta-gradients are shortened to it.
        at_test: Adaptation after training; None is that of training.
        num_draws: Of each posterior; None takes each particle once.
        prior_of: Key of the recipe whose prior it adapts; None learns its own.
        draw_tasks: Of training.
    """

    title: str
    model: Callable[[], Model]
    inference: Callable[[int], Inference]
    objective: Objective
    num_steps: int = 6_000
    batch_size: int = 10
    rate: float = 3e-3
    schedule: str = "cosine"
    num_points: Callable[[int], int] = lambda shots: 2 * shots
    num_support: range | None = None
    shares_shots: bool = False
    first_order: bool = False
    max_grad_norm: float = 10.0
    at_test: Callable[[int], Inference] | None = None
    num_draws: int | None = None
    prior_of: str | None = None
    draw_tasks: Callable[..., SinusoidTasks] = sinusoid

    def describe(self, shots: int) -> dict[str, object]:
        """All that decides the result, as JSON values."""
        test = self.inference if self.at_test is None else self.at_test
        return {
            "model": _describe_model(self.model),
            "inference": [self.inference(shots).name, self.inference(shots).config],
            "objective": str(self.objective),
            "tasks_of": self.draw_tasks.__name__,
            "num_steps": self.num_steps,
            "batch_size": self.batch_size,
            "rate": self.rate,
            "schedule": self.schedule,
            "num_points": self.num_points(shots),
            "num_support": shots if self.num_support is None else [self.num_support.start, self.num_support.stop],
            "first_order": self.first_order,
            "max_grad_norm": self.max_grad_norm,
            "at_test": [test(shots).name, test(shots).config],
        }


def _describe_model(make: Callable[..., Model]) -> object:
    """The factory's name and arguments, as JSON values."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else getattr(value, "__name__", value)

    if not isinstance(make, partial):
        return make.__name__
    return [make.func.__name__, *map(plain, make.args), {name: plain(value) for name, value in make.keywords.items()}]


def make_optimizer(recipe: Recipe) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Makes Adam, whose rate falls as the recipe says."""

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(params, lr=recipe.rate)
        num = max(recipe.num_steps, 1)
        schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num)
        if recipe.schedule == "released":
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(num // 100, 1), 0.98)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer

    return make
