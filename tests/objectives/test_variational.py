"""The ELBOs of ABML and PLATIPUS against closed forms and naive sums."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import bmaml_ppl as bp
from bmaml_ppl.diagnostics.scores import mixture_log_density
from bmaml_ppl.inference import map_estimate, mean_field, platipus
from bmaml_ppl.objectives import Objective, Rollout, elbo, platipus_loss, query_nll
from bmaml_ppl.types import Inference, Tensors
from tests.toys import bind, finite_differences, level, level_tasks, views_of

F64 = torch.float64
TASKS = level_tasks(3, 6).to(dtype=F64)
LEARNED: dict[str, Any] = {"num_steps": 2, "preconditioner": "none", "step_size": 0.05, "learn_step_size": "scalar"}
LEARNED_MEAN_FIELD = mean_field(**LEARNED)
LEARNED_PLATIPUS = platipus(**LEARNED, rate=0.1)


def rollout_of(inference: Inference, recorded: bool = False, **changed: Tensor) -> Rollout:
    adapter = bind(level, TASKS, inference, "prior", recorded=recorded)
    params = {**adapter.density.prior, **adapter.inference.parameters(1)}
    prior = {name: value.double() for name, value in params.items()} | changed
    return Rollout(adapter, prior, *views_of(TASKS, 3))


def log_likelihood(a: Tensor, noise: Tensor, y: Tensor) -> Tensor:
    """Of each task's observations at each of its levels: (T, M) and (T, N) -> (T, M)."""
    return Normal(a.unsqueeze(-1), noise).log_prob(y.unsqueeze(1)).sum(-1)


def log_marginal(prior: Tensors, y: Tensor) -> Tensor:
    num = y.shape[1]
    covariance = prior["noise"] ** 2 * torch.eye(num, dtype=F64) + prior["sd"] ** 2
    return torch.distributions.MultivariateNormal(prior["mean"].expand(num), covariance).log_prob(y)


@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0])
def test_elbo_is_the_likelihood_less_the_divergence(kl_weight: float) -> None:
    rollout = rollout_of(mean_field(num_steps=2, preconditioner="none", step_size=0.05))
    state = rollout.follower
    likelihood = log_likelihood(state.particles[..., 0], rollout.prior["noise"], rollout.everything.data["y"]).mean(1)
    q = Normal(state.loc[:, 0], state.log_scale[:, 0].exp())
    divergence = kl_divergence(q, Normal(rollout.prior["mean"], rollout.prior["sd"]))
    torch.testing.assert_close(elbo(kl_weight)(rollout), -likelihood + kl_weight * divergence)


def test_elbo_of_the_exact_posterior_misses_the_evidence_by_what_the_query_tells() -> None:
    # log p(S, Q) - ELBO is KL(q || p(z | S, Q)), known for a normal level.
    rollout = rollout_of(mean_field(num_steps=2))
    y = rollout.everything.data["y"]
    precision = rollout.prior["sd"] ** -2 + 6 * rollout.prior["noise"] ** -2
    mean = rollout.prior["mean"] * rollout.prior["sd"] ** -2 + y.sum(1) * rollout.prior["noise"] ** -2
    posterior = Normal(mean / precision, precision.rsqrt())
    state = rollout.follower
    gap = kl_divergence(Normal(state.loc[:, 0], state.log_scale[:, 0].exp()), posterior)
    torch.testing.assert_close(elbo()(rollout), gap - log_marginal(rollout.prior, y))


