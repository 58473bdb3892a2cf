"""Kernels and bandwidth rules for Stein variational gradient descent, as pure functions of particles."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import log
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BANDWIDTHS",
    "KERNELS",
    "Bandwidth",
    "Radial",
    "Structure",
    "anchored_direction",
    "anchors",
    "moment_direction",
    "stein_direction",
]

Bandwidth = Literal["median", "mean", "released"]
Structure = Literal["joint", "site", "coordinate", "moments", "anchored"]

_RIDGE = 1e-2


class Radial(NamedTuple):
    """A radial kernel k(x, y) = f(t), t = |x - y|^2 / h.

    Attributes:
        value: f.
        slope: f'.
        ratio: f' / f where that is a constant, else None.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    ratio: float | None = None


KERNELS: dict[str, Radial] = {
    "rbf": Radial(lambda t: torch.exp(-t), lambda t: -torch.exp(-t), ratio=-1.0),
    "imq": Radial(lambda t: (1 + t) ** -0.5, lambda t: -0.5 * (1 + t) ** -1.5),
}
"""`rbf`: exp(-t), Liu and Wang (2016). `imq`: (1 + t)^(-1/2), Gorham and Mackey (2017)."""


def _median(squared: Tensor) -> Tensor:
    """Median of the off-diagonal squared distances / log(M + 1): Liu and Wang's code and Pyro's."""
    num = squared.shape[-1]
    rows, columns = torch.triu_indices(num, num, offset=1, device=squared.device)
    return squared[..., rows, columns].median(-1).values / log(num + 1)


def _mean(squared: Tensor) -> Tensor:
    """Mean of the off-diagonal squared distances / log(M + 1): smooth in the particles."""
    num = squared.shape[-1]
    return squared.sum((-2, -1)) / (num * (num - 1)) / log(num + 1)


def _released(squared: Tensor) -> Tensor:
    """Median over the whole matrix, its zero diagonal included, / log M: the BMAML authors' code."""
    num = squared.shape[-1]
    return squared.flatten(-2).median(-1).values / log(num)


BANDWIDTHS: dict[str, Callable[[Tensor], Tensor]] = {"median": _median, "mean": _mean, "released": _released}
"""Rules from squared distances (..., M, M) to a bandwidth (...); no gradient passes through one."""


def stein_direction(
    particles: Tensor,
    scores: Tensor,
    *,
    kernel: Radial,
    bandwidth: Callable[[Tensor], Tensor] | float,
    repulsion: float,
    blocks: Sequence[slice] | None,
    normalise: bool = False,
) -> Tensor:
    """The direction of SVGD, phi(z_i) = 1/M sum_j [k(z_j, z_i) score_j + repulsion * grad_{z_j} k(z_j, z_i)].

    With one particle k = 1 and nothing repels, so that the direction is the score: gradient ascent.

    Args:
        particles: (M, D).
        scores: Gradient of the log density at each particle, (M, D).
        kernel: Radial kernel.
        bandwidth: A rule of `BANDWIDTHS`, or a number h.
        repulsion: Factor of the repulsive term; 1 is exact, 0.5 what the BMAML authors' code does.
        blocks: Coordinates that share a kernel (a graphical kernel); None gives each coordinate its own.
        normalise: Divide each particle's direction by its mean kernel value. The fixed points stay the
            same, and the drive becomes a weighted mean of scores, so that a step of length 1 against a
            round, unit-variance target is as long as Newton's however far apart the particles are.

    Returns:
        Directions, (M, D).

    Reference:
        Liu and Wang (2016), Stein Variational Gradient Descent, Algorithm 1; Wang, Zeng and Liu (2018),
        Stein Variational Message Passing, for one kernel a block.
    """
    if particles.shape[0] == 1:
        return scores
    if blocks is None:
        mass, direction = _per_coordinate(particles, scores, kernel, bandwidth, repulsion)
    else:
        parts = [_one_block(particles[:, b], scores[:, b], kernel, bandwidth, repulsion) for b in blocks]
        sizes = [b.stop - b.start for b in blocks]
        mass = torch.cat([part[0].expand(-1, n) for part, n in zip(parts, sizes, strict=True)], dim=1)
        direction = torch.cat([part[1] for part in parts], dim=1) if len(parts) > 1 else parts[0][1]
    return direction / (mass if normalise else len(particles))


