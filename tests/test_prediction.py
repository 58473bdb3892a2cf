"""Predictive draws: their units, their padding, and their independence of the latents."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bmaml_ppl.adaptation import TaskData
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.generators import seeded
from bmaml_ppl.prediction import blank_padding, simulate
from bmaml_ppl.scaling import Scaling

NUM_DRAWS = 20_000


def _model(x: Tensor, y: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    pyro.deterministic("mean", level + 0 * x)
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(level + 0 * x, 1.0), obs=y)


def _log_model(x: Tensor, y: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("log_y", dist.Normal(level + 0 * x, 1.0), obs=None if y is None else y.log())


def _density() -> Density:
    return from_model(_model, {"x": torch.zeros(4), "y": torch.randn(4)})


def test_noise_is_independent_of_latents_from_the_same_seed() -> None:
    # N = D = 1: a shared stream would give noise = z, and a variance of 4 instead of 2.
    with seeded(3, torch.device("cpu")):
        z = torch.randn(1, NUM_DRAWS, 1)
    draws = simulate(_density(), {}, z, TaskData({"x": torch.zeros(1, 1)}, None), None, seed=3)["obs"]
    correlation = torch.corrcoef(torch.stack([z.flatten(), (draws - z).flatten()]))[0, 1]
    assert abs(correlation) < 4.5 / math.sqrt(NUM_DRAWS)  # false-alarm rate 7e-6


def test_observed_sites_come_back_in_the_users_units() -> None:
    z, data = torch.zeros(2, 5, 1), {"x": torch.zeros(2, 4)}
    scaling = Scaling({"y": torch.tensor(10.0)}, {"y": torch.tensor(3.0)})
    raw = simulate(_density(), {}, z, TaskData(data, None), None, seed=0)
    scaled = simulate(_density(), {}, z, TaskData(data, None), scaling, seed=0)
    assert raw["obs"].shape == (2, 5, 4)
    assert torch.equal(scaled["obs"], raw["obs"] * 3 + 10)
    assert torch.equal(scaled["mean"], raw["mean"])


def test_padding_of_observed_sites_is_nan() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    draws = simulate(_density(), {}, torch.zeros(2, 5, 1), TaskData({"x": torch.zeros(2, 3)}, mask), None, seed=0)
    assert torch.equal(draws["obs"].isnan(), ~mask.unsqueeze(1).expand(2, 5, 3))


def test_blank_padding_leaves_other_values_alone() -> None:
    mask = torch.tensor([[True, False]])
    vectors = blank_padding(torch.ones(1, 3, 2, 4), mask)
    assert vectors[:, :, 1].isnan().all()
    assert torch.equal(vectors[:, :, 0], torch.ones(1, 3, 4))
    for value in (torch.ones(1, 3), torch.ones(1, 3, 5), torch.ones(1, 3, 2, dtype=torch.long)):
        assert torch.equal(blank_padding(value, mask), value)


def test_what_was_observed_is_predicted_anew_even_where_it_is_derived() -> None:
    y = torch.tensor([1.0, 2.0, 3.0])
    density = from_model(_log_model, {"x": torch.zeros(3), "y": y})
    assert density.observed == {"log_y": None}
    task = TaskData({"x": torch.zeros(1, 3), "y": y[None]}, None)
    draws = simulate(density, {}, torch.zeros(1, 50, 1), task, None, seed=0)["log_y"]
    assert draws.std(1).min() > 0.3


def test_same_seed_same_draws_and_the_users_generator_is_untouched() -> None:
    density, z, task = _density(), torch.zeros(1, 3, 1), TaskData({"x": torch.zeros(1, 4)}, None)
    before = torch.get_rng_state()
    first, again, other = (simulate(density, {}, z, task, None, seed=s)["obs"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
