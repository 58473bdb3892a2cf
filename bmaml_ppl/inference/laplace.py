"""Laplace's method: a Gaussian around an optimum, its precision the curvature there (ML-LAPLACE, empirical Bayes)."""

from collections.abc import Mapping
from functools import partial
from math import log, pi
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_map

from bmaml_ppl.checks import check_count
from bmaml_ppl.inference import point
from bmaml_ppl.inference.curvature import Curvature, Form, measure_curvature
from bmaml_ppl.inference.curvature_checks import check_curvature
from bmaml_ppl.inference.derivatives import exact_density
from bmaml_ppl.inference.particles import LearnedStepSize, ParticleState, Preconditioner, StepRule, resample
from bmaml_ppl.inference.precision import mahalanobis
from bmaml_ppl.inference.prior_moments import prior_moments
from bmaml_ppl.types import Inference, LogDensity, SiteLayout, Start

__all__ = ["LaplaceState", "laplace", "log_mass", "log_prob", "measure", "prepare", "sample", "settle"]

_GAUSS_NEWTON_FROM = 64
_SAME_MODE = 1e-2
_NO_MASS = 10.0
"""Nats below the best mode, a latent: a Gaussian that makes up for them is e^10 times as wide in each direction."""


class LaplaceState(NamedTuple):
    """State after adaptation: M modes, each with the precision of a Gaussian around it.

    Attributes:
        point: Where the steps ended; the next step goes on from it.
        precision: One of `bmaml_ppl.inference.precision`, with a leading M on every tensor.
        log_evidence: Laplace's approximation of the log marginal likelihood at each mode, (M,).
        repair: By how much the lowest curvature was raised to be positive definite, relative to its scale, (M,).
        flat: A coordinate of z along which the density does not curve, or -1, (M,).
        decrement: Half the squared Newton decrement, in nats: how far below the optimum each mode is, (M,).
        steepest: The coordinate of z that has most of it, (M,).
    """

    point: ParticleState
    precision: Any
    log_evidence: Tensor
    repair: Tensor
    flat: Tensor
    decrement: Tensor
    steepest: Tensor

    @property
    def particles(self) -> Tensor:
        """The modes, (M, D)."""
        return self.point.particles