def moment_direction(particles: Tensor, scores: Tensor) -> Tensor:
    """The direction of SVGD's linear kernel, which matches a Gaussian's covariance exactly: (M, D).

    For centred particles u and A = -1/M sum_j score_j u_j^T, that direction is (I - A) u. Kernels per
    coordinate fix each coordinate's spread and leave correlations as they started; this term fixes them.
    It is made bounded, as (I - A^2)(I + A^2)^-1 u, so that a step far from the target cannot overshoot;
    near the target, A = I, it is the same to first order.

    Args:
        particles: Whitened particles, (M, D), M > D + 1.
        scores: Whitened scores, (M, D).

    Reference:
        Liu and Wang (2018), Stein Variational Gradient Descent as Moment Matching, section 3.
    """
    num, dim = particles.shape
    centred = particles - particles.mean(0)
    stein = -(scores.T @ centred) / num
    stein = 0.5 * (stein + stein.T)
    size = stein.square().sum().clamp_min(1.0).sqrt()
    stein = stein * (4 * dim**0.5 / size).clamp_max(1.0)
    eye = torch.eye(dim, dtype=particles.dtype, device=particles.device)
    square = stein @ stein
    factor = torch.linalg.cholesky_ex(eye + square).L
    return torch.cholesky_solve((eye - square) @ centred.T, factor).T


def anchored_direction(
    white: Tensor,
    scores: Tensor,
    factor: Tensor,
    *,
    kernel: Radial,
    bandwidth: Callable[[Tensor], Tensor] | float,
    repulsion: float,
) -> Tensor:
    r"""A direction for fewer particles than coordinates, whose covariance no kernel could hold: (M, D).

    .. math:: y_i + \tfrac12 n_i + \tfrac12 (\bar n - u_i) + (\phi_i - \bar\phi) \, R / (1 + \|R\|_\infty)

    in original coordinates over sigma, where H = L L^T, sigma and R are the standard deviations and the correlations
    of H^-1, u the centred particles, n = H^-1 score, and y the anchors: deviations of covariance close to R and of
    variance 1 in each coordinate. The first three terms lead a Gaussian's particles to its mean plus y from
    anywhere; n_i, each particle's own Newton step, makes them follow a density that is not Gaussian. phi is SVGD's
    direction with a kernel for each coordinate; R turns these into one matrix-valued kernel in the metric of H.

    Args:
        white: Whitened particles, L^T z, (M, D), M > 1.
        scores: Whitened scores, (M, D).
        factor: Lower factor L of the shared curvature, (D, D).
        kernel: Radial kernel of phi.
        bandwidth: Of phi, in coordinates over sigma.
        repulsion: Of phi.

    Returns:
        Directions in whitened coordinates, (M, D).

    References:
        Wang, Tang, Bajaj and Liu (2019), Stein Variational Gradient Descent with Matrix-Valued Kernels, section 3; Ba
        et al. (2022), Understanding the Variance Collapse of SVGD in High Dimensions, for what happens without.
    """
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    axes = torch.linalg.solve_triangular(factor, eye, upper=False)
    axes = axes / axes.square().sum(0).sqrt()
    x, newton, correlation = white @ axes, scores @ axes, axes.T @ axes
    phi = stein_direction(
        x, newton, kernel=kernel, bandwidth=bandwidth, repulsion=repulsion, blocks=None, normalise=True
    )
    follow = 0.5 * (scores + scores.mean(0) - white + white.mean(0))
    # A move c R in coordinates over sigma is the move c axes^T in whitened ones.
    spread = (phi - phi.mean(0)) @ axes.T / (1 + correlation.abs().sum(0).amax())
    return _level(anchors(*x.shape).to(x), axes, correlation) + follow + spread


def _level(white: Tensor, axes: Tensor, correlation: Tensor, num_steps: int = 2) -> Tensor:
    """Whitened deviations, (M, D), moved to variance 1 along each axis by Newton's steps.

    Moves are along the axes themselves, so that directions in which coordinates cancel hardly change.
    """
    eye = torch.eye(white.shape[1], dtype=white.dtype, device=white.device)
    for _ in range(num_steps):
        x = white @ axes
        covariance = x.T @ x / len(x)
        system = torch.linalg.cholesky_ex(covariance * correlation + _RIDGE * eye).L
        change = torch.cholesky_solve(0.5 * (1 - covariance.diagonal()).unsqueeze(-1), system).squeeze(-1)
        white = white + (x * change) @ axes.T
    return white


