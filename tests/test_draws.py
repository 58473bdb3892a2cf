"""Draws under nested vmap against each distribution's own sampler."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from bmaml_ppl.density import from_model
from bmaml_ppl.draws import reparameterised
from tests.scenarios import SAMPLED

pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")  # torch's Wishart sampler

NUM_DRAWS = 20_000
CRITICAL = 2.69
"""Two-sample Kolmogorov-Smirnov at p = 1e-6; about 170 comparisons in this file: false alarms 2e-4 a fresh seed."""


def _p(value: float = 0.3) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _weights() -> Tensor:
    return torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


OBSERVED: dict[str, Callable[[], Any]] = {
    "Bernoulli": lambda: dist.Bernoulli(_p()),
    "Bernoulli with logits": lambda: dist.Bernoulli(logits=_p(-1.0)),
    "BetaBinomial": lambda: dist.BetaBinomial(_p(2.0), _p(1.5), 10),
    "Binomial": lambda: dist.Binomial(10, _p()),
    "Categorical": lambda: dist.Categorical(_weights()),
    "DirichletMultinomial": lambda: dist.DirichletMultinomial(5 * _weights(), 7),
    "GammaPoisson": lambda: dist.GammaPoisson(_p(2.0), _p(0.5)),
    "Geometric": lambda: dist.Geometric(_p()),
    "Multinomial": lambda: dist.Multinomial(7, _weights()),
    "NegativeBinomial": lambda: dist.NegativeBinomial(_p(3.0), _p(0.6)),
    "OneHotCategorical": lambda: dist.OneHotCategorical(_weights()),
    "OrderedLogistic": lambda: dist.OrderedLogistic(_p(0.3), torch.tensor([0.0, 1.0], dtype=torch.float64)),
    "Poisson": lambda: dist.Poisson(_p(2.5)),
    "Poisson, large": lambda: dist.Poisson(_p(900.0)),
    "ProjectedNormal": lambda: dist.ProjectedNormal(torch.ones(3, dtype=torch.float64)),
    "ZeroInflatedNegativeBinomial": lambda: dist.ZeroInflatedNegativeBinomial(_p(3.0), gate=_p(), probs=_p()),
    "ZeroInflatedPoisson": lambda: dist.ZeroInflatedPoisson(rate=_p(2.0), gate=_p()),
    "masked": lambda: dist.Poisson(_p(2.0)).mask(torch.tensor(True)),
    "to_event in a plate's shape": lambda: dist.Exponential(_p(2.0)).expand([2, 3]).to_event(1),
}


def draw_nested(fn: Any) -> Tensor:
    """Draws as the outer loop makes them: alike in all tasks, different for each particle; one task's."""

    def of_task(_: Tensor) -> Tensor:
        return vmap(lambda _: reparameterised(fn), randomness="different")(torch.zeros(NUM_DRAWS))

    first, second = vmap(of_task, randomness="same")(torch.zeros(2))
    assert torch.equal(first, second)
    return first


def ks_statistic(a: Tensor, b: Tensor) -> float:
    """sqrt(nm / (n + m)) sup |F_a - F_b| of two samples of the same size."""
    grid = torch.cat([a, b]).sort().values
    ranks = [torch.searchsorted(x.sort().values, grid, right=True).double() / len(x) for x in (a, b)]
    return float((ranks[0] - ranks[1]).abs().max() * (len(a) / 2) ** 0.5)


MISDRAWN = {"LKJ", "LKJCholesky", "Cholesky factors"}
"""Torch's own draws are wrong in three dimensions and more: `test_correlations_have_the_marginals_of_lkj`."""


@pytest.mark.parametrize("name", [name for name in SAMPLED | OBSERVED if name not in MISDRAWN])
def test_draws_have_the_quantiles_of_the_distributions_own_sampler(name: str) -> None:
    fn = (SAMPLED | OBSERVED)[name]()
    with pyro.validation_enabled(False):
        drawn = draw_nested(fn)
    own = fn.sample((NUM_DRAWS,))
    assert drawn.shape == own.shape
    assert drawn.dtype == own.dtype
    assert bool(fn.support.check(drawn).all())
    for ours, theirs in zip(drawn.reshape(NUM_DRAWS, -1).T, own.reshape(NUM_DRAWS, -1).T, strict=True):
        if float(theirs.double().std()) > 1e-12:  # not the fixed entries of a Cholesky factor
            assert ks_statistic(ours.contiguous(), theirs.contiguous()) < CRITICAL


