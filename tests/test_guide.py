"""Guides made from adapted tasks: their moments, their density, and Pyro's own inference on top of them."""

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Importance, Predictive
from torch import Tensor
from torch.utils._pytree import tree_map

import bmaml_ppl as bp
from bmaml_ppl.density import from_model
from bmaml_ppl.guide import particle_guide
from bmaml_ppl.inference import laplace, svgd
from bmaml_ppl.inference.particles import silverman_width
from bmaml_ppl.types import Model

NUM_SAMPLES = 1500
NOISE = 0.5


def _conjugate(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.param("mean", torch.zeros(()))
    level = pyro.sample("level", dist.Normal(mean, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(level + 0 * x, NOISE), obs=y)


def _line(x: Tensor, y: Tensor | None = None) -> None:
    noise = pyro.param("noise", torch.tensor(0.3), constraint=dist.constraints.positive)
    mean = pyro.param("mean", torch.zeros(2))
    coef = pyro.sample("coef", dist.Normal(mean, 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * x, noise), obs=y)


def _nested(x: Tensor, y: Tensor | None = None) -> None:
    top = pyro.sample("top", dist.Gamma(3.0, 1.0))
    part = pyro.sample("part", dist.Uniform(0.0, top))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(part + 0 * x, 1.0), obs=y)


def _learn(model: Model, num_particles: int = 20) -> bp.LearnedPrior:
    x = torch.linspace(-1, 1, 5).expand(6, 5)
    y = x + torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    inference = svgd(num_particles=num_particles, num_steps=20)
    learn = partial(bp.meta_learn, num_support=2, num_steps=2, compile=False, progress=False, inference=inference)
    return learn(model, bp.Tasks({"x": x, "y": y}, outputs=("y",)))


def test_predictive_agrees_with_ours() -> None:
    prior = _learn(_line)
    posterior = prior.adapt(x=torch.tensor([-1.0, 0.0, 1.0]), y=torch.tensor([0.5, 0.4, -0.2]))
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    ours = posterior.predict(x=x, num_samples=NUM_SAMPLES)["obs"]
    learned = pyro.poutine.substitute(_line, data=posterior.params)
    theirs = Predictive(learned, guide=posterior.as_guide(), num_samples=NUM_SAMPLES)(x=x)
    assert theirs["obs"].shape == ours.shape == (NUM_SAMPLES, 4)
    assert theirs["coef"].squeeze(1).shape == posterior.sites(NUM_SAMPLES)["coef"].shape
    # The mixture keeps the particles' mean and covariance. Eight comparisons at 4.5 standard errors: 6e-5.
    error = (ours.var(0) / NUM_SAMPLES + theirs["obs"].var(0) / NUM_SAMPLES).sqrt()
    assert ((ours.mean(0) - theirs["obs"].mean(0)).abs() < 4.5 * error).all()
    log_ratio = (ours.var(0) / theirs["obs"].var(0)).log().abs()
    assert (log_ratio < 4.5 * math.sqrt(4 / NUM_SAMPLES)).all()


def test_importance_weights_give_the_evidence() -> None:
    prior = _learn(_conjugate)
    x, y = torch.zeros(4), torch.tensor([0.8, 1.1, 0.3, 1.6])
    posterior = prior.adapt(x=x, y=y)
    learned = pyro.poutine.substitute(_conjugate, data=posterior.params)
    sampler = Importance(learned, posterior.as_guide(), num_samples=NUM_SAMPLES).run(x=x, y=y)
    covariance = NOISE**2 * torch.eye(4) + 1
    exact = dist.MultivariateNormal(posterior.params["mean"].expand(4), covariance).log_prob(y)
    weights = torch.stack(list(sampler.log_weights)) if isinstance(sampler.log_weights, list) else sampler.log_weights
    relative = (weights - weights.logsumexp(0) + math.log(NUM_SAMPLES)).exp()
    error = relative.std().item() / math.sqrt(NUM_SAMPLES)
    assert error < 0.05
    assert abs(sampler.get_log_normalizer() - exact) < 4.5 * error  # false-alarm rate 7e-6


def test_density_is_that_of_the_constrained_values_though_supports_depend_on_them() -> None:
    data = {"x": torch.zeros(3), "y": torch.ones(3)}
    density = from_model(_nested, data)
    particles = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) * 0.3
    trace: Any = pyro.poutine.trace(particle_guide(density, {}, particles, data)).get_trace()
    trace.compute_log_prob()
    top, part = (trace.nodes[name]["value"] for name in ("top", "part"))
    assert 0 < part < top
    # top = exp(u), part = top * sigmoid(v): log |d part / d v| = log(part (1 - part / top)).
    assert torch.allclose(trace.nodes["top"]["log_prob"], -top.log())
    assert torch.allclose(trace.nodes["part"]["log_prob"], -(part * (1 - part / top)).log())


