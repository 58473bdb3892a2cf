"""Mean-field variational inference: a diagonal Gaussian adapted by gradient steps on the ELBO (ABML's inner loop)."""

from collections.abc import Mapping
from functools import partial
from math import log, pi
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.checks import check_count
from bmaml_ppl.inference.derivatives import FirstOrder, curvature_factor, exact_density, hessians, safe_fraction, scores
from bmaml_ppl.inference.particles import LearnedStepSize, ParticleState, Preconditioner, StepRule, advance
from bmaml_ppl.inference.prior_moments import prior_moments
from bmaml_ppl.types import Inference, LogDensity, SiteLayout, Start, Tensors

__all__ = ["MeanFieldState", "begin", "entropy", "log_prob", "mean_field", "prepare", "sample", "update"]

_SLACK = 0.01
_NATURAL = 0.05


class MeanFieldState(NamedTuple):
    """State of q(z) = N(loc, diag(scale^2)).

    Attributes:
        loc: Mean, (D,).
        log_scale: Log standard deviations, (D,).
        noise: Standard normal draws with which expectations under q are taken, (M, D).
        step_size: Step size, a scalar or (D,).
        second_moment: Decayed mean of the squared gradients of loc and log_scale, (2, D); zero unless adaptive.
        num_updates: Steps taken, a scalar.
    """

    loc: Tensor
    log_scale: Tensor
    noise: Tensor
    step_size: Tensor
    second_moment: Tensor
    num_updates: Tensor

    @property
    def particles(self) -> Tensor:
        """Reparameterised draws from q, (M, D)."""
        return self.loc.unsqueeze(-2) + self.log_scale.exp().unsqueeze(-2) * self.noise


def mean_field(
    *,
    num_particles: int = 10,
    num_steps: int = 5,
    step_size: float | None = None,
    learn_step_size: LearnedStepSize = "none",
    preconditioner: Preconditioner | Literal["natural"] = "auto",
    noise: Literal["auto", "common", "fresh"] = "auto",
    kl_weight: float = 1.0,
    initial_scale: float = 0.1,
    init: Start = "auto",
    sites: Mapping[str, SiteLayout] | None = None,
) -> Inference:
    r"""The diagonal Gaussian q(z) = N(m, diag(s^2)) that climbs the evidence lower bound (Bayes by backprop).

    .. math:: L(m, s) = E_{\epsilon \sim N(0, I)} \log p(m + s \epsilon, D) + \sum_d \log s_d

    Draws :math:`\epsilon` have mean zero and variance one in each coordinate, and for M >= 2 D (even M) no correlation
    either: q is then exact on a Gaussian, with its mean and with s = diag(precision)^{-1/2}. With few particles in
    many dimensions q would learn their noise; there it is drawn anew after each step.

    Args:
        num_particles: M, draws by which expectations are taken; `posterior.draws(S)` draws from q itself.
        num_steps: Adaptation steps n.
        step_size: alpha, of m and of log s; None takes the preconditioner's default, 0.05 for "natural".
        learn_step_size: Whether the step size is meta-learned, and how finely (Meta-SGD: "parameter").
        preconditioner: "none" is plain gradient ascent (ABML), which a prior of standard deviation s needs to be
            shorter than 2 s^2; "natural" takes m in units of s, so that it does not, shortens steps that would lose
            expected log density, and moves log s by alpha at most; "adaptive" scales by a decayed second moment;
            "curvature" takes Newton's step in m and moves s^-2 towards the mean curvature (variational Newton);
            "auto" is "curvature" up to 32 latents, then "adaptive".
        noise: "common" draws stay during adaptation, "fresh" ones come with every step; "auto" is "common" where
            they can be uncorrelated.
        kl_weight: w of the KL divergence from the prior; below 1 the likelihood counts 1 / w times (a cold posterior),
            as with `elbo(kl_weight=w)`.
        initial_scale: Where s starts under a free start, in unconstrained units.
        init: "prior" starts at the model's own prior, q = p(z | theta) (ABML; exact where that is a diagonal normal);
            "free" at a learned mean, the first particle, and a learned `start_log_scale`; "auto" is "prior" where the
            prior of a latent is learned, else "free" with s fixed at its start.
        sites: Layout of z; given by the learner.

    References:
        Ravi and Beatson (2019), Amortized Bayesian Meta-Learning, section 3; Blundell et al. (2015), Weight
        Uncertainty in Neural Networks, section 3.2; Khan et al. (2018), Fast and Scalable Bayesian Deep Learning by
        Weight-Perturbation in Adam, equations 5 and 6, for "curvature".
    """
    config = {
        "num_particles": num_particles,
        "num_steps": num_steps,
        "step_size": step_size,
        "learn_step_size": learn_step_size,
        "preconditioner": preconditioner,
        "noise": noise,
        "kl_weight": kl_weight,
        "initial_scale": initial_scale,
        "init": init,
    }
    check_count("num_particles", num_particles, least=1)
    check_count("num_steps", num_steps, least=0)
    _check(noise, preconditioner, initial_scale=initial_scale, kl_weight=kl_weight)
    natural = preconditioner == "natural"
    if natural and step_size is None:
        step_size = _NATURAL
    rule = StepRule(step_size, learn_step_size, "none" if preconditioner == "natural" else preconditioner, sites)
    return Inference(
        init=partial(begin, rule=rule, initial_scale=initial_scale),
        update=partial(update, rule=rule, noise=noise, natural=natural, kl_weight=kl_weight),
        sample=sample,
        parameters=partial(parameters, rule=rule, initial_scale=initial_scale, start=init),
        name="mean_field",
        config=config,
        num_particles=num_particles,
        num_steps=num_steps,
        start=init,
        prepare=partial(prepare, sites=sites),
        log_prob=log_prob,
    )