def test_the_statistic_notices_a_shift_of_a_twentieth() -> None:
    a, b = torch.randn(2, NUM_DRAWS, generator=torch.Generator().manual_seed(0))
    assert ks_statistic(a, b) < CRITICAL < ks_statistic(a, b + 0.05)


BATCHED: dict[str, Callable[[Tensor], Any]] = {
    "Bernoulli": dist.Bernoulli,
    "Categorical": lambda p: dist.Categorical(torch.stack([p, 1 - p])),
    "Gamma": lambda p: dist.Gamma(p, 1.0),
    "Geometric": dist.Geometric,
    "LKJCholesky": lambda p: dist.LKJCholesky(3, p),
    "MultivariateNormal": lambda p: dist.MultivariateNormal(p.expand(2), torch.eye(2)),
    "NegativeBinomial": lambda p: dist.NegativeBinomial(3.0, p),
    "Normal": lambda p: dist.Normal(p, 1.0),
    "Poisson": dist.Poisson,
    "StudentT": lambda p: dist.StudentT(4.0, p, 1.0),
    "VonMises": lambda p: dist.VonMises(p, 2.0),
    "ZeroInflatedPoisson": lambda p: dist.ZeroInflatedPoisson(rate=2.0, gate=p),
}


@pytest.mark.parametrize("name", BATCHED)
def test_common_random_numbers_with_parameters_that_differ_by_task(name: str) -> None:
    def of_task(p: Tensor) -> Tensor:
        return vmap(lambda _: reparameterised(BATCHED[name](p)), randomness="different")(torch.zeros(200))

    with pyro.validation_enabled(False):
        first, same, other = vmap(of_task, randomness="same")(torch.tensor([0.3, 0.3, 0.6]))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) > 1


