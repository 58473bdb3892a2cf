"""Meta-learning with the defaults, in single precision, of latents that live between bounds."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

import bmaml_ppl as bp
from bmaml_ppl.bijections import bijection
from bmaml_ppl.bounded import Interval, StickBreaking, log_prob_at
from bmaml_ppl.compile import record_graph

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


FAMILIES: dict[str, Any] = {
    "AffineBeta": dist.AffineBeta(
        torch.tensor([2.0, 0.5]), torch.tensor([1.0, 3.0]), torch.tensor(-1.0), torch.tensor([3.0, 0.2])
    ),
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


@pytest.mark.parametrize("z", [-80.0, -30.0, 30.0, 80.0])
def test_tails_of_an_interval_go_on_where_values_have_rounded(z: float) -> None:
    fn = dist.AffineBeta(torch.tensor(0.9), torch.tensor(2.0), torch.tensor(0.0), torch.tensor(6.0))
    x = torch.tensor(z, requires_grad=True)
    transform = bijection(fn.support)
    value = transform(x)
    (slope,) = torch.autograd.grad(log_prob_at(fn, value, x) + transform.log_abs_det_jacobian(x, value), x)
    torch.testing.assert_close(slope, torch.tensor(0.9 if z < 0 else -2.0))


def test_equality_and_shapes() -> None:
    assert Interval(0.0, 1.0) == Interval(torch.tensor(0.0), 1.0)
    assert Interval(0.0, 1.0) != Interval(0.0, 2.0)
    assert StickBreaking() == StickBreaking()
    assert Interval(torch.zeros(3, 1), 1.0).forward_shape((2,)) == (3, 2)
    assert StickBreaking().forward_shape((5, 2)) == (5, 3)


class _Shifted(dist.Normal):
    def log_prob(self, value: Tensor) -> Tensor:
        shifted: Tensor = super().log_prob(value) + 1
        return shifted


NORMALS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "one scale": lambda loc, scale: dist.Normal(loc, scale[0, 0]).to_event(1),
    "one scale a row": lambda loc, scale: dist.Normal(loc, scale[:, :1]).to_event(1),
    "one scale of two dimensions": lambda loc, scale: dist.Normal(loc, scale[0, 0]).to_event(2),
    "rows that differ": lambda loc, scale: dist.Normal(loc, scale[:, :1]).to_event(2),
    "scales that differ": lambda loc, scale: dist.Normal(loc, scale).to_event(1),
    "nothing": lambda loc, scale: dist.Normal(loc[:, :0], scale[0, 0]).to_event(1),
    "no event": lambda loc, scale: dist.Normal(loc, scale[0, 0]),
    "another density": lambda loc, scale: _Shifted(loc, scale[0, 0]).to_event(1),
}


@pytest.mark.parametrize("name", NORMALS)
def test_normals_are_their_own_log_density(name: str) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 5, dtype=torch.float64), 1 + torch.rand(2, 5, dtype=torch.float64)]
    loc, scale = (leaf.requires_grad_() for leaf in leaves)
    fn = NORMALS[name](loc, scale)
    value = torch.randn_like(fn.mean, requires_grad=True)
    found, wanted = log_prob_at(fn, value, value), fn.log_prob(value)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(found.shape, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((weights * x).sum(), (value, loc, scale), retain_graph=True, materialize_grads=True)
        for x in (found, wanted)
    ]
    torch.testing.assert_close(*gradients)


def test_many_coordinates_of_one_scale_are_one_norm() -> None:
    def density(value: Tensor, scale: Tensor) -> list[Tensor]:
        fn = dist.Normal(torch.zeros(1000), scale, validate_args=False).to_event(1)
        return [log_prob_at(fn, value, value)]

    graph = record_graph(density, [torch.zeros(2, 1000), torch.ones(())])
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    large = {node.target.overloadpacket.__name__ for node in calls if node.meta["val"].numel() > 2}
    assert large == {"zeros", "expand", "sub", "pow"}