def laplace(
    *,
    curvature: Curvature = "auto",
    form: Form = "auto",
    gradient: Literal["implicit", "unrolled"] = "implicit",
    num_particles: int = 1,
    num_steps: int = 20,
    step_size: float | None = None,
    learn_step_size: LearnedStepSize = "none",
    preconditioner: Preconditioner = "auto",
    init: Start = "auto",
    sites: Mapping[str, SiteLayout] | None = None,
) -> Inference:
    r"""The Gaussian N(phi, H^-1) around the adapted point phi, H the curvature of the negative log joint density.

    .. math:: H = -\nabla^2 \log p(D \mid \phi) - \nabla^2 \log p(\phi \mid \theta)

    Exact where the posterior is Gaussian. An H that is not positive definite is repaired (an eigenvalue at or below
    zero becomes its absolute value in dense matrices, entries of the diagonal part elsewhere), and
    `Posterior.diagnostics` says for which tasks and by how much.

    Args:
        curvature: What stands for H. "exact" is the Hessian. "ggn" (generalised Gauss-Newton), "fisher" and
            "empirical_fisher" replace that of the likelihood by J^T J, see `curvature.likelihood_rows`; "diagonal" and
            "kronecker" (K-FAC) keep a part of the Fisher's. "auto" is "exact" up to 128 latent coordinates, else
            "fisher", which for normal, categorical and Poisson observations is the generalised Gauss-Newton matrix.
        form: How a J^T J is kept: "dense" as a D x D matrix, "dual" as its R rows (Woodbury), with the whole D x D
            covariance at hand all the same. "auto" is "dual" above 128 coordinates. "dual" needs a prior whose sites
            of more than 32 coordinates are independent in each coordinate given the smaller sites.
        gradient: How outer gradients see the adapted point: "implicit" by the implicit function theorem, which needs
            a converged optimiser and a prior that is learned in the model; "unrolled" through the steps.
        num_particles: M modes from different starts. Draws choose a mode by its evidence; a mode found several times
            counts once.
        num_steps: Adaptation steps; Newton's need a handful.
        step_size: alpha; None takes the preconditioner's default.
        learn_step_size: Whether the step size is meta-learned; not with implicit gradients.
        preconditioner: "curvature" is Newton's step, "gauss_newton" solves with the Fisher matrix in its dual form,
            "none" and "adaptive" are `map_estimate`'s; "auto" is "curvature" up to 64 coordinates, then
            "gauss_newton".
        init: "free" starts at learned particles, "prior" at the mean of the model's prior (at draws from it for
            several particles); "auto" takes "prior" where the prior of a latent is learned.
        sites: Layout of z; given by the learner.

    References:
        Tierney and Kadane (1986), Accurate Approximations for Posterior Moments and Marginal Densities; MacKay
        (1992), The Evidence Framework; Grant et al. (2018), Recasting Gradient-Based Meta-Learning as Hierarchical
        Bayes, subroutine 4 (ML-LAPLACE); Rajeswaran et al. (2019), Meta-Learning with Implicit Gradients, equation 6.
    """
    config = {
        "curvature": curvature,
        "form": form,
        "gradient": gradient,
        "num_particles": num_particles,
        "num_steps": num_steps,
        "step_size": step_size,
        "learn_step_size": learn_step_size,
        "preconditioner": preconditioner,
        "init": init,
    }
    check_count("num_particles", num_particles, least=1)
    check_count("num_steps", num_steps, least=0)
    _check(curvature, form)
    point.check_gradient(gradient, learn_step_size)
    rule = StepRule(
        step_size,
        learn_step_size,
        preconditioner,
        sites,
        limit=_GAUSS_NEWTON_FROM,
        large="gauss_newton",
        exact=gradient == "implicit",
    )
    return Inference(
        init=rule.init,
        update=partial(update, rule=rule),
        sample=sample,
        parameters=rule.parameters,
        name="laplace",
        config=config,
        num_particles=num_particles,
        num_steps=num_steps,
        start=init,
        prepare=partial(prepare, sites=sites) if num_particles == 1 else None,
        settle=settle if num_particles > 1 else None,
        measure=partial(measure, curvature=curvature, form=form, sites=sites, implicit=gradient == "implicit"),
        log_prob=log_prob,
        check=partial(check_curvature, curvature=curvature, form=form, sites=sites),
        implicit=gradient == "implicit",
    )


def _check(curvature: str, form: str) -> None:
    for name, got, allowed in (
        ("curvature", curvature, ("auto", "exact", "ggn", "fisher", "empirical_fisher", "diagonal", "kronecker")),
        ("form", form, ("auto", "dense", "dual")),
    ):
        if got not in allowed:
            raise ValueError(f"{name}={got!r} is not known; choose one of {list(allowed)}")
    if form == "dual" and curvature in ("exact", "diagonal", "kronecker"):
        raise ValueError(f'form="dual" keeps "ggn", "fisher" or "empirical_fisher", not curvature={curvature!r}')


def prepare(state: ParticleState, log_density: LogDensity, *, sites: Mapping[str, SiteLayout] | None) -> ParticleState:
    """Moves draws from the prior to its mean; exact for a normal prior."""
    exact = exact_density(log_density)
    if not hasattr(exact, "log_prior"):
        return state
    mean, _ = prior_moments(exact.log_prior, state.particles, sites)
    return state._replace(particles=mean.expand(state.particles.shape))


def update(state: Any, log_density: LogDensity, *, rule: StepRule) -> ParticleState:
    """One step of `map_estimate`, Newton's or Gauss-Newton's by default."""
    state = state.point if isinstance(state, LaplaceState) else state
    return point.update(state, log_density, rule=rule)