def anchors(num: int, dim: int) -> Tensor:
    """Fixed points, (M, D) in float64, of mean 0, variance 1 in each coordinate and as round as M points can be.

    All singular values are nearly the same: an equal-norm tight frame, found by alternating projections from normal
    draws of a fixed seed.

    Reference:
        Tropp, Dhillon, Heath and Strohmer (2005), Designing Structured Tight Frames via an Alternating Projection
        Method.
    """
    return torch.from_numpy(_find_frame(num, dim))


@lru_cache(maxsize=64)
def _find_frame(num: int, dim: int, num_sweeps: int = 20) -> np.ndarray:
    points = np.random.Generator(np.random.PCG64(0)).standard_normal((num, dim))
    for _ in range(num_sweeps):
        left, _, right = np.linalg.svd(points - points.mean(0), full_matrices=False)
        rank = min(num - 1, dim)
        points = left[:, :rank] @ right[:rank]
        points = points / np.sqrt(np.square(points).mean(0))
    return points


def _one_block(
    x: Tensor, scores: Tensor, kernel: Radial, bandwidth: Callable[[Tensor], Tensor] | float, repulsion: float
) -> tuple[Tensor, Tensor]:
    """Kernel mass of each particle, (M, 1), and summed drive and repulsion, (M, d), of one block's kernel."""
    centred = x - x.mean(0).detach()
    gram = _multiply_exactly(centred, centred.T)
    norms = gram.diagonal()
    squared = (norms.unsqueeze(0) + norms.unsqueeze(1) - 2 * gram).clamp_min(0.0)
    h = _resolve(bandwidth, squared)
    weights = kernel.value(squared / h)
    mass = weights.sum(1, keepdim=True)
    if kernel.ratio is not None:
        # One product serves drive and repulsion. A particle's own weight is 1 and its pull on itself is left out, so
        # that scores survive a bandwidth near 0.
        others = weights - torch.eye(len(x), dtype=x.dtype, device=x.device)
        pull = 2 * repulsion * kernel.ratio / h * centred
        return mass, scores + _sum_pulls(others, scores + pull) - others.sum(1, keepdim=True) * pull
    slopes = 2 * repulsion * kernel.slope(squared / h) / h
    return mass, _sum_pulls(weights, scores) + slopes @ centred - slopes.sum(1, keepdim=True) * centred


def _sum_pulls(weights: Tensor, pulls: Tensor) -> Tensor:
    """What pulls each particle: (M, M) times (M, d)."""
    # Of matrices of which tasks share one, vmap makes one with a long side, which is slow; of batches, a batch.
    return (weights.unsqueeze(0) @ pulls.unsqueeze(0)).squeeze(0)


def _multiply_exactly(left: Tensor, right: Tensor) -> Tensor:
    """A product from which distances are made by subtraction: in double precision where TF32 would spoil it."""
    if left.device.type == "cuda" and left.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return _multiply_widely(left, right)
    return left @ right


def _multiply_widely(left: Tensor, right: Tensor) -> Tensor:
    """The product in double precision, rounded to the factors' own."""
    return (left.double() @ right.double()).to(left)


def _per_coordinate(
    x: Tensor, scores: Tensor, kernel: Radial, bandwidth: Callable[[Tensor], Tensor] | float, repulsion: float
) -> tuple[Tensor, Tensor]:
    """The same with one kernel a coordinate, whose matrices are (D, M, M): mass and sum, (M, D) each."""
    difference = (x.unsqueeze(0) - x.unsqueeze(1)).movedim(-1, 0)
    squared = difference.square()
    h = _resolve(bandwidth, squared)
    weights = kernel.value(squared / h)
    repel = (2 * kernel.slope(squared / h) / h * difference).sum(-1)
    drive = (weights @ scores.T.unsqueeze(-1)).squeeze(-1)
    return weights.sum(-1).T, (drive + repulsion * repel).T


def _resolve(bandwidth: Callable[[Tensor], Tensor] | float, squared: Tensor) -> Tensor:
    if not callable(bandwidth):
        return torch.as_tensor(bandwidth, dtype=squared.dtype, device=squared.device)
    h = bandwidth(squared).detach().clamp_min(torch.finfo(squared.dtype).tiny * 1e8)
    return h.unsqueeze(-1).unsqueeze(-1)
