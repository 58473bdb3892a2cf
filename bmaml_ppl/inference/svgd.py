"""Stein variational gradient descent, differentiable through every step: the inner loop of Bayesian MAML."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from bmaml_ppl.checks import check_count
from bmaml_ppl.inference.derivatives import (
    FirstOrder,
    curvature_factor,
    exact_density,
    hessians,
    safe_fraction,
    scores,
)
from bmaml_ppl.inference.kernels import (
    BANDWIDTHS,
    KERNELS,
    Bandwidth,
    Radial,
    Structure,
    anchored_direction,
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
_CURVATURE_LIMIT = 128
_EACH_LIMIT = 32
_FEW_LATENTS = 8
_NUM_PRODUCTS = 4
_FLOOR = 1e-3
_PACE = 1.4


def svgd(
    *,
    num_particles: int = 20,
    num_steps: int | None = None,
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
    whitened by a Hessian that all particles share, in which the posterior is round: a kernel per coordinate
    keeps its spread in many dimensions, a linear kernel its correlations, and the step is normalised by the
    kernel's mass so that it is as long as Newton's. The Hessian is the mean over the particles up to 32
    coordinates, where each particle's own shortens its step, and the one at the particles' mean above, where
    a few products with each particle's own do.

    Args:
        num_particles: M.
        num_steps: Adaptation steps n (the chaser's follower). None is 10, and 20 for 9 to 128 latent coordinates, which
            then have the posterior's spread even where a noise scale is among them and they start at its prior.
        step_size: alpha; None takes the preconditioner's default.
        learn_step_size: Whether the step size is meta-learned, and how finely (Meta-SGD: "parameter").
        preconditioner: "none", "adaptive" (AdaGrad with decay), "curvature"; "auto" chooses "curvature"
            up to 128 latent coordinates (32 for one particle), above which expect spread to be lost.
        kernel: "rbf" or "imq".
        structure: Which coordinates share a kernel: all ("joint", the papers'), those of a latent site
            ("site", a graphical kernel), none ("coordinate"), none with a linear kernel added that matches
            covariances ("moments"), or none with deviations held near fixed points that the Hessian scales
            ("anchored", for fewer particles than a covariance needs; see `anchored_direction`). The last two
            need whitening. "auto" is "moments" in whitened coordinates ("anchored" where M <= D + 1) and "site"
            elsewhere: one bandwidth for all loses the spread as D grows.
        bandwidth: h, a number, or a rule through which no gradient passes: "median", "mean", "released" (the
            BMAML authors' code, needs M > 1). "auto" is 1 in whitened coordinates and "median" elsewhere.
        repulsion: Factor of the repulsive term; 1 is exact, 0.5 reproduces the BMAML authors' code. "auto" is 1,
            and 1 + 1.5 / M in whitened coordinates: a finite number of particles is too narrow by about that
            much, and a Gaussian's standard deviation is then kept within 8 % in each coordinate (M >= 10).
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
    steps = _choose_steps(num_steps, sites)
    check_count("num_steps", steps, least=0)
    _check(kernel, structure, bandwidth, num_particles)
    if structure in ("moments", "anchored") and preconditioner in ("none", "adaptive"):
        raise ValueError(f'structure="{structure}" needs preconditioner="curvature", got {preconditioner!r}')
    if preconditioner == "gauss_newton":
        raise ValueError('svgd has no preconditioner="gauss_newton"; write "curvature", "adaptive" or "none"')
    rule = StepRule(step_size, learn_step_size, preconditioner, sites)
    if num_particles > 1:  # one particle keeps the rule of `map_estimate`
        rule = replace(rule, newton=0.5, limit=_CURVATURE_LIMIT)
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
        num_steps=steps,
        start=init,
    )


def _choose_steps(num_steps: int | None, sites: Mapping[str, SiteLayout] | None) -> int:
    if num_steps is not None:
        return num_steps
    dim = max((site.stop for site in sites.values()), default=0) if sites else 0
    return 20 if _FEW_LATENTS < dim <= _CURVATURE_LIMIT else 10


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
    num, dim = state.particles.shape
    whiten = rule.kind(dim) == "curvature"
    if structure == "auto":
        structure = ("moments" if num > dim + 1 else "anchored") if whiten else "site"
    if bandwidth == "auto":
        bandwidth = 1.0 if whiten else "median"
    if repulsion == "auto":
        repulsion = 1 + _SPREAD_CORRECTION / num if whiten else 1.0
    options: dict[str, Any] = {
        "kernel": kernel,
        "bandwidth": BANDWIDTHS[bandwidth] if isinstance(bandwidth, str) else bandwidth,
        "repulsion": repulsion,
    }
    blocks = {"joint": [slice(0, dim)], "site": rule.blocks(dim)}.get(structure)
    if not whiten:
        gradient = scores(log_density, state.particles)
        return advance(rule, state, stein_direction(state.particles, gradient, blocks=blocks, **options))
    newton = _find_newton(state.particles, log_density, structure, {**options, "blocks": blocks})
    # Repelled from one point, particles may lose this much on their way to the posterior's spread.
    fraction = safe_fraction(log_density, state.particles, state.step_size * newton, slack=1.0 + 2 * dim)
    return advance(rule, state, newton * fraction)


def _find_newton(
    particles: Tensor, log_density: LogDensity, structure: Structure, options: Mapping[str, Any]
) -> Tensor:
    """Direction in coordinates whitened by a curvature that the particles share, taken back to z: (M, D)."""
    num, dim = particles.shape
    each = dim <= _EACH_LIMIT
    curvature = -hessians(log_density, particles if each else particles.mean(0, keepdim=True))
    factor = curvature_factor(curvature.mean(0))
    white = particles @ factor
    gradient = torch.linalg.solve_triangular(factor, scores(log_density, particles).T, upper=False).T
    if structure == "anchored" and num > 1:
        kept = {name: options[name] for name in ("kernel", "bandwidth", "repulsion")}
        direction = _PACE * anchored_direction(white, gradient, factor, **kept)
    else:
        direction = stein_direction(white, gradient, normalise=True, **options)
    if structure == "moments" and num > 1:
        direction = direction + moment_direction(white, gradient)
    if each:
        direction = _shorten_where_sharper(direction, curvature, factor)
    else:
        direction = _shorten_by_products(log_density, particles, direction, factor)
    return torch.linalg.solve_triangular(factor.T, direction.T, upper=True).T


def _shorten_where_sharper(direction: Tensor, curvature: Tensor, factor: Tensor) -> Tensor:
    """Divides each whitened direction by the mean of the particle's own curvature and the shared one.

    The shared curvature is I here. Where the log density is not quadratic, one particle in a sharp place
    would overshoot by what the others dilute its curvature. Fixed points stay the same.
    """
    half = torch.linalg.solve_triangular(factor, curvature, upper=False)
    own = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    eye = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    return torch.cholesky_solve(direction.unsqueeze(-1), curvature_factor(0.5 * (own + eye))).squeeze(-1)


def _shorten_by_products(log_density: LogDensity, particles: Tensor, direction: Tensor, factor: Tensor) -> Tensor:
    """The same without the particles' Hessians, by Galerkin's method on Krylov spaces of a few products with each.

    Whitened curvatures have few distinct eigenvalues, so that few products do nearly as well as the whole.
    """
    exact, first_order = exact_density(log_density), isinstance(log_density, FirstOrder)
    eye = torch.eye(_NUM_PRODUCTS, dtype=direction.dtype, device=direction.device)

    def shorten(z: Tensor, w: Tensor) -> Tensor:
        pull = vjp(grad(exact), z.detach() if first_order else z)[1]
        basis, images = [_normalise(w.detach() if first_order else w)], []
        for _ in range(_NUM_PRODUCTS):
            along = torch.linalg.solve_triangular(factor.T, basis[-1].unsqueeze(1), upper=True).squeeze(1)
            image = torch.linalg.solve_triangular(factor, -pull(along)[0].unsqueeze(1), upper=False).squeeze(1)
            images.append(image.detach() if first_order else image)
            span = torch.stack(basis)
            basis.append(_normalise(images[-1] - span.T @ (span @ images[-1])))
        span = torch.stack(basis[:-1])
        system = 0.5 * (span @ torch.stack(images).T + span @ span.T)
        system = 0.5 * (system + system.T)
        smallest = torch.linalg.eigvalsh(torch.nan_to_num(system))[0]
        shifted = system + (torch.relu(_FLOOR - smallest) + torch.relu(-smallest)) * eye
        shortened: Tensor = torch.cholesky_solve((span @ w).unsqueeze(1), torch.linalg.cholesky_ex(shifted).L).squeeze(
            1
        )
        return shortened @ span

    return vmap(shorten)(particles, direction)


def _normalise(vector: Tensor) -> Tensor:
    """Nearly of length 1, and smooth at 0, where a Krylov space ends."""
    return vector / (vector.square().sum() + 1e-6).sqrt()


def _check(kernel: str, structure: str, bandwidth: str | float, num_particles: int) -> None:
    for name, got, allowed in (
        ("kernel", kernel, [*KERNELS]),
        ("structure", structure, ["auto", "joint", "site", "coordinate", "moments", "anchored"]),
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
