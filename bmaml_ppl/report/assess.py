"""How well a prior adapts: some observations of each task are seen, the rest are predicted and scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bmaml_ppl.diagnostics import scores
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.posterior import Posterior
from bmaml_ppl.tasks import Tasks

__all__ = ["Assessment", "Column", "Rows", "assess", "score_column", "score_tasks"]

Rows = Literal["first", "random"]
"""Which observations of a task are seen."""

MOST_TASKS = 500


@dataclass(frozen=True)
class Column:
    """Predictions of one column of the data, in its units.

    Attributes:
        name: Of the column.
        target: What was observed, (T, N), 0 where nothing was.
        mask: Where something was, (T, N).
        draws: Predictions after adapting, (S, T, N).
        prior_draws: Predictions without any observation of the task, (S, T, N).
    """

    name: str
    target: Tensor
    mask: Tensor
    draws: Tensor
    prior_draws: Tensor

    @property
    def binary(self) -> bool:
        """Whether the column says yes or no."""
        values = self.target[self.mask]
        return bool(((values == 0) | (values == 1)).all()) and bool(((self.draws == 0) | (self.draws == 1)).all())

    @property
    def spread(self) -> float:
        """Standard deviation of what was observed, 1 where it does not vary."""
        return float(self.target[self.mask].std(correction=0)) or 1.0


@dataclass(frozen=True)
class Assessment:
    """Tasks adapted to and predicted.

    Attributes:
        support: What each task adapted to.
        query: What was predicted.
        posterior: Of all tasks.
        columns: Predictions of each output column.
        log_density: Of each predicted observation after adapting, all its columns together, nats in the user's units,
            (T, N); NaN where there is none.
        short: Names of tasks with too few observations to see some and predict others.
        num_given: Tasks that could have been assessed.
    """

    support: Tasks
    query: Tasks
    posterior: Posterior
    columns: tuple[Column, ...]
    log_density: Tensor
    short: tuple[str, ...]
    num_given: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return self.query.names


def assess(
    prior: LearnedPrior,
    tasks: Tasks,
    outputs: Mapping[str, Sequence[str]],
    *,
    num_support: int,
    rows: Rows = "first",
    num_samples: int = 1000,
) -> Assessment:
    """Adapts to some observations of each task and predicts the rest; of very many tasks, 500 evenly spaced ones.

    Args:
        prior: What adapts.
        tasks: In the user's units.
        outputs: Names of the columns of each output key.
        num_support: Observations seen of each task, K.
        rows: Whether the first K rows are seen, or K at random (seed 0).
        num_samples: Draws S.

    Raises:
        ValueError: If no task has more than K observations.
    """
    tasks, short = _choose_long(tasks, num_support)
    num_given = len(tasks)
    if num_given > MOST_TASKS:
        tasks = tasks[torch.linspace(0, num_given - 1, MOST_TASKS, dtype=torch.float64).round().long()]
    generator = torch.Generator().manual_seed(0) if rows == "random" else None
    support, query = tasks.split_observations(num_support, generator)
    posterior = prior.adapt(support)
    draws, before = (source.predict(query, num_samples=num_samples) for source in (posterior, prior))
    columns = [
        column
        for site, key in prior.density.observed.items()
        if key is not None and key in outputs
        for column in _split_columns(outputs[key], query.data[key], query.mask, draws[site], before[site])
    ]
    log_density = _score_density(posterior, query, num_samples)
    return Assessment(support, query, posterior, tuple(columns), log_density, short, num_given)


def _choose_long(tasks: Tasks, num_support: int) -> tuple[Tasks, tuple[str, ...]]:
    enough = (tasks.num_observations > num_support).tolist()
    if not any(enough):
        raise ValueError(
            f"no task has more than {num_support} observations, so none is left to predict; the longest has "
            f"{int(tasks.num_observations.max())}. Write --num-support with a smaller number"
        )
    chosen = tasks[[i for i, long in enumerate(enough) if long]]
    return chosen, tuple(name for name, long in zip(tasks.names, enough, strict=True) if not long)


def _split_columns(
    names: Sequence[str], target: Tensor, mask: Tensor | None, draws: Tensor, before: Tensor
) -> list[Column]:
    real = torch.ones(target.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()

    def take(value: Tensor, lead: int, index: int) -> Tensor:
        return value.cpu().reshape(*value.shape[:lead], -1)[..., index].masked_fill(~real, 0)

    return [
        Column(name, take(target, 2, i), real, take(draws, 3, i), take(before, 3, i)) for i, name in enumerate(names)
    ]


def _score_density(posterior: Posterior, query: Tasks, num_samples: int) -> Tensor:
    """Log density of each observation, (T, N), under the mixture of all draws."""
    values = posterior.log_likelihood(query, num_samples=num_samples).values()
    each = [value.flatten(3).sum(3) if value.ndim > 3 else value for value in values if value.ndim > 2]
    whole = [value for value in values if value.ndim == 2]
    total = torch.zeros(query.mask.shape if query.mask is not None else next(iter(query.data.values())).shape[:2])
    if each:
        total = total + scores.mixture_log_density(torch.stack(each).sum(0)).cpu()
    if whole:  # a site that observes all rows at once: each row gets its share
        shares = scores.mixture_log_density(torch.stack(whole).sum(0)) / query.num_observations
        total = total + shares.cpu().unsqueeze(1)
    return total if query.mask is None else total.masked_fill(~query.mask.cpu(), torch.nan)


def score_column(column: Column, *, before: bool = False) -> dict[str, float]:
    """Scores of one column over all tasks, in its units; see `bmaml_ppl.diagnostics.scores`.

    Args:
        column: What was predicted and observed.
        before: Whether to score the predictions of the prior alone.
    """
    draws, target, mask = column.prior_draws if before else column.draws, column.target, column.mask
    if column.binary:
        probability = draws.mean(0)
        found = {
            "Brier score": scores.brier_score(probability, target.long(), mask),
            "expected calibration error": scores.expected_calibration_error(probability, target.long(), mask),
        }
    else:
        found = {
            "RMSE": scores.rmse(draws.mean(0), target, mask),
            "CRPS": scores.crps(draws, target, mask),
            "interval score (90 %)": scores.interval_score(draws, target, 0.9, mask),
            "coverage of 90 % intervals": scores.coverage(draws, target, 0.9, mask),
            "coverage of 50 % intervals": scores.coverage(draws, target, 0.5, mask),
            "calibration error": scores.calibration_error(draws, target, mask),
        }
    return {name: value.item() for name, value in found.items()}


def score_tasks(found: Assessment) -> Tensor:
    """One number a task to sort by, (T,): its CRPS in standard deviations of the column, mean over columns."""
    each = []
    for column in found.columns:
        values = [
            scores.crps(column.draws[:, i][:, real], column.target[i][real]) for i, real in enumerate(column.mask)
        ]
        each.append(torch.stack(values) / column.spread)
    return torch.stack(each).mean(0)