def _check(noise: str, preconditioner: str, **positive: float) -> None:
    if noise not in ("auto", "common", "fresh"):
        raise ValueError(f'noise={noise!r} is not known; choose "auto", "common" or "fresh"')
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be positive")
    if preconditioner == "gauss_newton":
        raise ValueError(
            'mean_field(preconditioner="gauss_newton") has no diagonal form; write "curvature" or "adaptive", or use '
            "laplace()"
        )


def parameters(dim: int, *, rule: StepRule, initial_scale: float, start: Start) -> dict[str, Tensor]:
    """The step size where it is learned, and the log scale of a learned start."""
    if start != "free":
        return rule.parameters(dim)
    return {**rule.parameters(dim), "start_log_scale": torch.full((dim,), log(initial_scale))}


def begin(prior: Tensors, *, rule: StepRule, initial_scale: float) -> MeanFieldState:
    """Starts at the first particle with the learned or the given scale; `prepare` moves to the model's prior."""
    start = rule.init(prior)
    loc = start.particles[0]
    log_scale = prior.get("start_log_scale", torch.full_like(loc, log(initial_scale)))
    moments = torch.zeros_like(loc).expand(2, -1)
    noise = _draw_noise(start.particles)
    return MeanFieldState(loc, log_scale, noise, start.step_size, moments, start.num_updates)


def prepare(
    state: MeanFieldState, log_density: LogDensity, *, sites: Mapping[str, SiteLayout] | None
) -> MeanFieldState:
    """Moves q to the model's own prior, which `state.loc` is a draw from."""
    exact = exact_density(log_density)
    if not hasattr(exact, "log_prior"):
        return state
    loc, scale = prior_moments(exact.log_prior, state.loc.unsqueeze(0), sites)
    return state._replace(loc=loc, log_scale=scale.log())


def update(
    state: MeanFieldState,
    log_density: LogDensity,
    *,
    rule: StepRule,
    noise: Literal["auto", "common", "fresh"],
    natural: bool,
    kl_weight: float,
) -> MeanFieldState:
    """One step of q; see `mean_field`."""
    log_density = _temper(log_density, kl_weight)
    score = scores(log_density, state.particles)
    if rule.kind(len(state.loc)) == "curvature":
        moved = _step_newton(state, log_density, score)
    else:
        moved = _step_gradient(state, log_density, score, rule, natural)
    num, dim = state.noise.shape
    if noise == "fresh" or (noise == "auto" and dim > _rank(num)):
        moved = moved._replace(noise=_draw_noise(state.noise))
    return moved


def _temper(log_density: LogDensity, kl_weight: float) -> LogDensity:
    """The log density with its likelihood counted 1 / w times."""
    exact: Any = exact_density(log_density)
    if kl_weight == 1 or not hasattr(exact, "log_likelihood"):
        return log_density

    def tempered(z: Tensor) -> Tensor:
        cold: Tensor = exact.log_prior(z) + exact.log_likelihood(z) / kl_weight
        return cold

    return FirstOrder(tempered) if isinstance(log_density, FirstOrder) else tempered