MOMENTS: dict[str, tuple[Callable[[Tensor], Any], float, float]] = {
    "Gamma": (lambda a: dist.Gamma(a, 1.0), 1.0, 1.0),
    "Gamma below one": (lambda a: dist.Gamma(a, 1.0), 0.3, 1.0),
    "Beta": (lambda a: dist.Beta(a, 2.0), 1.5, 2 / 3.5**2),
    "InverseGamma": (lambda a: dist.InverseGamma(a, 1.0), 5.0, -1 / 4**2),
    "LogNormal": (lambda a: dist.LogNormal(a, 0.5), 0.4, torch.tensor(0.4 + 0.125).exp().item()),
    "Wishart": (lambda a: dist.Wishart(a, torch.ones(1, 1, dtype=torch.float64)), 4.0, 1.0),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_gradients_of_draws_are_those_of_the_mean(name: str) -> None:
    build, point, expected = MOMENTS[name]

    def draw(a: Tensor, _: Tensor) -> Tensor:
        return reparameterised(build(a)).sum()

    with pyro.validation_enabled(False):
        slopes = vmap(grad(draw), (None, 0), randomness="different")(_p(point), torch.zeros(100_000))
    # 5 standard errors (false alarm 6e-7 each), and the 0.1 % that `_standard_gamma` owns up to.
    assert abs(slopes.mean() - expected) < 5 * slopes.std() / len(slopes) ** 0.5 + 1e-3 * abs(expected)


def hierarchy(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.param("mean", torch.tensor([1.0, -1.0], dtype=torch.float64))
    rate = pyro.param("rate", torch.tensor(2.0, dtype=torch.float64), constraint=dist.constraints.positive)
    tau = pyro.sample("tau", dist.Gamma(3.0, rate))
    coef = pyro.sample("coef", dist.Normal(mean, tau.rsqrt()).to_event(1))
    pyro.factor("soft", -(coef**2).sum())
    location = pyro.deterministic("location", coef[0] + coef[1] * x)
    with pyro.plate("data", x.shape[0]):
        pyro.sample("count", dist.Poisson(location.exp()), obs=None if y is None else y + 1)
        pyro.sample("obs", dist.Normal(location, 0.1), obs=y)


DATA = {"x": torch.linspace(-1, 1, 4, dtype=torch.float64), "y": torch.zeros(4, dtype=torch.float64)}


def test_prior_draws_follow_the_hierarchy_and_carry_its_gradient() -> None:
    density = from_model(hierarchy, DATA)
    params = density.prior

    def values(params: dict[str, Tensor], _: Tensor) -> Tensor:
        drawn = density.constrain(density.draw_prior(params, DATA), params, DATA)
        return torch.cat([drawn["tau"].reshape(1), drawn["coef"]])

    draws = vmap(values, (None, 0), randomness="different")(params, torch.zeros(NUM_DRAWS))
    error = draws.std(0) / NUM_DRAWS**0.5
    assert bool(((draws.mean(0) - torch.tensor([1.5, 1.0, -1.0])).abs() < 5 * error).all())  # 2e-6 a fresh seed
    slopes = vmap(jacrev(values), (None, 0), randomness="different")(params, torch.zeros(NUM_DRAWS))
    torch.testing.assert_close(slopes["mean"][:, 1:], torch.eye(2).double().expand(NUM_DRAWS, 2, 2))
    slope, error = slopes["rate"][:, 0].mean(), slopes["rate"][:, 0].std() / NUM_DRAWS**0.5
    assert abs(slope + 0.75) < 5 * error  # d/d rate of E tau = 3 / rate


def test_prior_draws_of_tasks_share_their_random_numbers() -> None:
    density = from_model(hierarchy, DATA)
    inputs = torch.stack([DATA["x"], DATA["x"] + 1])

    def of_task(x: Tensor) -> Tensor:
        data = {**DATA, "x": x}
        return vmap(lambda _: density.draw_prior(density.prior, data), randomness="different")(torch.zeros(5))

    first, second = vmap(of_task, randomness="same")(inputs)
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) == 5


@pytest.mark.parametrize("outer", ["same", "different"])
def test_simulations_are_fresh_and_ignore_outputs(outer: str) -> None:
    density = from_model(hierarchy, DATA)
    z = density.unconstrain({"tau": _p(1.0), "coef": torch.tensor([1.0, 0.5]).double()}, density.prior, DATA)

    def of_task(z: Tensor) -> dict[str, Tensor]:
        draw = vmap(lambda _: density.simulate(z, density.prior, DATA), randomness="different")
        return draw(torch.zeros(NUM_DRAWS))

    drawn = vmap(of_task, randomness=outer)(torch.stack([z, z]))
    assert set(drawn) == {"count", "obs", "location"}
    location = 1 + 0.5 * DATA["x"]
    torch.testing.assert_close(drawn["location"][0], location.expand(NUM_DRAWS, 4))
    assert torch.equal(drawn["obs"][0], drawn["obs"][1]) == (outer == "same")
    errors = {"obs": torch.full((4,), 0.1), "count": (location / 2).exp()}
    for site, mean in {"obs": location, "count": location.exp()}.items():
        gap = (drawn[site][0].mean(0) - mean).abs()
        assert bool((gap < 5 * errors[site] / NUM_DRAWS**0.5).all())  # 5e-6 a fresh seed


def test_a_derived_observation_is_drawn_even_where_its_output_is_given() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Normal(a * x, 1.0), obs=None if y is None else y.exp())

    density = from_model(model, DATA)
    first, second = (density.simulate(torch.zeros(1), {}, DATA)["obs"] for _ in range(2))
    assert bool((first != second).all())


def test_initial_particles_take_the_sites_own_start_and_serve_improper_sites() -> None:
    start: Any = {"init": lambda: torch.tensor(7.0)}

    def model(x: Tensor, y: Tensor | None = None) -> None:
        flat = pyro.sample("flat", dist.ImproperUniform(dist.constraints.positive, (), (2,)))
        own = pyro.sample("own", dist.Normal(0.0, 1.0), infer=start)
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Normal(own * x, flat.sum()), obs=y)

    density = from_model(model, DATA)
    particles = density.initial_particles(5, DATA)
    assert particles.shape == (5, 3)
    assert bool(torch.isfinite(particles).all())
    assert len(particles.unique(dim=0)) == 5
    assert particles[:, density.sites["own"].slice].flatten().tolist() == [7.0] * 5


def test_another_distribution_can_be_registered() -> None:
    class Three(dist.Normal):
        """A distribution with a draw of its own."""

    reparameterised.register(Three)(lambda fn: fn.loc + 3)
    assert float(reparameterised(Three(1.0, 1.0))) == 4.0
