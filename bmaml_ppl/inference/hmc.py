"""Hamiltonian Monte Carlo, many chains of many tasks at once: the reference that other posteriors are held against."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import log, pi
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from bmaml_ppl.checks import check_count
from bmaml_ppl.inference import chains
from bmaml_ppl.inference.chains import ChainState
from bmaml_ppl.inference.derivatives import exact_density
from bmaml_ppl.types import Inference, LogDensity, SiteLayout, Start, Tensors

__all__ = ["HMCState", "MassMatrix", "Visit", "Warmup", "begin", "collect", "hmc", "sample", "update", "visit"]

MassMatrix = Literal["auto", "dense", "diagonal", "identity"]

_DENSE_LIMIT = 100
_DIVERGENCE = 1000.0
_POSITIONS = 3.0
_LONGEST = log(3 * pi / 4)
_FIRST_STEP, _WHITE_STEP = 0.1, 0.6
_GAMMA, _T0, _KAPPA = 0.05, 10.0, 0.75


class Warmup(NamedTuple):
    """What the chains of a task have learned together of its density.

    Attributes:
        scale: Factor F of the covariance estimate F F^T, the inverse mass matrix: (D, D) lower, or (D,).
        num_visited: Positions in the current window, a scalar.
        mean: Their mean, (D,).
        scatter: Their centred sum of products, (D, D), or of squares, (D,).
        log_step: Logarithm of the step size in coordinates whitened by F, a scalar.
        log_step_average: Its average over the window, a scalar.
        shortfall: Running mean of how far acceptance is below its target, a scalar.
        anchor: Logarithm of the step size that dual averaging shrinks to, a scalar.
        age: Transitions since the window began, a scalar.
    """

    scale: Tensor
    num_visited: Tensor
    mean: Tensor
    scatter: Tensor
    log_step: Tensor
    log_step_average: Tensor
    shortfall: Tensor
    anchor: Tensor
    age: Tensor


class Visit(NamedTuple):
    """One transition of each of M chains: position, (M, D), and the statistics of `ChainState`, (M,) each."""

    position: Tensor
    log_density: Tensor
    acceptance_rate: Tensor
    energy: Tensor
    diverging: Tensor
    step_size: Tensor


class HMCState(NamedTuple):
    """M chains on their way.

    Attributes:
        particles: Current positions, (M, D).
        num_updates: Transitions so far, a scalar.
        warmup: What they have learned together.
        last: Each chain's last transition.
    """

    particles: Tensor
    num_updates: Tensor
    warmup: Warmup
    last: Visit


@dataclass(frozen=True)
class _Schedule:
    """Warm-up in windows: the covariance is estimated anew in each, twice as long as the one before."""

    num_warmup: int

    @property
    def first(self) -> int:
        """Transitions before the first window."""
        return self.num_warmup * 15 // 100

    @property
    def ends(self) -> list[int]:
        """Transitions after which a window ends."""
        last, width, found = self.num_warmup - self.num_warmup * 20 // 100, max(self.num_warmup // 15, 1), [self.first]
        while found[-1] + 3 * width <= last:
            found.append(found[-1] + width)
            width *= 2
        return [*found[1:], last] if last > found[-1] else found[1:]


def hmc(
    *,
    num_chains: int = 4,
    num_warmup: int = 300,
    num_draws: int = 500,
    num_leapfrog: int = 6,
    target_accept: float = 0.8,
    mass_matrix: MassMatrix = "auto",
    init: Start = "prior",
    sites: Mapping[str, SiteLayout] | None = None,
) -> Inference:
    r"""Hamiltonian Monte Carlo with a step size and a mass matrix adapted during warm-up.

    .. math:: H(z, p) = -\log p(z, D) + \tfrac12 p^T \Sigma p, \quad
        \alpha = \min(1, \exp(H(z, p) - H(z', p')))

    Every transition takes the same number of leapfrog steps, so that chains and tasks run side by side. In
    coordinates whitened by Sigma the simulated time is uniform on (pi/4, 3 pi/4), at which the positions of a Gaussian
    are nearly independent, or as long as the adapted step size allows where that is shorter. The chains of a task
    share what warm-up learns. Outer gradients see the draws as constants, which is what `marginal_nll` needs of
    them; a task's draws do not depend on the tasks it is adapted with.

    Args:
        num_chains: M.
        num_warmup: Transitions that adapt and are dropped.
        num_draws: S, transitions a chain that are kept.
        num_leapfrog: Gradients a transition, but for one.
        target_accept: Mean acceptance that dual averaging aims at, in (0, 1): higher takes shorter steps.
        mass_matrix: "dense" is the inverse covariance, "diagonal" the inverse variances, "identity" neither; "auto" is
            "dense" up to 100 latent coordinates, then "diagonal".
        init: "prior" starts chains at draws from the model's prior, "free" at learned particles.
        sites: Layout of z; given by the learner.

    References:
        Neal (2011), MCMC Using Hamiltonian Dynamics, section 3; Hoffman and Gelman (2014), The No-U-Turn Sampler,
        algorithm 5, for dual averaging; Carpenter et al. (2017), Stan, section 4, for warm-up in windows.
    """
    config = {
        "num_chains": num_chains,
        "num_warmup": num_warmup,
        "num_draws": num_draws,
        "num_leapfrog": num_leapfrog,
        "target_accept": target_accept,
        "mass_matrix": mass_matrix,
        "init": init,
    }
    for name, least in (("num_chains", 1), ("num_warmup", 0), ("num_draws", 1), ("num_leapfrog", 1)):
        check_count(name, config[name], least=least)
    if not 0 < target_accept < 1:
        raise ValueError(f"target_accept={target_accept!r} is a probability in (0, 1); write 0.8")
    if mass_matrix not in get_args(MassMatrix):
        raise ValueError(f"mass_matrix={mass_matrix!r} is not known; choose one of {list(get_args(MassMatrix))}")
    return Inference(
        init=partial(begin, mass_matrix=mass_matrix),
        update=partial(
            update,
            schedule=_Schedule(num_warmup),
            num_leapfrog=num_leapfrog,
            target_accept=target_accept,
            mass_matrix=mass_matrix,
        ),
        sample=sample,
        parameters=lambda dim: {},
        name="hmc",
        config=config,
        num_particles=num_chains,
        num_steps=num_warmup + num_draws,
        start=init,
        num_draws=num_draws,
        visit=visit,
        collect=collect,
    )


def begin(prior: Tensors, *, mass_matrix: MassMatrix) -> HMCState:
    """Chains at `prior["particles"]`, (M, D)."""
    z = prior["particles"].detach()
    zero, of_chains = z.new_zeros(()), z.new_zeros(len(z))
    last = Visit(z, of_chains, of_chains, of_chains, torch.zeros_like(of_chains, dtype=torch.bool), of_chains)
    size = z.shape[1]
    dense = _is_dense(mass_matrix, size)
    scale = torch.eye(size, dtype=z.dtype, device=z.device) if dense else z.new_ones(size)
    return HMCState(z, zero, _begin_window(scale, z.new_tensor(_FIRST_STEP).log()), last)


def _is_dense(mass_matrix: MassMatrix, dim: int) -> bool:
    return mass_matrix == "dense" or (mass_matrix == "auto" and dim <= _DENSE_LIMIT)


def update(
    state: HMCState,
    log_density: LogDensity,
    *,
    schedule: _Schedule,
    num_leapfrog: int,
    target_accept: float,
    mass_matrix: MassMatrix,
) -> HMCState:
    """One transition of every chain, and what warm-up learns of it; see `hmc`."""
    z = state.particles
    time = (pi / 4) * (1 + 2 * torch.rand(len(z), dtype=z.dtype, device=z.device))
    step = torch.minimum(state.warmup.log_step.exp(), time / num_leapfrog)
    momentum = torch.randn(z.shape, dtype=z.dtype, device=z.device)
    chance = torch.rand(len(z), dtype=z.dtype, device=z.device)
    last = _transition(log_density, z, momentum, chance, step.unsqueeze(1), state.warmup.scale, num_leapfrog)
    count = state.num_updates + 1
    warmup = _learn(state.warmup, last, count, schedule, target_accept, learn_mass=mass_matrix != "identity")
    return HMCState(last.position, count, warmup, last)


def _transition(
    log_density: LogDensity, z: Tensor, momentum: Tensor, chance: Tensor, step: Tensor, scale: Tensor, num_leapfrog: int
) -> Visit:
    """Leapfrog steps in whitened coordinates, then Metropolis' choice between both ends."""
    slope = vmap(grad_and_value(exact_density(log_density)))
    score, value = slope(z)
    energy = 0.5 * momentum.square().sum(1) - value
    position, p, before = z, momentum, value
    for _ in range(num_leapfrog):
        p = p + 0.5 * step * _whiten(score, scale)
        position = position + step * _colour(p, scale)
        score, value = slope(position)
        p = p + 0.5 * step * _whiten(score, scale)
    error = 0.5 * p.square().sum(1) - value - energy
    fine = error.isfinite() & position.isfinite().all(1)
    # From a start of zero density every place of positive density is better.
    rate = torch.where(fine, (-error).clamp_max(0.0).exp(), (value.isfinite() & ~energy.isfinite()).to(value))
    accepted = chance < rate
    return Visit(
        torch.where(accepted.unsqueeze(1), position, z).detach(),
        torch.where(accepted, value, before).detach(),
        rate.detach(),
        energy.detach(),
        ~fine | (error > _DIVERGENCE),
        step.squeeze(1).detach(),
    )


