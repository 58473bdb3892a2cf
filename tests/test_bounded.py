"""Meta-learning with the defaults, in single precision, of latents that live between bounds."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import bmaml_ppl as bp
from bmaml_ppl.bijections import bijection
from bmaml_ppl.bounded import Interval, StickBreaking, log_prob_at

NUM_TASKS = 30


def _shares(y: Tensor | None = None) -> None:
    concentration = pyro.param("concentration", torch.full((3,), 1.5), constraint=constraints.positive)
    shares = pyro.sample("shares", dist.Dirichlet(concentration))
    with pyro.plate("data", 10 if y is None else len(y)):
        pyro.sample("obs", dist.Categorical(shares), obs=y)


def _rates(y: Tensor | None = None) -> None:
    concentration = pyro.param("concentration", torch.full((2,), 2.0), constraint=constraints.positive)
    rate = pyro.sample("rate", dist.Beta(concentration[0], concentration[1]))
    noise = pyro.sample("noise", dist.HalfCauchy(1.0))
    with pyro.plate("data", 10 if y is None else len(y)):
        pyro.sample("obs", dist.Normal(rate, noise), obs=y)


def _categories() -> Tensor:
    shares = dist.Dirichlet(torch.full((3,), 0.5)).sample((NUM_TASKS,))
    return torch.multinomial(shares, 20, replacement=True).float()


def _noisy_rates() -> Tensor:
    return dist.Beta(0.5, 0.5).sample((NUM_TASKS, 1)) + 0.3 * torch.randn(NUM_TASKS, 20)


@pytest.mark.parametrize(("model", "simulate"), [(_shares, _categories), (_rates, _noisy_rates)])
@pytest.mark.parametrize("seed", [0, 1])
def test_defaults_stay_finite(model: Callable[..., None], simulate: Callable[[], Tensor], seed: int) -> None:
    torch.manual_seed(0)
    tasks = bp.Tasks({"y": simulate()}, outputs=("y",))
    prior = bp.meta_learn(model, tasks, num_support=10, num_steps=30, progress=False, seed=seed)
    assert prior.history.stopped is None
    assert len(prior.history.loss) == 30
    assert torch.tensor(prior.history.loss).isfinite().all()


FAMILIES = {
    "Beta": dist.Beta(torch.tensor([2.0, 0.5]), torch.tensor([1.0, 3.0])),
    "Dirichlet": dist.Dirichlet(torch.tensor([[2.0, 0.5, 1.0], [1.0, 3.0, 0.2]])),
    "Gamma": dist.Gamma(torch.tensor([2.0, 0.5]), torch.tensor([1.0, 3.0])),
    "LogNormal": dist.LogNormal(torch.tensor([2.0, 0.5]), torch.tensor([1.0, 3.0])),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_densities_at_coordinates_are_those_at_values(name: str) -> None:
    fn = FAMILIES[name].expand([2]).to_event(1)
    value = fn.sample()
    x = bijection(fn.support).inv(value)
    torch.testing.assert_close(log_prob_at(fn, value, x), fn.log_prob(value), rtol=1e-4, atol=1e-4)


def test_equality_and_shapes() -> None:
    assert Interval(0.0, 1.0) == Interval(torch.tensor(0.0), 1.0)
    assert Interval(0.0, 1.0) != Interval(0.0, 2.0)
    assert StickBreaking() == StickBreaking()
    assert Interval(torch.zeros(3, 1), 1.0).forward_shape((2,)) == (3, 2)
    assert StickBreaking().forward_shape((5, 2)) == (5, 3)