def test_mixture_keeps_the_particles_moments() -> None:
    data = {"x": torch.zeros(3), "y": torch.ones(3)}
    density = from_model(_line, data)
    particles = torch.randn(10, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, 0.8], [0.0, 0.5]])
    trace: Any = pyro.poutine.trace(particle_guide(density, density.prior, particles, data)).get_trace()
    mixture = trace.nodes["_z"]["fn"]
    loc = mixture.component_distribution.loc
    covariance = torch.cov(loc.T, correction=0) + mixture.component_distribution.covariance_matrix[0]
    assert torch.allclose(loc.mean(0), particles.mean(0), atol=1e-6)
    assert torch.allclose(covariance, torch.cov(particles.T), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num", [1, 4])
def test_one_point_is_a_point_mass(num: int) -> None:
    data = {"x": torch.zeros(3), "y": torch.ones(3)}
    density = from_model(_line, data)
    particles = torch.tensor([0.25, -1.0]).expand(num, 2)
    guide = particle_guide(density, density.prior, particles, data)
    assert torch.equal(guide(x=data["x"])["coef"], particles[0])
    trace: Any = pyro.poutine.trace(guide).get_trace()
    assert set(trace.stochastic_nodes) == {"coef"}


def test_guide_is_for_one_task() -> None:
    prior = _learn(_conjugate, num_particles=3)
    both = prior.adapt(x=torch.zeros(2, 3), y=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"holds 2; write posterior\['task 0'\].as_guide"):
        both.as_guide()
    assert set(both["task 1"].as_guide()()) == {"level"}


def test_predictive_in_parallel_has_the_moments_of_the_sequential_one() -> None:
    prior = _learn(_conjugate)
    posterior = prior.adapt(x=torch.zeros(3), y=torch.tensor([0.5, 0.4, -0.2]))
    learned = pyro.poutine.substitute(_conjugate, data={"mean": posterior.params["mean"]})
    draws = [
        Predictive(learned, guide=posterior.as_guide(), num_samples=NUM_SAMPLES, parallel=parallel)(x=torch.zeros(4))
        for parallel in (False, True)
    ]
    assert draws[1]["obs"].shape == (NUM_SAMPLES, 4)
    # Five comparisons of means at 4.5 standard errors: 3e-5.
    for one, other in ((draws[0][name], draws[1][name]) for name in ("level", "obs")):
        error = ((one.var(0) + other.var(0)) / NUM_SAMPLES).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() < 4.5 * error).all()


