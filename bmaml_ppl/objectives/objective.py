"""What an objective is: a weighted sum of losses of tasks' adaptation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bmaml_ppl.adaptation import Adapter, TaskData
from bmaml_ppl.diagnostics.curvature import describe_curvature
from bmaml_ppl.types import Tensors

__all__ = ["Loss", "Objective", "Rollout"]


@dataclass
class Rollout:
    """The adaptation of a batch of T tasks, as far as an objective asks for it.

    Attributes:
        adapter: The inference algorithm bound to the density.
        prior: Meta-parameters, constrained.
        support: Observations that the task adapts to.
        query: Held-out observations.
        everything: Both together.
        states: Each adaptation's end so far, in which an inference may report on itself.
        measured: The same of adapted points measured on other data than they were adapted to.
    """

    adapter: Adapter
    prior: Tensors
    support: TaskData
    query: TaskData
    everything: TaskData
    states: list[Any] = field(default_factory=list)
    measured: list[Any] = field(default_factory=list)

    @cached_property
    def follower(self) -> Any:
        """Each task's state after adaptation to its support set, differentiable."""
        return self.adapt(self.support)

    def adapt(self, view: TaskData, num_steps: int | None = None) -> Any:
        """Each task's state after adaptation to some of its observations, differentiable."""
        self.states.append(self.adapter.adapt(self.prior, view, num_steps))
        return self.states[-1]

    @property
    def repaired(self) -> Tensor:
        """Tasks whose curvature had to be repaired somewhere, (T,)."""
        return self._report([*self.states, *self.measured], "repaired", True)

    @property
    def unconverged(self) -> Tensor:
        """Tasks that stopped short of an optimum in some adaptation that leads to one, (T,)."""
        return self._report(self.states if self.adapter.inference.implicit else [], "converged", False)

    def _report(self, states: list[Any], name: str, value: bool) -> Tensor:
        """Tasks that some state reports to be so."""
        reports: list[Any] = [describe_curvature(state, {}) for state in states if hasattr(state, "repair")]
        like = next(iter(self.support.data.values()))
        none = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        return torch.stack([none, *(report[name] == value for report in reports)]).any(0)


Loss = Callable[[Rollout], Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses of tasks' adaptation; add two, or multiply one by a number.

    Attributes:
        terms: Weight, name and loss of each term.
    """

    terms: tuple[tuple[float, str, Loss], ...] = field(default=())

    def __call__(self, rollout: Rollout) -> Tensor:
        """The loss of each task, (T,)."""
        return torch.stack([weight * loss(rollout) for weight, _, loss in self.terms]).sum(0)

    def __add__(self, other: "Objective") -> "Objective":
        return Objective(self.terms + other.terms)

    def __radd__(self, other: object) -> "Objective":
        # sum() starts at 0.
        return self if other == 0 else NotImplemented

    def __mul__(self, weight: float) -> "Objective":
        return Objective(tuple((weight * w, name, loss) for w, name, loss in self.terms))

    __rmul__ = __mul__

    def __str__(self) -> str:
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for weight, name, _ in self.terms)
