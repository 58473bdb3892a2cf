"""What the questions of `check` are asked of, and the form of an answer."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from bmaml_ppl.adaptation import TaskData

if TYPE_CHECKING:
    from bmaml_ppl.posterior import Posterior
    from bmaml_ppl.tasks import Tasks

__all__ = ["Evidence", "Finding", "Level"]

Level = Literal["pass", "warn", "fail", "unknown"]

_SHARE = 0.05
"""Of many tasks some are beyond any limit by chance: a share above this fails, a single one below it warns."""


class Finding(NamedTuple):
    """The answer to one question.

    Attributes:
        name: Of the question.
        level: "pass", "warn", "fail", or "unknown" where it could not be asked.
        value: What was measured, of the worst task, or None.
        limit: What passes, in words.
        reason: What it means, and what to do where it is no pass.
        tasks: Names of the tasks it concerns, the worst first.
    """

    name: str
    level: Level
    value: float | None
    limit: str
    reason: str
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What the questions are asked of.

    Attributes:
        posterior: Adapted tasks.
        query: The same tasks with observations not adapted to, in the user's units, or None.
        num_samples: S, draws.
    """

    posterior: "Posterior"
    query: "Tasks | None"
    num_samples: int

    @cached_property
    def draws(self) -> Tensor:
        """Unconstrained draws, (T, S, D)."""
        return self.posterior.task_first(self.posterior.draws(self.num_samples))

    @cached_property
    def stats(self) -> dict[str, Tensor]:
        """`Posterior.sample_stats`, (T, S) each."""
        return {k: self.posterior.task_first(v) for k, v in self.posterior.sample_stats(self.num_samples).items()}

    @cached_property
    def batch(self) -> TaskData:
        """What was adapted to, as the model sees it."""
        return self.posterior.as_task_data(self.posterior.tasks)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return self.posterior.names

    def worst(self, values: Tensor, beyond: Tensor) -> tuple[str, ...]:
        """Names of the tasks beyond a limit, in falling order of values, (T,) each."""
        order = values.nan_to_num(nan=torch.inf).argsort(descending=True).tolist()
        return tuple(self.names[i] for i in order if beyond[i])

    def grade(
        self, name: str, values: Tensor, warn: float, fail: float, limit: str, reasons: tuple[str, str]
    ) -> Finding:
        """A finding of one number a task, the larger the worse; `reasons` are those of a pass and of the rest."""
        concerned = ~(values <= warn)
        failed = (~(values <= fail)).double().mean() > _SHARE
        level: Level = "fail" if failed else "warn" if concerned.any() else "pass"
        worst = values.nan_to_num(nan=torch.inf).max().item()
        return Finding(name, level, worst, limit, reasons[level != "pass"], self.worst(values, concerned))
