"""What every comparison of methods on held-out observations shares: forecasts, their scores, tables, processes."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bmaml_ppl.baselines import Gaussian
from bmaml_ppl.diagnostics import scores
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.scaling import Scaling
from bmaml_ppl.tasks import Tasks

__all__ = [
    "NUM_DRAWS",
    "Forecast",
    "Row",
    "Split",
    "average",
    "forecast_gaussian",
    "forecast_learned",
    "format_table",
    "run_jobs",
    "score",
    "split_tasks",
]

NUM_DRAWS = 1000
"""Draws of a forecast."""

_Result = TypeVar("_Result")


class Row(NamedTuple):
    """The scores of one method on one split, or their means.

    Attributes:
        method: Its name.
        rmse: Of the predictive mean, in standard deviations of the training tasks' outputs.
        nll: Mean negative log density of a held-out observation, in nats, standardised likewise.
        coverage90: Share of held-out observations inside their central 90 % interval.
        seconds: To fit and predict.
    """

    method: str
    rmse: float
    nll: float
    coverage90: float
    seconds: float


class Forecast(NamedTuple):
    """Predictions of held-out observations in standardised units.

    Attributes:
        mean: (T, N).
        draws: (S, T, N).
        log_density: Of what was observed, (T, N).
        prior: What was learned, or None.
    """

    mean: Tensor
    draws: Tensor
    log_density: Tensor
    prior: LearnedPrior | None = None


class Split(NamedTuple):
    """One split of the tasks: those that train, and the seen and the held-out observations of the others.

    All carry the standardisation of the training tasks.
    """

    train: Tasks
    support: Tasks
    query: Tasks


def split_tasks(tasks: Tasks, fraction: float, num_support: int, seed: int) -> Split:
    """Splits the tasks at random, and the observations of those that do not train.

    Args:
        tasks: All of them.
        fraction: Of the tasks that train.
        num_support: Observations seen of each other task.
        seed: Of both splits.
    """
    train, test = tasks.split(fraction, seed=seed)
    train = train.standardize()
    episode = replace(test, scaling=train.scaling).split_observations(num_support, torch.Generator().manual_seed(seed))
    return Split(train, episode.support, episode.query)


def forecast_gaussian(prediction: Gaussian, query: Tasks, output: str) -> Forecast:
    """The forecast of a classical baseline.

    Args:
        prediction: In standardised units, (T, N).
        query: The held-out observations, with the training tasks' scaling.
        output: The column that is predicted.
    """
    target = query.scaled().data[output].double()
    return Forecast(prediction.mean, prediction.draws(NUM_DRAWS), prediction.log_density(target))


def forecast_learned(
    prior: LearnedPrior,
    support: Tasks,
    query: Tasks,
    output: str,
    scaling: Scaling,
    *,
    linearized: bool = False,
    num_steps: int | None = None,
) -> Forecast:
    """Adapts a learned prior to the support and predicts the query; the model observes the output at site `obs`.

    Args:
        prior: Learned in whatever units.
        support: What each task adapts to.
        query: The held-out observations of the same tasks.
        output: The column that is predicted.
        scaling: The standardisation in whose units the forecast is.
        linearized: Whether the predictive is the linearised one of `laplace`.
        num_steps: Adaptation steps; None takes the inference's own.
    """
    posterior = prior.adapt(support, num_steps=num_steps)
    draws = posterior.predict(query, num_samples=NUM_DRAWS, linearized=linearized)["obs"]
    values = posterior.log_likelihood(query, num_samples=NUM_DRAWS, linearized=linearized)["obs"]
    log_density = scores.mixture_log_density(values)
    draws = scaling.apply({output: draws})[output]
    return Forecast(draws.mean(0), draws, log_density + scaling.scale[output].log(), prior)


def score(method: str, forecast: Forecast, query: Tasks, output: str, seconds: float) -> Row:
    """Scores a forecast of standardised observations.

    Args:
        method: Its name.
        forecast: In standardised units.
        query: What was observed, in standardised units.
        output: The column that was predicted.
        seconds: What the forecast took.
    """
    target = query.data[output].to(forecast.mean)
    mask = torch.ones_like(target, dtype=torch.bool) if query.mask is None else query.mask
    draws = forecast.draws.masked_fill(~mask, 0)
    return Row(
        method=method,
        rmse=scores.rmse(forecast.mean.masked_fill(~mask, 0), target, mask).item(),
        nll=-forecast.log_density[mask].mean().item(),
        coverage90=scores.coverage(draws, target, 0.9, mask).item(),
        seconds=seconds,
    )


def average(rows: Sequence[Row]) -> Row:
    """The mean of one method's rows."""
    numbers = torch.tensor([row[1:] for row in rows], dtype=torch.float64).mean(0).tolist()
    return Row(rows[0].method, *numbers)


def run_jobs(function: Callable[..., _Result], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[_Result]:
    """Results of the function as they come, in any order; one worker stays in this process.

    Args:
        function: Of a module, called with each job's arguments.
        jobs: Arguments.
        workers: Processes side by side.
    """
    if workers == 1:
        yield from (function(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    # One thread each: the tensors are small, and processes would fight for the cores.
    pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from (future.result() for future in as_completed([pool.submit(function, *job) for job in jobs]))
    finally:
        pool.shutdown(cancel_futures=True)


def format_table(rows: Sequence[Row]) -> str:
    """The table as text."""
    width = max(len(row.method) for row in rows)
    lines = [f"{'':{width}}   RMSE     NLL  90 % coverage  seconds"]
    lines += [
        f"{row.method:{width}}  {row.rmse:5.3f}  {row.nll:6.3f}  {row.coverage90:13.3f}  {row.seconds:7.1f}"
        for row in rows
    ]
    return "\n".join(lines)