def settle(state: Any, log_density: LogDensity) -> ParticleState:
    """Particles that ended where the posterior has no mass become copies of the best, a mode that counts once.

    From a start far from every mode, steps may run off to where curvature and gradients are no numbers any more.
    """
    state = state.point if isinstance(state, LaplaceState) else state
    particles = state.particles
    values = vmap(exact_density(log_density))(particles.detach())
    values = torch.where(values.isfinite(), values, -torch.inf)
    lost = values < values.amax() - _NO_MASS * (2 + particles.shape[1])
    return state._replace(particles=torch.where(lost.unsqueeze(1), particles[values.argmax()], particles))


def measure(
    state: Any,
    log_density: LogDensity,
    *,
    curvature: Curvature,
    form: Form,
    sites: Mapping[str, SiteLayout] | None,
    implicit: bool = False,
) -> LaplaceState:
    """The curvature at each particle, differentiable in it and in whatever the density depends on.

    Where gradients are those of an optimum, that of the log density with respect to the particle is zero and is left
    out: near an optimum what is left of it would be multiplied by a derivative that only an optimum has.
    """
    state = state.point if isinstance(state, LaplaceState) else state
    exact = exact_density(log_density)

    def at(z: Tensor) -> tuple[Any, ...]:
        measured = measure_curvature(exact, z, curvature, form, sites)
        score, value = grad_and_value(exact)(z.detach() if implicit else z)
        gain = (score * measured.precision.solve(score)).detach()
        evidence = value + 0.5 * (len(z) * log(2 * pi) - measured.precision.log_det()).to(z)
        flat = measured.flat.to(torch.int64)
        return measured.precision, evidence, measured.repair, flat, 0.5 * gain.sum(), gain.argmax()

    return LaplaceState(state, *vmap(at)(state.particles))


def sample(state: Any, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws, (S, D), from the Gaussians around the modes, chosen by their evidence; before adaptation, particles."""
    if not isinstance(state, LaplaceState):
        return resample(state, num_samples, generator)
    modes, precision = state.particles, state.precision
    size = _first(precision).noise_dim
    noise = torch.randn(num_samples, size, generator=generator, dtype=modes.dtype).to(modes.device)
    if len(modes) == 1:
        return modes + vmap(_first(precision).colour)(noise)
    chosen = _choose(torch.log_softmax(log_mass(state), 0), num_samples, generator)
    drawn = vmap(lambda one, z: z + vmap(one.colour)(noise))(precision, modes)
    index = chosen[None, :, None].expand(1, num_samples, modes.shape[1])
    return drawn.gather(0, index).squeeze(0)


def log_prob(state: LaplaceState, z: Tensor) -> Tensor:
    """Log density of the approximation at one point: (D,) -> scalar."""
    of_modes = vmap(lambda one, mode: 0.5 * (one.log_det().to(z) - mahalanobis(one, z - mode)))
    weighted = torch.log_softmax(log_mass(state), 0) + of_modes(state.precision, state.particles)
    return torch.logsumexp(weighted, 0) - 0.5 * len(z) * log(2 * pi)


def log_mass(state: LaplaceState) -> Tensor:
    """Log evidence of each mode, (M,), shared among those that are the same mode: their sum is the task's.

    A mode whose curvature is no number has none.
    """
    modes = state.particles
    if len(modes) == 1:
        return state.log_evidence
    evidence = state.log_evidence.masked_fill(~state.log_evidence.isfinite(), -torch.inf)
    apart = vmap(lambda one, mode: vmap(lambda other: mahalanobis(one, other - mode))(modes))
    copies = (apart(state.precision, modes).detach() < _SAME_MODE * modes.shape[1]).sum(1)
    return evidence - copies.clamp_min(1).log()


def _choose(log_weights: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Indices in proportion to weights, (S,), stratified and in random order."""
    offset = torch.rand(num_samples, generator=generator, dtype=log_weights.dtype)
    order = torch.randperm(num_samples, generator=generator).to(log_weights.device)
    levels = ((torch.arange(num_samples) + offset) / num_samples).to(log_weights.device)
    edges = log_weights.exp().cumsum(0)
    index = (levels.unsqueeze(1) > edges[:-1]).sum(1)
    return index.index_select(0, order)


def _first(precision: Any) -> Any:
    """The precision of the first mode."""
    return tree_map(lambda value: value[0], precision)
