"""Kernels and bandwidth rules for Stein variational gradient descent, as pure functions of particles."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["BANDWIDTHS", "KERNELS", "Bandwidth", "Radial", "Structure", "moment_direction", "stein_direction"]

Bandwidth = Literal["median", "mean", "released"]
Structure = Literal["joint", "site", "coordinate", "moments"]


class Radial(NamedTuple):
    """A radial kernel k(x, y) = f(t), t = |x - y|^2 / h.

    Attributes:
        value: f.
        slope: f'.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


KERNELS: dict[str, Radial] = {
    "rbf": Radial(lambda t: torch.exp(-t), lambda t: -torch.exp(-t)),
    "imq": Radial(lambda t: (1 + t) ** -0.5, lambda t: -0.5 * (1 + t) ** -1.5),
}
"""`rbf`: exp(-t), Liu and Wang (2016). `imq`: (1 + t)^(-1/2), Gorham and Mackey (2017)."""


def _median(squared: Tensor) -> Tensor:
    """Median of the off-diagonal squared distances / log(M + 1): Liu and Wang's code and Pyro's."""
    num = squared.shape[-1]
    rows, columns = torch.triu_indices(num, num, offset=1, device=squared.device)
    return squared[..., rows, columns].median(-1).values / torch.log(torch.tensor(num + 1.0))


def _mean(squared: Tensor) -> Tensor:
    """Mean of the off-diagonal squared distances / log(M + 1): smooth in the particles."""
    num = squared.shape[-1]
    return squared.sum((-2, -1)) / (num * (num - 1)) / torch.log(torch.tensor(num + 1.0))


def _released(squared: Tensor) -> Tensor:
    """Median over the whole matrix, its zero diagonal included, / log M: the BMAML authors' code."""
    num = squared.shape[-1]
    return squared.flatten(-2).median(-1).values / torch.log(torch.tensor(float(num)))


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
        weights, drive, repel = _per_coordinate(particles, scores, kernel, bandwidth)
        mass = weights.sum(-1).T
    else:
        parts = [_one_block(particles[:, b], scores[:, b], kernel, bandwidth) for b in blocks]
        drive = torch.cat([part[1] for part in parts], dim=1)
        repel = torch.cat([part[2] for part in parts], dim=1)
        sizes = [b.stop - b.start for b in blocks]
        mass = torch.cat([p[0].sum(1, keepdim=True).expand(-1, n) for p, n in zip(parts, sizes, strict=True)], dim=1)
    return (drive + repulsion * repel) / (mass if normalise else len(particles))


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


def _one_block(
    x: Tensor, scores: Tensor, kernel: Radial, bandwidth: Callable[[Tensor], Tensor] | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel matrix, (M, M), summed drive and summed repulsion, (M, d), of one block's kernel."""
    centred = x - x.mean(0).detach()
    norms = centred.square().sum(-1)
    squared = (norms.unsqueeze(0) + norms.unsqueeze(1) - 2 * centred @ centred.T).clamp_min(0.0)
    squared = squared * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
    h = _resolve(bandwidth, squared)
    weights = kernel.value(squared / h)
    slopes = 2 * kernel.slope(squared / h) / h
    return weights, weights @ scores, slopes @ centred - slopes.sum(1, keepdim=True) * centred


def _per_coordinate(
    x: Tensor, scores: Tensor, kernel: Radial, bandwidth: Callable[[Tensor], Tensor] | float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with one kernel a coordinate, its matrices (D, M, M)."""
    difference = (x.unsqueeze(0) - x.unsqueeze(1)).movedim(-1, 0)
    squared = difference.square()
    h = _resolve(bandwidth, squared)
    weights = kernel.value(squared / h)
    repel = (2 * kernel.slope(squared / h) / h * difference).sum(-1)
    return weights, (weights @ scores.T.unsqueeze(-1)).squeeze(-1).T, repel.T


def _resolve(bandwidth: Callable[[Tensor], Tensor] | float, squared: Tensor) -> Tensor:
    if not callable(bandwidth):
        return torch.as_tensor(bandwidth, dtype=squared.dtype, device=squared.device)
    h = bandwidth(squared).detach().clamp_min(torch.finfo(squared.dtype).tiny * 1e8)
    return h.unsqueeze(-1).unsqueeze(-1)