@pytest.mark.parametrize("kl_weight", [1.0, 0.1])
def test_platipus_loss_is_algorithm_1(kl_weight: float) -> None:
    inference = platipus(num_particles=4, num_steps=2, step_size=0.05, preconditioner="none", rate=0.02)
    rollout = rollout_of(
        inference, log_gamma_q=torch.tensor([-3.0], dtype=F64), log_v_q=torch.tensor([-1.0], dtype=F64)
    )
    torch.manual_seed(0)
    loss = platipus_loss(kl_weight)(rollout)
    prior = rollout.prior
    torch.manual_seed(0)
    rollout.adapter.begin(prior, rollout.support)
    noise = rollout.adapter.begin(prior, rollout.query).noise[..., 0]

    def shifted(rate: Tensor, y: Tensor) -> Tensor:
        return prior["mean"] + rate.exp() * (y - prior["mean"]).sum(1) / prior["noise"] ** 2

    support, query = rollout.support.data["y"], rollout.query.data["y"]
    q = Normal(shifted(prior["log_gamma_q"], query), (0.5 * prior["log_v_q"]).exp())
    p = Normal(shifted(prior["log_gamma_p"], support), prior["sd"])
    phi = q.mean[:, None] + q.stddev[:, None] * noise
    for _ in range(2):
        phi = phi + 0.05 * (support[:, None] - phi[..., None]).sum(-1) / prior["noise"] ** 2
    expected = -log_likelihood(phi, prior["noise"], query).mean(1) + kl_weight * kl_divergence(q, p)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("objective", "inference"),
    [
        (elbo(), LEARNED_MEAN_FIELD),
        (platipus_loss(0.5), LEARNED_PLATIPUS),
    ],
)
def test_gradients_are_finite_differences(objective: Objective, inference: Inference, recorded: bool) -> None:
    rollout = rollout_of(inference, recorded)
    names = sorted(rollout.prior)
    shapes = [rollout.prior[name].shape for name in names]

    def loss(values: Tensor) -> Tensor:
        prior = {name: v.reshape(s) for name, v, s in zip(names, values, shapes, strict=True)}
        torch.manual_seed(0)
        return objective(Rollout(rollout.adapter, prior, rollout.support, rollout.query, rollout.everything)).mean()

    at = torch.stack([rollout.prior[name].reshape(()) for name in names]).requires_grad_()
    slopes = torch.autograd.grad(loss(at), at)[0]
    torch.testing.assert_close(slopes, finite_differences(loss, at.detach()), rtol=1e-5, atol=1e-6)
    assert (slopes.abs() > 1e-5).all()


@pytest.mark.parametrize(
    ("objective", "inference", "write"),
    [
        (elbo(), platipus(), "mean_field"),
        (elbo(), map_estimate(), "mean_field"),
        (platipus_loss(), mean_field(), "platipus"),
    ],
)
def test_other_inference_is_refused(objective: Objective, inference: Inference, write: str) -> None:
    with pytest.raises(ValueError, match=write):
        objective(rollout_of(inference))


@pytest.mark.parametrize("make", [elbo, platipus_loss])
def test_negative_weights_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="kl_weight=-1"):
        make(-1)
    assert str(make(0.5) + query_nll()).endswith("query_nll(mixture)")


@pytest.mark.parametrize(
    ("objective", "inference", "slack"),
    [
        (elbo(), mean_field(num_steps=2), 0.02),
        (platipus_loss(), platipus(num_particles=50, num_steps=2, step_size=0.05, preconditioner="none"), 0.05),
    ],
)
def test_both_learn_to_predict(objective: Objective, inference: Inference, slack: float) -> None:
    # Levels have mean 0, sd 1 and noise .5. How much worse than the exact predictive density of the truth, in nats an
    # observation: 150 tasks of three held-out observations leave a standard error of about .02 of that difference.
    prior = bp.meta_learn(
        level,
        level_tasks(200, 6),
        num_support=3,
        inference=inference,
        objective=objective,
        num_steps=200,
        progress=False,
    )
    episode = level_tasks(150, 6, seed=1).split_observations(3)
    posterior = prior.adapt(episode.support)
    found = mixture_log_density(posterior.log_likelihood(episode.query, num_samples=200)["obs"]).mean()
    precision = 1 + 3 / 0.25
    exact = Normal(episode.support.data["y"].sum(1) / 0.25 / precision, (0.25 + 1 / precision) ** 0.5)
    best = exact.log_prob(episode.query.data["y"].mT).mean()
    assert found > best - slack
