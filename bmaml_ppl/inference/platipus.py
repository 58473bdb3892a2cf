"""PLATIPUS: draws from a prior that has seen the support set, each followed by gradient steps on it."""

from collections.abc import Mapping
from functools import partial
from math import log
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from bmaml_ppl.checks import check_count
from bmaml_ppl.inference import point
from bmaml_ppl.inference.derivatives import FirstOrder, exact_density
from bmaml_ppl.inference.particles import LearnedStepSize, ParticleState, Preconditioner, StepRule, resample
from bmaml_ppl.inference.prior_moments import prior_moments
from bmaml_ppl.types import Inference, LogDensity, SiteLayout, Tensors

__all__ = ["PlatipusState", "begin", "platipus", "prepare", "update"]


class PlatipusState(NamedTuple):
    """State of draws from N(center, diag(scale^2)) on their way.

    Attributes:
        particles: Points in unconstrained coordinates, (M, D).
        step_size: Step size, a scalar or (D,).
        second_moment: Decayed mean of squared directions, (M, D); a scalar zero unless adaptive.
        num_updates: Steps taken, a scalar.
        rate: gamma, of the step by which `prepare` moves the prior's mean, (D,).
        center: mu after that step, (D,).
        scale: sigma, (D,).
        noise: What the draws were made of, (M, D).
    """

    particles: Tensor
    step_size: Tensor
    second_moment: Tensor
    num_updates: Tensor
    rate: Tensor
    center: Tensor
    scale: Tensor
    noise: Tensor


def platipus(
    *,
    num_particles: int = 10,
    num_steps: int = 5,
    step_size: float | None = None,
    learn_step_size: LearnedStepSize = "none",
    preconditioner: Preconditioner = "auto",
    rate: float = 1e-3,
    posterior_scale: float = 0.1,
    sites: Mapping[str, SiteLayout] | None = None,
) -> Inference:
    r"""Draws from a prior shifted by the support set, then gradient steps on its likelihood alone.

    .. math::
        \theta_m \sim N(\mu + \gamma_p \odot \nabla \log p(D \mid \mu), \sigma^2), \quad
        \theta_m \leftarrow \theta_m + \alpha \nabla \log p(D \mid \theta_m)

    The prior N(mu, sigma^2) is the model's own, of its latents given its `pyro.param`, so that the model must learn
    the mean and the scale of its latents. Learn it with `platipus_loss()`, which also learns the variance v_q and the
    rate gamma_q of the distribution that training draws from. The steps are few on purpose: many lead to maximum
    likelihood.

    Args:
        num_particles: M, draws.
        num_steps: Gradient steps n.
        step_size: alpha; None takes the preconditioner's default.
        learn_step_size: Whether alpha is meta-learned, and how finely.
        preconditioner: "none" is plain gradient ascent (the paper's), "adaptive" scales by a decayed second moment,
            "curvature" by each draw's own damped Hessian; "auto" is "curvature" up to 32 latents, then "adaptive".
        rate: Where gamma_p and gamma_q start; `log_gamma_p` and `log_gamma_q`, (D,) each, are meta-learned.
        posterior_scale: Where the square root of v_q starts, in unconstrained units; `log_v_q`, (D,), is meta-learned.
        sites: Layout of z; given by the learner.

    Reference:
        Finn, Xu and Levine (2018), Probabilistic Model-Agnostic Meta-Learning, Algorithms 1 and 2.
    """
    config = {
        "num_particles": num_particles,
        "num_steps": num_steps,
        "step_size": step_size,
        "learn_step_size": learn_step_size,
        "preconditioner": preconditioner,
        "rate": rate,
        "posterior_scale": posterior_scale,
    }
    check_count("num_particles", num_particles, least=1)
    check_count("num_steps", num_steps, least=0)
    _check(rate, posterior_scale, preconditioner)
    rule = StepRule(step_size, learn_step_size, preconditioner, sites)
    return Inference(
        init=partial(begin, rule=rule),
        update=partial(update, rule=rule),
        sample=resample,
        parameters=partial(parameters, rule=rule, rate=rate, posterior_scale=posterior_scale),
        name="platipus",
        config=config,
        num_particles=num_particles,
        num_steps=num_steps,
        start="prior",
        prepare=partial(prepare, sites=sites),
    )


def _check(rate: float, posterior_scale: float, preconditioner: str) -> None:
    for name, got in (("rate", rate), ("posterior_scale", posterior_scale)):
        if not got > 0:
            raise ValueError(f"{name}={got!r} must be positive")
    if preconditioner == "gauss_newton":
        raise ValueError(
            'platipus(preconditioner="gauss_newton") has no prior to solve with, since its steps see the likelihood '
            'alone; write "none", "adaptive" or "curvature"'
        )


def parameters(dim: int, *, rule: StepRule, rate: float, posterior_scale: float) -> dict[str, Tensor]:
    """gamma_p, gamma_q and v_q at their start, in logs, and the step size where it is learned."""
    return {
        **rule.parameters(dim),
        "log_gamma_p": torch.full((dim,), log(rate)),
        "log_gamma_q": torch.full((dim,), log(rate)),
        "log_v_q": torch.full((dim,), 2 * log(posterior_scale)),
    }


def begin(prior: Tensors, *, rule: StepRule) -> PlatipusState:
    """Starts at draws from the model's prior."""
    start = rule.init(prior)
    zero = torch.zeros_like(start.particles)
    return PlatipusState(*start, prior["log_gamma_p"].exp(), zero[0], zero[0] + 1, start.particles)


def prepare(state: PlatipusState, log_density: LogDensity, *, sites: Mapping[str, SiteLayout] | None) -> PlatipusState:
    """Moves the draws from N(mu, sigma^2) by gamma times the score of the likelihood at mu."""
    exact = exact_density(log_density)
    if not hasattr(exact, "log_prior"):
        return state
    mean, scale = prior_moments(exact.log_prior, state.particles, sites)
    noise = ((state.particles - mean) / scale).detach()
    center = mean + state.rate * grad(_likelihood(log_density))(mean)
    return state._replace(particles=center + scale * noise, center=center, scale=scale, noise=noise)


def update(state: PlatipusState, log_density: LogDensity, *, rule: StepRule) -> PlatipusState:
    """One step of `map_estimate` on the likelihood."""
    now = ParticleState(*state[:4])
    return PlatipusState(*point.update(now, _likelihood(log_density), rule=rule), *state[4:])


def _likelihood(log_density: LogDensity) -> LogDensity:
    """The log-likelihood within a log joint density that shows it, else the density itself."""
    exact = exact_density(log_density)
    if not hasattr(exact, "log_likelihood"):
        return log_density
    likelihood: LogDensity = exact.log_likelihood
    return FirstOrder(likelihood) if isinstance(log_density, FirstOrder) else likelihood
