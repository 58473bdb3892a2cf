"""Splits, scores, averages and processes: what every comparison rests on."""

from dataclasses import replace
from operator import mul

import pytest
import torch

import bmaml_ppl as bp
from bmaml_ppl.baselines import Gaussian
from bmaml_ppl.evaluation import (
    Forecast,
    Row,
    average,
    forecast_gaussian,
    forecast_learned,
    format_table,
    run_jobs,
    score,
    split_tasks,
)
from bmaml_ppl.models import growth_curve
from bmaml_ppl.tasks import Tasks


def _lines(num_tasks: int = 10) -> Tasks:
    time = torch.arange(8.0).expand(num_tasks, 8)
    value = 100 + 5 * torch.randn(num_tasks, 1) + 10 * time + torch.randn(num_tasks, 8)
    return Tasks({"time": time, "value": value}, outputs=("value",))


def test_split_shares_no_task_and_scales_by_the_training_tasks() -> None:
    tasks = _lines()
    split = split_tasks(tasks, 0.7, 3, seed=1)
    assert len(split.train) == 7
    assert not set(split.train.names) & set(split.query.names)
    assert split.support.names == split.query.names
    assert split.support.num_observations.tolist() == [3] * 3
    assert split.query.num_observations.tolist() == [5] * 3
    scaling = split.train.scaling
    assert scaling is not None
    assert split.query.scaling is scaling
    torch.testing.assert_close(scaling.loc["value"], split.train.data["value"].mean())


def test_padding_does_not_count_in_a_score() -> None:
    query = Tasks({"weight": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, mask=torch.tensor([[True, False], [True, True]]))
    mean = torch.tensor([[1.0, torch.nan], [1.0, 1.0]])
    row = score("a", Forecast(mean, mean.expand(100, 2, 2), -mean.square()), query, "weight", 1.0)
    assert (row.rmse, row.nll, row.coverage90) == (0.0, 1.0, 1.0)


def test_forecast_of_a_baseline_is_its_normal() -> None:
    split = split_tasks(_lines(), 0.7, 3, seed=0)
    target = split.query.scaled().data["value"].double()
    forecast = forecast_gaussian(Gaussian(target + 1, torch.full_like(target, 2.0)), split.query, "value")
    expected = torch.distributions.Normal(0.0, 2.0).log_prob(torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(forecast.log_density, expected.expand_as(target))
    assert score("a", forecast, split.query.scaled(), "value", 0.0).rmse == pytest.approx(1.0)


def test_forecast_is_standardised_whatever_the_prior_was_learned_in() -> None:
    # The same affine model in raw and in standardised units: the densities differ by the factor sd alone.
    split = split_tasks(_lines(), 0.7, 3, seed=0)
    scaling = split.train.scaling
    assert scaling is not None
    prior = bp.meta_learn(growth_curve(1), split.train, num_support=3, num_steps=2, device="cpu", progress=False)
    standard = forecast_learned(prior, split.support, split.query, "value", scaling)
    raw = forecast_learned(
        prior, split.support, split.query, "value", replace(scaling, loc=_zeros(scaling.loc), scale=_ones(scaling.loc))
    )
    sd = scaling.scale["value"]
    torch.testing.assert_close(raw.mean, standard.mean * sd + scaling.loc["value"], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(raw.log_density, standard.log_density - sd.log(), rtol=1e-5, atol=1e-5)
    query = split.query.scaled().data["value"]
    kernel = torch.distributions.Normal(standard.draws.mean(0), standard.draws.std(0)).log_prob(query)
    assert (kernel - standard.log_density).abs().mean() < 0.3


def _zeros(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in like.items()}


def _ones(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(value) for name, value in like.items()}


def test_average_and_table() -> None:
    mean = average([Row("a", 1.0, 2.0, 0.8, 3.0), Row("a", 3.0, 4.0, 1.0, 5.0)])
    assert mean == Row("a", 2.0, 3.0, 0.9, 4.0)
    head, line = format_table([mean]).splitlines()
    assert head.split() == ["RMSE", "NLL", "90", "%", "coverage", "seconds"]
    assert line.split() == ["a", "2.000", "3.000", "0.900", "4.0"]


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_give_the_same_results_in_any_number_of_processes(workers: int) -> None:
    assert sorted(run_jobs(mul, [(2, 3), (4, 5), (1, 1)], workers)) == [1, 6, 20]
