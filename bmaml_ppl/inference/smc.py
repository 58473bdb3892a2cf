"""Sequential Monte Carlo from the prior to the posterior: many particles for posteriors of several modes."""

from collections.abc import Callable, Mapping
from functools import partial
from math import log, sqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.checks import check_count
from bmaml_ppl.inference.derivatives import exact_density
from bmaml_ppl.inference.particles import resample
from bmaml_ppl.types import Inference, LogDensity, SiteLayout, Tensors

__all__ = ["SMCState", "begin", "measure", "smc", "update"]

_NUM_HALVINGS = 16
_SHORTEST = 1e-12
_TARGET = 0.25
_JUMPS = 0.1
_PACE = 2.0


class SMCState(NamedTuple):
    """A population on its way from the prior to the posterior.

    Attributes:
        particles: Equally weighted draws from the prior times the likelihood to the power `temperature`, (M, D).
        temperature: 0 for the prior, 1 for the posterior, a scalar.
        log_evidence: Estimate of the log of the evidence so far, a scalar.
        smallest_ess: Smallest effective sample size of a reweighting so far, as a share of M, a scalar.
        acceptance_rate: Mean acceptance of the last moves, a scalar.
        log_scale: Logarithm of the length of moves, relative to differences of particles, a scalar.
        num_updates: Updates so far, a scalar.
    """

    particles: Tensor
    temperature: Tensor
    log_evidence: Tensor
    smallest_ess: Tensor
    acceptance_rate: Tensor
    log_scale: Tensor
    num_updates: Tensor


class _Population(NamedTuple):
    """Particles, (M, D), with their log prior density and log-likelihood, (M,) each."""

    z: Tensor
    log_prior: Tensor
    log_likelihood: Tensor


def smc(
    *,
    num_particles: int = 1000,
    num_steps: int = 40,
    num_moves: int = 8,
    ess_threshold: float = 0.5,
    init: Literal["prior"] = "prior",
    sites: Mapping[str, SiteLayout] | None = None,
) -> Inference:
    r"""Tempered sequential Monte Carlo: a population that starts at the prior and follows it to the posterior.

    .. math:: \pi_t(z) \propto p(z) \, p(D \mid z)^{\beta_t}, \quad 0 = \beta_0 < \beta_1 < \dots \le 1

    Each update raises the temperature as far as the particles' weights keep an effective sample size of
    `ess_threshold` M, resamples them, and moves each particle `num_moves` times by Metropolis' rule along the
    difference of two others, of the other half of the population: moves take the scales and correlations of the
    posterior by themselves, and jump between its modes. It needs no gradient, so that a likelihood of several
    narrow modes is no harm, and a few latents: some 1,000 particles for up to about 10.

    Updates after the temperature has reached 1 only move. Where it has not after the last one, what is left is made up
    for by one reweighting, whose effective sample size `Posterior.diagnostics()` shows: below a few per cent, take
    more steps. Outer gradients see the particles as constants, which is what `marginal_nll` needs of them.

    Args:
        num_particles: M.
        num_steps: Updates.
        num_moves: Metropolis moves of each particle in an update.
        ess_threshold: Effective sample size that a reweighting leaves, as a share of M, in (0, 1).
        init: Particles start at draws from the model's prior; nothing else would be right.
        sites: Layout of z; given by the learner, and not used.

    References:
        Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers, section 3; Jasra, Stephens, Doucet and
        Tsagaris (2011), Inference for Levy-driven stochastic volatility models via adaptive SMC, for the temperatures;
        ter Braak (2006), A Markov Chain Monte Carlo version of the genetic algorithm Differential Evolution, for the
        moves.
    """
    config = {
        "num_particles": num_particles,
        "num_steps": num_steps,
        "num_moves": num_moves,
        "ess_threshold": ess_threshold,
        "init": init,
    }
    check_count("num_particles", num_particles, least=6)
    check_count("num_steps", num_steps, least=0)
    check_count("num_moves", num_moves, least=1)
    if not 0 < ess_threshold < 1:
        raise ValueError(f"ess_threshold={ess_threshold!r} is a share in (0, 1); write 0.5")
    if init != "prior":
        raise ValueError(f'init={init!r} is not possible: smc() follows the prior to the posterior; write init="prior"')
    return Inference(
        init=begin,
        update=partial(update, num_moves=num_moves, ess_threshold=ess_threshold),
        sample=resample,
        parameters=lambda dim: {},
        name="smc",
        config=config,
        num_particles=num_particles,
        num_steps=num_steps,
        start=init,
        measure=measure,
    )