def _plated(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("groups", 2):
        level = pyro.sample("level", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(level.sum(-1, keepdim=True) + 0 * x, NOISE), obs=y)


@pytest.mark.parametrize("parallel", [False, True])
def test_latents_in_a_plate_are_drawn_in_it(parallel: bool) -> None:
    data = {"x": torch.zeros(3), "y": torch.ones(3)}
    density = from_model(_plated, data)
    particles = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    guide = particle_guide(density, density.prior, particles, data)
    drawn = Predictive(guide, num_samples=4, parallel=parallel)()
    assert torch.allclose(drawn["level"].reshape(4, 2), drawn["_z"].reshape(4, 2).exp())
    trace: Any = pyro.poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    assert torch.allclose(trace.nodes["level"]["log_prob"], -trace.nodes["level"]["value"].log())
    assert Predictive(_plated, guide=guide, num_samples=4, parallel=parallel)(x=data["x"])["obs"].shape == (4, 3)


def test_plates_around_the_guide_lie_outside_the_models() -> None:
    data = {"x": torch.zeros(3), "y": torch.ones(3)}
    density = from_model(_plated, data)
    particles = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    guide = particle_guide(density, density.prior, particles, data)
    with pytest.raises(ValueError, match="'level' has 1 plate dim.*such as dim=-2"), pyro.plate("draws", 5, dim=-1):
        guide()


def _laplace_posterior(model: Model, num_particles: int, y: Tensor) -> bp.Posterior:
    x = torch.zeros(4, 3)
    inference = laplace(num_particles=num_particles, num_steps=20, init="free")
    learn = partial(bp.meta_learn, num_support=2, num_steps=1, compile=False, progress=False, inference=inference)
    return learn(model, bp.Tasks({"x": x, "y": x + 1}, outputs=("y",))).adapt(x=torch.zeros(len(y)), y=y)


def test_guide_of_laplace_is_its_gaussian() -> None:
    y = torch.tensor([0.8, 1.1, 0.3, 1.6])
    posterior = _laplace_posterior(_conjugate, 1, y)
    sampler = Importance(posterior.model, posterior.as_guide(), num_samples=30).run(x=torch.zeros(4), y=y)
    mean = posterior.params["mean"].detach()
    exact = dist.MultivariateNormal(mean.expand(4), NOISE**2 * torch.eye(4) + 1).log_prob(y)
    assert torch.allclose(torch.as_tensor(sampler.log_weights), exact.expand(30), atol=1e-4)


def _two_wells(x: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.param("mean", torch.zeros(()))
    place = pyro.sample("place", dist.Normal(mean, 3.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(place**2 + 0 * x, NOISE), obs=y)


def test_guide_of_several_modes_is_their_mixture() -> None:
    posterior = _laplace_posterior(_two_wells, 6, torch.full((3,), 4.0))
    trace: Any = pyro.poutine.trace(posterior.as_guide()).get_trace()
    mixture, z = trace.nodes["_z"]["fn"], torch.linspace(-3, 3, 9).unsqueeze(1)
    state = tree_map(lambda value: value[0], posterior.state)
    log_prob = posterior.inference.log_prob
    assert log_prob is not None
    assert torch.allclose(mixture.log_prob(z), torch.stack([log_prob(state, row) for row in z]), rtol=1e-4, atol=1e-4)
    drawn = mixture.sample((2000,)).squeeze(-1)
    assert 0.9 < drawn.abs().min() < drawn.abs().max() < 3
    share = mixture.mixture_distribution.probs[state.particles[:, 0] > 0].sum()
    assert 0.4 < share < 0.6
    assert abs((drawn > 0).float().mean() - share) < 4.5 * 0.5 / math.sqrt(2000)  # false-alarm rate 7e-6


def test_the_mixture_is_what_smooth_resampling_draws_from() -> None:
    data = {"x": torch.zeros(3), "y": torch.ones(3)}
    density = from_model(_line, data)
    particles = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    trace: Any = pyro.poutine.trace(particle_guide(density, density.prior, particles, data)).get_trace()
    component = trace.nodes["_z"]["fn"].component_distribution
    width = silverman_width(5, 2)
    shrink = math.sqrt((1 - width**2) * 5 / 4)
    assert torch.allclose(component.loc, particles.mean(0) + shrink * (particles - particles.mean(0)))
    assert torch.allclose(component.covariance_matrix[0], width**2 * torch.cov(particles.T), rtol=1e-5)
