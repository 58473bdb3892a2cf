r"""Scores of predictions against what was observed: pure functions of tensors.

Throughout, `draws` is `(S, ...)`, S draws from the predictive distribution of each target, `target` is
`(...)` in the same units, and `mask` is bool like `target`, True where a target is real (None: everywhere).
Scores average over the real targets, and are NaN where there is none.

Sets of particles are small (S = 20), so ranks count: if target and draws are exchangeable, the k-th smallest
of S draws exceeds the target with probability k/(S+1). Quantiles and the calibration error use S+1
accordingly, and so are right on average for a right posterior at any S; with S it would seem overconfident.
"""

import math

import torch
from pyro.ops.stats import crps_empirical
from torch import Tensor

__all__ = [
    "calibration_error",
    "coverage",
    "crps",
    "interval_bounds",
    "interval_score",
    "mixture_log_density",
    "rmse",
]


def rmse(prediction_mean: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Root mean squared error of a point prediction, in the units of the target.

    Args:
        prediction_mean: The predictive mean, like `target`.
        target: What was observed.
        mask: True where a target is real.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes disagree.
    """
    _check_shapes(prediction_mean.shape, target, mask)
    return _masked_mean((prediction_mean - target).square(), mask).sqrt()


def mixture_log_density(log_likelihood: Tensor) -> Tensor:
    r"""Log density of the equal mixture of S predictions, `log 1/S sum_s p(y | theta_s)`.

    References:
        The log score of Gneiting and Raftery (2007), Strictly proper scoring rules, section 4.1.

    Args:
        log_likelihood: Log density under each draw (nats), `(S, ...)`.

    Returns:
        Nats, `(...)`.
    """
    return log_likelihood.logsumexp(0) - math.log(log_likelihood.shape[0])


def interval_bounds(draws: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Bounds of the central interval: empirical quantiles at `(1 - level) / 2` and `(1 + level) / 2`.

    The quantile at p lies at rank p(S+1), interpolated (type 6). S draws reach a level of at most
    `(S - 1) / (S + 1)`; beyond it the bounds are the smallest and the largest draw.

    References:
        Hyndman and Fan (1996), Sample quantiles in statistical packages.

    Args:
        draws: Predictive draws, `(S, ...)`.
        level: Probability of the interval, in (0, 1).

    Returns:
        The lower and the upper bound, each `(...)`.

    Raises:
        ValueError: If the level is outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"Got level={level}; it is a probability in (0, 1). Write 0.9 for 90 %.")
    ordered = draws.sort(dim=0).values
    return _quantile(ordered, (1 - level) / 2), _quantile(ordered, (1 + level) / 2)


def _quantile(ordered: Tensor, probability: float) -> Tensor:
    last = ordered.shape[0] - 1
    rank = min(max(probability * (last + 2) - 1, 0.0), float(last))
    below = math.floor(rank)
    return ordered[below].lerp(ordered[min(below + 1, last)], rank - below)


def coverage(draws: Tensor, target: Tensor, level: float = 0.9, mask: Tensor | None = None) -> Tensor:
    """Fraction of the targets inside their central interval; a calibrated prediction has `level`.

    Args:
        draws: Predictive draws, `(S, ...)`.
        target: What was observed.
        level: Probability of the interval, in (0, 1).
        mask: True where a target is real.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If the shapes disagree, or the level is outside (0, 1).
    """
    _check_shapes(draws.shape[1:], target, mask)
    lower, upper = interval_bounds(draws, level)
    return _masked_mean(((lower <= target) & (target <= upper)).to(draws.dtype), mask)


def interval_score(draws: Tensor, target: Tensor, level: float = 0.9, mask: Tensor | None = None) -> Tensor:
    """Width of the central interval, plus `2 / (1 - level)` times the distance by which it misses.

    References:
        Gneiting and Raftery (2007), Strictly proper scoring rules, equation 43.

    Args:
        draws: Predictive draws, `(S, ...)`.
        target: What was observed.
        level: Probability of the interval, in (0, 1).
        mask: True where a target is real.

    Returns:
        A scalar, in the units of the target; lower is better.

    Raises:
        ValueError: If the shapes disagree, or the level is outside (0, 1).
    """
    _check_shapes(draws.shape[1:], target, mask)
    lower, upper = interval_bounds(draws, level)
    missed = (lower - target).clamp(min=0) + (target - upper).clamp(min=0)
    return _masked_mean(upper - lower + 2 / (1 - level) * missed, mask)


def calibration_error(draws: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""RMS over 20 levels q = 0.05..0.95 of the gap between q and how often the predictive CDF is below q.

    The CDF is known by draws only. With `b` draws below the target and `e` equal to it, the target's rank is
    one of `b..b+e`, and the share of it below q is `clamp((q (S+1) - b) / (e+1), 0, 1)`: the non-randomised
    probability integral transform, whose mean is q under exchangeability at any S, for counts too. As S
    grows, this is PACOH's error.

    References:
        Rothfuss et al. (2021), PACOH (arXiv:2002.05551), and `_calib_error` in its code.
        Czado, Gneiting and Held (2009), Predictive model assessment for count data.

    Args:
        draws: Predictive draws, `(S, ...)`.
        target: What was observed.
        mask: True where a target is real.

    Returns:
        A scalar in [0, 1); 0 is calibrated on average over the targets.

    Raises:
        ValueError: If the shapes disagree.
    """
    _check_shapes(draws.shape[1:], target, mask)
    levels = torch.linspace(0.05, 0.95, 20, dtype=draws.dtype, device=draws.device)
    below = (draws < target).sum(0).to(draws.dtype)
    equal = (draws == target).sum(0).to(draws.dtype)
    gaps = [_masked_mean(((q * (draws.shape[0] + 1) - below) / (equal + 1)).clamp(0, 1), mask) - q for q in levels]
    return torch.stack(gaps).square().mean().sqrt()


def crps(draws: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Continuous ranked probability score of the empirical distribution of the draws; lower is better.

    `E|x - y| - E|x - x'| / 2` over draws x, x'; with one draw it is the absolute error.

    References:
        Gneiting and Raftery (2007), Strictly proper scoring rules, equation 21.
        The sum is `pyro.ops.stats.crps_empirical`.

    Args:
        draws: Predictive draws, `(S, ...)`.
        target: What was observed.
        mask: True where a target is real.

    Returns:
        A scalar, in the units of the target.

    Raises:
        ValueError: If the shapes disagree.
    """
    _check_shapes(draws.shape[1:], target, mask)
    return _masked_mean(crps_empirical(draws, target), mask)


def _check_shapes(shape: torch.Size, target: Tensor, mask: Tensor | None) -> None:
    if shape != target.shape:
        raise ValueError(
            f"The predictions of a target have shape {tuple(shape)} and the target {tuple(target.shape)}; "
            "they must be equal. Draws are (S, ...) for a target (...)."
        )
    if mask is not None and (mask.shape != target.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be torch.bool like the target, "
            f"{tuple(target.shape)}. Write mask.bool().expand_as(target)."
        )


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.mean() if mask is None else torch.where(mask, values, 0).sum() / mask.sum()