def begin(prior: Tensors) -> SMCState:
    """A population at `prior["particles"]`, (M, D), draws from the model's prior."""
    z = prior["particles"].detach()
    zero = z.new_zeros(())
    scale = zero + log(2.38 / sqrt(2 * z.shape[1]))
    return SMCState(z, zero, zero, torch.ones_like(zero), zero, scale, zero)


def update(state: SMCState, log_density: LogDensity, *, num_moves: int, ess_threshold: float) -> SMCState:
    """One rise of the temperature, a resampling, and moves; see `smc`."""
    evaluate = _read(log_density)
    population = _Population(state.particles, *evaluate(state.particles))
    rise = _find_rise(population.log_likelihood, 1 - state.temperature, ess_threshold)
    population, change, share = _reweight(population, rise)
    temperature = state.temperature + rise
    # Rounded, the last rise could leave it a little below 1 for ever.
    temperature = torch.where(temperature > 1 - 1e-6, torch.ones_like(temperature), temperature)
    rates, log_scale = [], state.log_scale
    for _ in range(num_moves):
        population, rate = _move(population, evaluate, temperature, log_scale)
        log_scale = log_scale + (rate - _TARGET) * _PACE / (1 + state.num_updates).sqrt()
        rates.append(rate)
    return SMCState(
        population.z,
        temperature,
        state.log_evidence + change,
        torch.minimum(state.smallest_ess, share),
        torch.stack(rates).mean(),
        log_scale,
        state.num_updates + 1,
    )


def measure(state: SMCState, log_density: LogDensity) -> SMCState:
    """Reweights by what is left of the likelihood, nothing where the temperature is 1."""
    population = _Population(state.particles, *_read(log_density)(state.particles))
    population, change, share = _reweight(population, 1 - state.temperature)
    return state._replace(
        particles=torch.where(state.temperature < 1, population.z, state.particles),
        temperature=torch.ones_like(state.temperature),
        log_evidence=state.log_evidence + change,
        smallest_ess=torch.minimum(state.smallest_ess, share),
    )