def _colour(momentum: Tensor, scale: Tensor) -> Tensor:
    return momentum @ scale.T if scale.ndim == 2 else momentum * scale


def _whiten(score: Tensor, scale: Tensor) -> Tensor:
    return score @ scale if scale.ndim == 2 else score * scale


def _learn(
    warmup: Warmup, last: Visit, count: Tensor, schedule: _Schedule, target_accept: float, learn_mass: bool
) -> Warmup:
    """Dual averaging of the step size, and at the end of each window a new mass matrix; nothing after warm-up."""
    if schedule.num_warmup == 0:
        return warmup
    learned = _average_step(warmup, last.acceptance_rate.mean(), target_accept)
    if learn_mass and schedule.ends:
        ends = torch.tensor(schedule.ends, dtype=count.dtype, device=count.device)
        inside = (count > schedule.first) & (count <= schedule.ends[-1])
        learned = _where(inside, _gather(learned, last.position), learned)
        learned = _where((count == ends).any(), _end_window(learned), learned)
    learned = _where(count == schedule.num_warmup, learned._replace(log_step=learned.log_step_average), learned)
    return _where(count <= schedule.num_warmup, learned, warmup)


def _average_step(warmup: Warmup, acceptance_rate: Tensor, target_accept: float) -> Warmup:
    age = warmup.age + 1
    weight = 1 / (age + _T0)
    shortfall = (1 - weight) * warmup.shortfall + weight * (target_accept - acceptance_rate)
    log_step = (warmup.anchor - age.sqrt() / _GAMMA * shortfall).clamp_max(_LONGEST)
    share = age**-_KAPPA
    average = share * log_step + (1 - share) * warmup.log_step_average
    return warmup._replace(age=age, shortfall=shortfall, log_step=log_step, log_step_average=average)


