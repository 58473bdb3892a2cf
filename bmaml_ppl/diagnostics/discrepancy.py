"""How far particles or draws are from a density, or from reference draws: pure functions of tensors.

Throughout, `draws` is `(S, D)`: particles, or draws of an approximate posterior, in unconstrained coordinates
where the density is given there. `torch.func.vmap` carries every function over tasks.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bmaml_ppl.inference.kernels import KERNELS

__all__ = [
    "average_particle_distance",
    "kernel_stein_discrepancy",
    "sliced_wasserstein",
    "spread_ratio",
]

_CURVATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "rbf": lambda t: torch.exp(-t),
    "imq": lambda t: 0.75 * (1 + t) ** -2.5,
}
"""f'' of each radial kernel f."""


def kernel_stein_discrepancy(
    draws: Tensor,
    scores: Tensor,
    *,
    kernel: Literal["imq", "rbf"] = "imq",
    bandwidth: float | None = None,
    statistic: Literal["u", "v"] = "v",
) -> Tensor:
    r"""Squared kernel Stein discrepancy between draws and a density known by its scores alone.

    The mean over pairs of draws of `u(x, x') = s^T s' k + s^T grad_x' k + s'^T grad_x k + tr grad_x grad_x' k`, with
    s = grad log p(x) and k = f(|x - x'|^2 / h): exp(-t) or (1 + t)^(-1/2). It is 0 in expectation for the density
    itself, and for no other. From D = 3 on, draws may stay away from the density while the RBF kernel's discrepancy
    falls to 0; the inverse multiquadric's does not.

    References:
        Liu, Lee and Jordan (2016), A kernelized Stein discrepancy for goodness-of-fit tests, theorem 3.6 (u) and
        section 4 (both statistics).
        Gorham and Mackey (2017), Measuring sample quality with kernels, proposition 2 (the square root of "v") and
        theorems 6 and 8; their (c^2 + |x - x'|^2)^(-1/2) is this kernel with h = c^2, up to a factor.

    Args:
        draws: `(S, D)`.
        scores: Gradient of the target's log density at each draw, `(S, D)`.
        kernel: f.
        bandwidth: h, in squared units of the draws; None takes the median of the squared distances of pairs.
        statistic: "v" takes every pair and is never negative, but above 0 even for exact draws, by the mean of
            u(x, x) / S; "u" leaves out pairs of a draw with itself, is unbiased and may be negative.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes disagree, an option is unknown, or there is one draw and pairs are needed.
    """
    _check_pairs(draws, scores, statistic, bandwidth)
    if kernel not in _CURVATURES:
        raise ValueError(f"Got kernel={kernel!r}; choose one of {sorted(_CURVATURES)}.")
    num, dim = draws.shape
    centred = draws - draws.mean(0)
    squared = _squared_distances(centred)
    h = _median_of_pairs(squared) if bandwidth is None else bandwidth
    t, radial = squared / h, KERNELS[kernel]
    projected = centred @ scores.T
    own = projected.diagonal()
    # (x - x') . (s - s') of every pair
    along = own.unsqueeze(0) + own.unsqueeze(1) - projected - projected.T
    slope, curvature = radial.slope(t), _CURVATURES[kernel](t)
    stein = radial.value(t) * (scores @ scores.T) - 2 / h * slope * along - 2 / h * (dim * slope + 2 * t * curvature)
    if statistic == "v":
        return stein.mean()
    return (stein.sum() - stein.diagonal().sum()) / (num * (num - 1))


def _check_pairs(draws: Tensor, scores: Tensor, statistic: str, bandwidth: float | None) -> None:
    if draws.ndim != 2 or draws.shape != scores.shape:
        raise ValueError(
            f"Draws have shape {tuple(draws.shape)} and scores {tuple(scores.shape)}; both are (S, D). Write "
            "vmap(kernel_stein_discrepancy)(draws, scores) for several tasks."
        )
    if statistic not in ("u", "v"):
        raise ValueError(f'Got statistic={statistic!r}; write "u" or "v".')
    if draws.shape[0] == 1 and (statistic == "u" or bandwidth is None):
        raise ValueError('One draw makes no pair; write statistic="v" and a bandwidth, or give more draws.')


def _squared_distances(centred: Tensor) -> Tensor:
    norms = centred.square().sum(1)
    squared = (norms.unsqueeze(0) + norms.unsqueeze(1) - 2 * centred @ centred.T).clamp_min(0.0)
    return squared * (1 - torch.eye(len(centred), dtype=centred.dtype, device=centred.device))


def _median_of_pairs(squared: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(len(squared), len(squared), offset=1, device=squared.device)
    return squared[rows, columns].median().clamp_min(torch.finfo(squared.dtype).tiny * 1e8)


def spread_ratio(draws: Tensor, reference: Tensor, *, correction: int = 0) -> Tensor:
    """Standard deviation of the draws over that of reference draws, by coordinate; 1 is right, below 1 too narrow.

    Args:
        draws: `(S, ...)`.
        reference: `(R, ...)`, in the same units, R at least 2.
        correction: Degrees of freedom that draws and reference lose: 0 for the spread of a set of particles as it
            stands (0 for one particle), 1 to estimate that of a distribution from independent draws.

    Returns:
        Ratios, `(...)`.

    Raises:
        ValueError: If the coordinates disagree.
    """
    _check_coordinates(draws, reference)
    return draws.std(0, correction=correction) / reference.std(0, correction=correction)


def sliced_wasserstein(
    draws: Tensor,
    reference: Tensor,
    *,
    num_directions: int = 100,
    order: int = 2,
    seed: int = 0,
) -> Tensor:
    r"""Sliced Wasserstein distance between two sets of equally weighted points, which may differ in size.

    `(1/L sum_l W_p(u_l . draws, u_l . reference)^p)^(1/p)` over L directions u_l on the sphere; each W_p is exact,
    an integral over the two step-wise quantile functions. In D dimensions, points that are d apart are about
    d / sqrt(D) apart along a direction.

    References:
        Bonneel, Rabin, Peyre and Pfister (2015), Sliced and Radon Wasserstein barycenters of measures.

    Args:
        draws: `(S, D)`.
        reference: `(R, D)`, in the same units; divide both by the reference's standard deviations where units differ.
        num_directions: L.
        order: p, 1 or more.
        seed: Of the directions: the same ones in every call, and for every task under `vmap`.

    Returns:
        A scalar, in the units of the draws.

    Raises:
        ValueError: If the coordinates disagree.
    """
    _check_coordinates(draws, reference)
    # Not torch's generator, which refuses to draw under vmap.
    normal = torch.from_numpy(np.random.default_rng(seed).standard_normal((draws.shape[1], num_directions)))
    directions = (normal / normal.norm(dim=0)).to(draws)
    first, second = (draws @ directions).sort(0).values, (reference @ directions).sort(0).values
    num, other = len(draws), len(reference)
    # Quantile levels in units of 1 / (S R), where either quantile function steps.
    steps = torch.cat([torch.arange(num) * other, torch.arange(other) * num]).sort().values.to(draws.device)
    ends = torch.cat([steps[1:], steps.new_tensor([num * other])])
    gaps = (first[steps // other] - second[steps // num]).abs() ** order
    widths = (ends - steps).to(draws.dtype) / (num * other)
    return (widths @ gaps).mean() ** (1 / order)


def average_particle_distance(particles: Tensor) -> Tensor:
    """Mean Euclidean distance of the M (M - 1) / 2 pairs of particles, `(M, D)`; 0 for one particle or a collapse."""
    num = len(particles)
    rows, columns = torch.triu_indices(num, num, offset=1, device=particles.device)
    if num == 1:
        return particles.new_zeros(())
    return (particles[rows] - particles[columns]).square().sum(-1).sqrt().mean()


def _check_coordinates(draws: Tensor, reference: Tensor) -> None:
    if draws.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"Draws have shape {tuple(draws.shape)} and the reference {tuple(reference.shape)}; they may differ in "
            "the number of draws, their first dimension, alone."
        )