def _read(log_density: LogDensity) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Log prior density and log-likelihood of particles, (M, D) -> (M,) each; a plain function is all likelihood."""
    exact: Any = exact_density(log_density)
    parts = getattr(exact, "log_parts", lambda z: (z.new_zeros(()), exact(z)))

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        log_prior, likelihood = (value.detach() for value in vmap(lambda one: parts(one))(z.detach()))
        return log_prior, torch.nan_to_num(likelihood, nan=-torch.inf, neginf=-torch.inf)

    return evaluate


def _find_rise(log_likelihood: Tensor, most: Tensor, ess_threshold: float) -> Tensor:
    """How far the temperature rises until the effective sample size is at the threshold, by halving its logarithm."""
    goal = ess_threshold * len(log_likelihood)
    low, high = torch.full_like(most, log(_SHORTEST)), most.clamp_min(_SHORTEST).log()
    allowed = _effective_size(most * log_likelihood) >= goal
    for _ in range(_NUM_HALVINGS):
        middle = 0.5 * (low + high)
        fine = _effective_size(middle.exp() * log_likelihood) >= goal
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    return torch.where(allowed, most, torch.minimum(low.exp(), most))


def _effective_size(log_weights: Tensor) -> Tensor:
    weights = (log_weights - log_weights.amax(0)).exp()
    return weights.sum().square() / weights.square().sum()


def _reweight(population: _Population, rise: Tensor) -> tuple[_Population, Tensor, Tensor]:
    """Resamples by the likelihood to the power `rise`.

    Returns:
        The population, the change of the log evidence, and the effective sample size as a share of M.
    """
    log_weights = torch.where(rise > 0, rise * population.log_likelihood, 0.0)
    num = len(log_weights)
    weights = torch.nan_to_num(torch.softmax(log_weights, 0), nan=1 / num)  # of a likelihood that is zero everywhere
    index = _resample_evenly(weights)
    chosen = _Population(*(value.index_select(0, index) for value in population))
    change = log_weights.logsumexp(0) - log(num)
    return chosen, change, torch.nan_to_num(_effective_size(log_weights), nan=0.0) / num


def _resample_evenly(weights: Tensor) -> Tensor:
    """Systematic resampling: positions of M particles, each as often as M times its weight rounded up or down.

    Reference:
        Douc, Cappe and Moulines (2005), Comparison of resampling schemes for particle filtering, section 2.4.
    """
    num = len(weights)
    # A float32 in float64: rounded, sums of weights could give slots to particles of weight zero.
    offset = torch.rand((), dtype=torch.float32, device=weights.device)
    total = weights.double().cumsum(0)
    # Particle i has the slots from ends[i - 1] to before ends[i].
    ends = (num * (total / total[-1]) - offset).ceil().long()
    passed = torch.zeros(num + 1, dtype=ends.dtype, device=ends.device).scatter_add(0, ends, torch.ones_like(ends))
    return passed.cumsum(0)[:num]


def _move(
    population: _Population,
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    temperature: Tensor,
    log_scale: Tensor,
) -> tuple[_Population, Tensor]:
    """A Metropolis move of each half of the population along differences of the other half; and its acceptance."""
    order = torch.rand(len(population.z), device=population.z.device).argsort()
    shuffled = _Population(*(value.index_select(0, order) for value in population))
    half = len(order) // 2
    first, second = (_Population(*(value[rows] for value in shuffled)) for rows in (slice(half), slice(half, None)))
    first, early = _move_half(first, second.z, evaluate, temperature, log_scale)
    second, late = _move_half(second, first.z, evaluate, temperature, log_scale)
    both = _Population(*(torch.cat([a, b]) for a, b in zip(first, second, strict=True)))
    return both, 0.5 * (early + late)


def _move_half(
    population: _Population,
    others: Tensor,
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    temperature: Tensor,
    log_scale: Tensor,
) -> tuple[_Population, Tensor]:
    like, num = population.z, len(population.z)
    chance, jump = torch.rand(2, num, dtype=like.dtype, device=like.device)
    left, right = (len(others) * torch.rand(2, num, device=like.device)).long().clamp_max(len(others) - 1)
    # A whole difference leads from one mode to another.
    length = torch.where(jump < _JUMPS, 1.0, log_scale.exp() * torch.randn(num, dtype=like.dtype, device=like.device))
    difference = others.index_select(0, left) - others.index_select(0, right)
    z = population.z + length.unsqueeze(1) * difference
    proposed = _Population(z, *evaluate(z))
    gain = proposed.log_prior - population.log_prior
    gain = gain + temperature * (proposed.log_likelihood - population.log_likelihood)
    accepted = chance.log() < gain  # NaN is not
    pairs = zip(proposed, population, strict=True)
    moved = (torch.where(accepted.unsqueeze(1) if new.ndim == 2 else accepted, new, old) for new, old in pairs)
    rate = torch.nan_to_num(gain, nan=-torch.inf).clamp_max(0).exp()
    usual = (jump >= _JUMPS).to(rate)
    return _Population(*moved), (rate * usual).sum() / usual.sum().clamp_min(1.0)