def _gather(warmup: Warmup, z: Tensor) -> Warmup:
    """Adds the positions of all chains to the window's mean and scatter, by Welford's update."""
    count = warmup.num_visited + len(z)
    shift = z.mean(0) - warmup.mean
    mean = warmup.mean + shift * len(z) / count
    centred = z - z.mean(0)
    between = warmup.num_visited * len(z) / count
    if warmup.scatter.ndim == 2:
        scatter = warmup.scatter + centred.T @ centred + between * shift.unsqueeze(1) * shift
    else:
        scatter = warmup.scatter + centred.square().sum(0) + between * shift.square()
    return warmup._replace(num_visited=count, mean=mean, scatter=scatter)


def _end_window(warmup: Warmup) -> Warmup:
    """Takes the window's covariance, shrunk toward a small multiple of I as Stan does, and begins the next.

    In a window of few positions correlations count for less: without that, directions in which chains happened not to
    move would never be moved in again.
    """
    count = warmup.num_visited.clamp_min(2.0)
    covariance = warmup.scatter / (count - 1) * count / (count + 5)
    ridge = 1e-3 * 5 / (count + 5)
    if covariance.ndim == 2:
        eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        trust = count / (count + _POSITIONS * len(covariance))
        scale = torch.linalg.cholesky_ex(covariance * (trust + (1 - trust) * eye) + ridge * eye).L
    else:
        scale = (covariance + ridge).sqrt()
    # Whitened afresh, the best step is below one whatever it was before.
    return _begin_window(scale, torch.zeros_like(count) + log(_WHITE_STEP))


def _begin_window(scale: Tensor, log_step: Tensor) -> Warmup:
    zero = torch.zeros_like(log_step)
    return Warmup(
        scale=scale,
        num_visited=zero,
        mean=torch.zeros_like(scale[0] if scale.ndim == 2 else scale),
        scatter=torch.zeros_like(scale),
        log_step=log_step,
        log_step_average=log_step,
        shortfall=zero,
        anchor=log_step + log(10),
        age=zero,
    )


def _where(condition: Tensor, left: Warmup, right: Warmup) -> Warmup:
    """Field by field; what both share is left alone."""
    return Warmup(*(a if a is b else torch.where(condition, a, b) for a, b in zip(left, right, strict=True)))


def visit(state: HMCState) -> Visit:
    """What is kept of a transition."""
    return state.last


def collect(state: HMCState, visits: Visit) -> ChainState:
    """Chains from their last transitions, each field of `visits` with a leading S."""
    return ChainState(state.particles, *(value.transpose(0, 1) for value in visits))


def sample(state: Any, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws of the chains, (num_samples, D), see `chains.sample`; of their current positions before they are kept."""
    if isinstance(state, ChainState):
        return chains.sample(state, num_samples, generator)
    index = torch.arange(num_samples, device=state.particles.device) % len(state.particles)
    return state.particles.index_select(0, index)
