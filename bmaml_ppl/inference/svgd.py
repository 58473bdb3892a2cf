"""Stein variational gradient descent, differentiable through every step: the inner loop of Bayesian MAML."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bmaml_ppl.checks import check_count
from bmaml_ppl.inference.derivatives import curvature_factor, hessians, safe_fraction, scores
from bmaml_ppl.inference.kernels import (
    BANDWIDTHS,
    KERNELS,
    Bandwidth,
    Radial,
    Structure,
    moment_direction,
    stein_direction,
)
from bmaml_ppl.inference.particles import (
    LearnedStepSize,
    ParticleState,
    Preconditioner,
    StepRule,
    advance,
    smooth_resample,
)
from bmaml_ppl.types import Inference, LogDensity, SiteLayout, Start

__all__ = ["svgd", "update"]

_SPREAD_CORRECTION = 1.5


def svgd(
    *,
    num_particles: int = 20,
    num_steps: int = 10,
    step_size: float | None = None,
    learn_step_size: LearnedStepSize = "none",
    preconditioner: Preconditioner = "auto",
    kernel: Literal["rbf", "imq"] = "rbf",
    structure: Structure | Literal["auto"] = "auto",
    bandwidth: Bandwidth | Literal["auto"] | float = "auto",
    repulsion: Literal["auto"] | float = "auto",
    init: Start = "auto",
    sites: Mapping[str, SiteLayout] | None = None,
) -> Inference:
    r"""SVGD: particles that climb the log joint density and repel each other.

    .. math:: z_i \leftarrow z_i + \frac{\alpha}{M} \sum_j k(z_j, z_i) \nabla \log p(z_j, D) + \nabla_{z_j} k(z_j, z_i)

    One particle is `map_estimate`. With `preconditioner="curvature"` the step is taken in coordinates
    whitened by the mean Hessian of the particles, in which the posterior is round: a kernel per coordinate
    keeps its spread in many dimensions, a linear kernel its correlations, and the step is normalised by the
    kernel's mass so that it is as long as Newton's.

    Args:
        num_particles: M.
        num_steps: Adaptation steps n (the chaser's follower).
        step_size: alpha; None takes the preconditioner's default.
        learn_step_size: Whether the step size is meta-learned, and how finely (Meta-SGD: "parameter").
        preconditioner: "none", "adaptive" (AdaGrad with decay), "curvature"; "auto" chooses "curvature"
            up to 32 latent coordinates.
        kernel: "rbf" or "imq".
        structure: Which coordinates share a kernel: all ("joint", the papers'), those of a latent site
            ("site", a graphical kernel), none ("coordinate"), or none with a linear kernel added that matches
            covariances ("moments", needs whitening). "auto" is "moments" in whitened coordinates ("coordinate"
            where M <= D + 1) and "site" elsewhere: one bandwidth for all loses the spread as D grows.
        bandwidth: h, a number, or a rule through which no gradient passes: "median", "mean", "released" (the
            BMAML authors' code, needs M > 1). "auto" is 1 in whitened coordinates and "median" elsewhere.
        repulsion: Factor of the repulsive term; 1 is exact, 0.5 reproduces the BMAML authors' code. "auto" is 1,
            and 1 + 1.5 / M in whitened coordinates: a finite number of particles is too narrow by about that
            much, and a Gaussian's variance is then kept within 4 % (M >= 10 and M > D + 1).
        init: "free" starts at learned particles (BMAML's Theta_0), "prior" at draws from the model's own
            prior (Grant's hierarchy); "auto" takes "prior" where the prior of a latent is learned.
        sites: Layout of z; given by the learner.

    References:
        Liu and Wang (2016), Stein Variational Gradient Descent, Algorithm 1; Yoon et al. (2018), Bayesian
        Model-Agnostic Meta-Learning, Algorithm 2; Wang, Tang, Bajaj and Liu (2019), Stein Variational
        Gradient Descent with Matrix-Valued Kernels, for the whitened step.
    """
    config = {
        "num_particles": num_particles,
        "num_steps": num_steps,
        "step_size": step_size,
        "learn_step_size": learn_step_size,
        "preconditioner": preconditioner,
        "kernel": kernel,
        "structure": structure,
        "bandwidth": bandwidth,
        "repulsion": repulsion,
        "init": init,
    }
    check_count("num_particles", num_particles, least=1)
    check_count("num_steps", num_steps, least=0)
    _check(kernel, structure, bandwidth, num_particles)
    if structure == "moments" and preconditioner in ("none", "adaptive"):
        raise ValueError(f'structure="moments" needs preconditioner="curvature", got {preconditioner!r}')
    rule = StepRule(step_size, learn_step_size, preconditioner, sites, newton=1.0 if num_particles == 1 else 0.5)
    return Inference(
        init=rule.init,
        update=partial(
            update, rule=rule, kernel=KERNELS[kernel], structure=structure, bandwidth=bandwidth, repulsion=repulsion
        ),
        sample=smooth_resample,
        parameters=rule.parameters,
        name="svgd",
        config=config,
        num_particles=num_particles,
        num_steps=num_steps,
        start=init,
    )


def update(
    state: ParticleState,
    log_density: LogDensity,
    *,
    rule: StepRule,
    kernel: Radial,
    structure: Structure | Literal["auto"],
    bandwidth: Bandwidth | Literal["auto"] | float,
    repulsion: Literal["auto"] | float,
) -> ParticleState:
    """One step of all particles together; see `svgd`."""
    particles = state.particles
    num, dim = particles.shape
    whiten = rule.kind(dim) == "curvature"
    if structure == "auto":
        structure = ("moments" if num > dim + 1 else "coordinate") if whiten else "site"
    if bandwidth == "auto":
        bandwidth = 1.0 if whiten else "median"
    if repulsion == "auto":
        repulsion = 1 + _SPREAD_CORRECTION / num if whiten else 1.0
    direction = partial(
        stein_direction,
        kernel=kernel,
        bandwidth=BANDWIDTHS[bandwidth] if isinstance(bandwidth, str) else bandwidth,
        repulsion=repulsion,
        blocks={"joint": [slice(0, dim)], "site": rule.blocks(dim)}.get(structure),
    )
    gradient = scores(log_density, particles)
    if not whiten:
        return advance(rule, state, direction(particles, gradient))
    curvature = -hessians(log_density, particles)
    factor = curvature_factor(curvature.mean(0))
    white = particles @ factor
    white_gradient = torch.linalg.solve_triangular(factor, gradient.T, upper=False).T
    white_direction = direction(white, white_gradient, normalise=True)
    if structure == "moments" and num > 1:
        white_direction = white_direction + moment_direction(white, white_gradient)
    white_direction = _shorten_where_sharper(white_direction, curvature, factor)
    newton = torch.linalg.solve_triangular(factor.T, white_direction.T, upper=True).T
    # Repelled from one point, particles may lose this much on their way to the posterior's spread.
    fraction = safe_fraction(log_density, particles, state.step_size * newton, slack=1.0 + 2 * dim)
    return advance(rule, state, newton * fraction)


def _shorten_where_sharper(direction: Tensor, curvature: Tensor, factor: Tensor) -> Tensor:
    """Divides each whitened direction by the mean of the particle's own curvature and the shared one.

    The shared curvature is I here. Where the log density is not quadratic, one particle in a sharp place
    would overshoot by what the others dilute its curvature. Fixed points stay the same.
    """
    half = torch.linalg.solve_triangular(factor, curvature, upper=False)
    own = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    eye = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    return torch.cholesky_solve(direction.unsqueeze(-1), curvature_factor(0.5 * (own + eye))).squeeze(-1)


def _check(kernel: str, structure: str, bandwidth: str | float, num_particles: int) -> None:
    for name, got, allowed in (
        ("kernel", kernel, [*KERNELS]),
        ("structure", structure, ["auto", "joint", "site", "coordinate", "moments"]),
        ("bandwidth", bandwidth, ["auto", *BANDWIDTHS]),
    ):
        is_number = name == "bandwidth" and not isinstance(got, str) and got > 0
        if got not in allowed and not is_number:
            hint = " or a positive number" if name == "bandwidth" else ""
            raise ValueError(f"{name}={got!r} is not known; choose one of {allowed}{hint}")
    if bandwidth == "released" and num_particles < 2:
        raise ValueError(
            f'bandwidth="released" divides by log M and needs M > 1, got num_particles={num_particles}; '
            'write bandwidth="median"'
        )