def _step_gradient(
    state: MeanFieldState, log_density: LogDensity, score: Tensor, rule: StepRule, natural: bool
) -> MeanFieldState:
    """A step along the gradient of the ELBO in loc and log_scale, or that divided by their Fisher information."""
    scale = state.log_scale.exp()
    in_loc, in_scale = score.mean(0), (score * state.noise).mean(0) * scale + 1
    if natural:
        in_loc = in_loc * scale.square()
        in_loc = in_loc * _find_fraction(state, log_density, state.step_size * in_loc)
        # Bounded: a noisy gradient of many weights' log scales would else multiply a scale by ten in one step.
        in_scale = torch.tanh(0.5 * in_scale)
    rows = torch.stack([state.loc, state.log_scale])
    point = ParticleState(rows, state.step_size, state.second_moment, state.num_updates)
    point = advance(rule, point, torch.stack([in_loc, in_scale]))
    loc, log_scale = point.particles
    return state._replace(
        loc=loc, log_scale=log_scale, second_moment=point.second_moment, num_updates=point.num_updates
    )


def _step_newton(state: MeanFieldState, log_density: LogDensity, score: Tensor) -> MeanFieldState:
    """Newton's step in loc with the mean curvature, towards which the precision moves as well."""
    factor = curvature_factor(-hessians(log_density, state.particles).mean(0))
    move = state.step_size * torch.cholesky_solve(score.mean(0).unsqueeze(-1), factor).squeeze(-1)
    share = state.step_size.clamp_max(1.0)
    precision = (1 - share) * (-2 * state.log_scale).exp() + share * factor.square().sum(-1)
    return state._replace(
        loc=state.loc + _find_fraction(state, log_density, move) * move,
        log_scale=-0.5 * precision.log(),
        num_updates=state.num_updates + 1,
    )


def _find_fraction(state: MeanFieldState, log_density: LogDensity, move: Tensor) -> Tensor:
    """How much of a move of loc, (D,), the expected log density under q allows, (1,)."""
    exact, spread = exact_density(log_density), (state.particles - state.loc).detach()

    def expected(loc: Tensor) -> Tensor:
        return vmap(exact)(loc + spread).mean(0)

    return safe_fraction(expected, state.loc.unsqueeze(0), move.unsqueeze(0), _SLACK).squeeze(0)


def _rank(num: int) -> int:
    """How many coordinates of `num` centred draws can be uncorrelated; pairs of opposite signs where it is even."""
    return num // 2 if num % 2 == 0 else num - 1


def _draw_noise(like: Tensor) -> Tensor:
    """Standard normal draws by torch's generator, (M, D), with the moments that `mean_field` promises."""
    num, dim = like.shape
    rows = _rank(num) if num % 2 == 0 else num
    raw = torch.randn(rows, dim, dtype=like.dtype, device=like.device)
    if num == 1:
        return raw
    raw = raw if num % 2 == 0 else raw - raw.mean(0)
    if dim <= _rank(num):
        raw = torch.linalg.qr(raw).Q * rows**0.5
    else:
        size = raw.square().mean(0).sqrt()
        raw = torch.where(size > 0, raw / size, 1.0)  # a draw of exactly zero comes once in millions
    return torch.cat([raw, -raw]) if num % 2 == 0 else raw


def sample(state: MeanFieldState, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws from q, (S, D)."""
    noise = torch.randn(num_samples, len(state.loc), generator=generator, dtype=state.loc.dtype).to(state.loc.device)
    return state.loc + state.log_scale.exp() * noise


def log_prob(state: MeanFieldState, z: Tensor) -> Tensor:
    """Log density of q at z, (D,)."""
    white = (z - state.loc) * (-state.log_scale).exp()
    return -(0.5 * white.square() + state.log_scale).sum() - 0.5 * len(z) * log(2 * pi)


def entropy(log_scale: Tensor) -> Tensor:
    r"""Entropy of a diagonal Gaussian in nats, :math:`\frac12 \sum_d \log 2 \pi e s_d^2`: (..., D) -> (...)."""
    return (log_scale + 0.5 * (1 + log(2 * pi))).sum(-1)
