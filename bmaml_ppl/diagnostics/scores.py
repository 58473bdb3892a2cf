r"""Scores of predictions against what was observed: pure functions of tensors.

Throughout, `draws` is `(S, ...)`, S draws from the predictive distribution of each target, `target` is
`(...)` in the same units, and `mask` is bool like `target`, True where a target is real (None: everywhere).
Scores average over the real targets, and are NaN where there is none.

Sets of particles are small (S = 20), so ranks count: if target and draws are exchangeable, the k-th smallest
of S draws exceeds the target with probability k/(S+1). Quantiles and the calibration error use S+1
accordingly, and so are right on average for a right posterior at any S; with S it would seem overconfident.
"""

import math
from functools import partial
from typing import Literal

import torch
from pyro.ops.stats import crps_empirical, energy_score_empirical
from torch import Tensor

__all__ = [
    "Residuals",
    "brier_score",
    "calibration_error",
    "calibration_error_of_cdf",
    "coverage",
    "crps",
    "energy_score",
    "expected_calibration_error",
    "interval_bounds",
    "interval_score",
    "mixture_log_density",
    "pit",
    "rmse",
]

Residuals = Literal["rms", "absolute"]

_NUM_LEVELS = 20


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


def pit(
    draws: Tensor, target: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Probability integral transform of each target, `(b + u (e+1)) / (S+1)`, with `b` draws below it and `e` equal.

    References:
        Czado, Gneiting and Held (2009), Predictive model assessment for count data, section 2.

    Args:
        draws: Predictive draws, `(S, ...)`.
        target: What was observed, numbers or counts.
        mask: True where a target is real.
        generator: Draws u uniformly, so that exchangeable draws give exactly uniform values, for counts too. None
            takes u = 1/2, the middle of the target's ranks.

    Returns:
        Values in (0, 1) like `target`, NaN where a target is not real.

    Raises:
        ValueError: If the shapes disagree.
    """
    _check_shapes(draws.shape[1:], target, mask)
    below, equal = _count_ranks(draws, target)
    within: float | Tensor = 0.5
    if generator is not None:
        within = torch.rand(below.shape, dtype=below.dtype, device=generator.device, generator=generator).to(below)
    values = (below + within * (equal + 1)) / (draws.shape[0] + 1)
    return values if mask is None else torch.where(mask, values, torch.nan)


def calibration_error(
    draws: Tensor, target: Tensor, mask: Tensor | None = None, *, residuals: Residuals = "rms"
) -> Tensor:
    r"""PACOH's calibration error for a predictive CDF that is known by S draws only.

    It compares 20 levels q = 0.05..0.95 with how often the CDF at a target is below q. With `b` draws below the
    target and `e` equal to it, the target's rank is one of `b..b+e`, and the share of it below q is
    `clamp((q (S+1) - b) / (e+1), 0, 1)`: the non-randomised probability integral transform, whose mean is q under
    exchangeability at any S, for counts too. As S grows it becomes `calibration_error_of_cdf`, PACOH's own formula,
    which takes the predictive CDF itself where it is known.

    References:
        Rothfuss et al. (2021), PACOH (arXiv:2002.05551), and `_calib_error` in its code.
        Czado, Gneiting and Held (2009), Predictive model assessment for count data.

    Args:
        draws: Predictive draws, `(S, ...)`.
        target: What was observed.
        mask: True where a target is real.
        residuals: "rms" or "absolute", see `calibration_error_of_cdf`.

    Returns:
        A scalar in [0, 1); 0 is calibrated on average over the targets.

    Raises:
        ValueError: If the shapes disagree, or residuals is unknown.
    """
    _check_shapes(draws.shape[1:], target, mask)
    below, equal = _count_ranks(draws, target)
    num = draws.shape[0] + 1
    shares = [_masked_mean(((q * num - below) / (equal + 1)).clamp(0, 1), mask) for q in _levels(below)]
    return _summarise(torch.stack(shares) - _levels(below), residuals)


def calibration_error_of_cdf(cdf: Tensor, mask: Tensor | None = None, *, residuals: Residuals = "rms") -> Tensor:
    r"""PACOH's calibration error, `sqrt(1/20 sum_q (1/n #{i: F_i(y_i) <= q} - q)^2)`, q = 0.05..0.95 in 20 levels.

    PACOH scores each task alone and averages over tasks: `vmap` this over them and take the mean. A task of few
    targets has an error well above 0 even when it is calibrated, so compare only equal numbers of targets. Forks of
    the code put the last level at 1.0, where the gap is always 0.

    References:
        Rothfuss et al. (2021), PACOH (arXiv:2002.05551), after Kuleshov et al. (2018), equation 9. "rms" is the
        authors' `meta_learning_pacoh` (`_calib_error`), "absolute" their `pacoh_nn` (`calib_error`).

    Args:
        cdf: The predictive CDF at each target, `(...)`, in [0, 1].
        mask: True where a target is real.
        residuals: Root mean square of the 20 gaps, or their mean absolute value, which is never larger.

    Returns:
        A scalar in [0, 1).

    Raises:
        ValueError: If the mask's shape disagrees, or residuals is unknown.
    """
    _check_shapes(cdf.shape, cdf, mask)
    shares = [_masked_mean((cdf <= q).to(cdf.dtype), mask) for q in _levels(cdf)]
    return _summarise(torch.stack(shares) - _levels(cdf), residuals)


def _count_ranks(draws: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """How many draws lie below each target, and how many are equal to it, as floats."""
    dtype = draws.dtype if draws.is_floating_point() else torch.get_default_dtype()
    return (draws < target).sum(0).to(dtype), (draws == target).sum(0).to(dtype)


def _levels(like: Tensor) -> Tensor:
    return torch.linspace(0.05, 0.95, _NUM_LEVELS, dtype=like.dtype, device=like.device)


def _summarise(gaps: Tensor, residuals: Residuals) -> Tensor:
    if residuals == "rms":
        return gaps.square().mean().sqrt()
    if residuals == "absolute":
        return gaps.abs().mean()
    raise ValueError(f'Got residuals={residuals!r}; write "rms" or "absolute".')


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


def energy_score(draws: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Energy score of vector-valued targets, `E|x - y| - E|x - x'| / 2` over draws x, x'; lower is better.

    Unlike `crps` it sees the dependence between coordinates, say between all query points of one task. With one
    coordinate it is the CRPS.

    References:
        Gneiting and Raftery (2007), Strictly proper scoring rules, equation 22.
        The sum is `pyro.ops.stats.energy_score_empirical`.

    Args:
        draws: Predictive draws, `(S, ..., d)`.
        target: What was observed, `(..., d)`.
        mask: True where a coordinate is real, `(..., d)`; the others enter no distance, and a target without any
            real coordinate does not count.

    Returns:
        A scalar, in the units of the target.

    Raises:
        ValueError: If the shapes disagree.
    """
    _check_shapes(draws.shape[1:], target, mask)
    if mask is not None:
        draws, target = torch.where(mask, draws, 0), torch.where(mask, target, 0)
    # The faster cdist by matrix products loses half of the digits.
    exact = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    scores = energy_score_empirical(draws.movedim(0, -2), target, cdist=exact)
    return _masked_mean(scores, None if mask is None else mask.any(-1))


def expected_calibration_error(
    probabilities: Tensor, labels: Tensor, mask: Tensor | None = None, *, num_bins: int = 15
) -> Tensor:
    """Gap between confidence and accuracy of the likeliest class, averaged over bins of equal width in confidence.

    References:
        Guo et al. (2017), On calibration of modern neural networks, equations 2 and 3.

    Args:
        probabilities: Of each class, `(..., C)`, the mean over draws; or of label 1 in two classes, `(...)`.
        labels: Integers in 0..C-1, `(...)`.
        mask: True where a label is real.
        num_bins: Bins `(m-1)/num_bins < confidence <= m/num_bins`.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: If the shapes disagree.
    """
    probabilities = _check_classes(probabilities, labels, mask)
    confidence, predicted = probabilities.max(-1)
    gap = (predicted == labels).to(confidence.dtype) - confidence
    bins = (confidence * num_bins).ceil().clamp(1, num_bins).unsqueeze(-1)
    inside = bins == torch.arange(1, num_bins + 1, device=bins.device)
    each = [_masked_mean(torch.where(inside[..., m], gap, 0), mask) for m in range(num_bins)]
    return torch.stack(each).abs().sum()


def brier_score(probabilities: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Brier's score, the sum over classes of `(p_c - [label = c])^2`; lower is better.

    For two classes this is twice the `(p - label)^2` that some libraries give.

    References:
        Brier (1950), Verification of forecasts expressed in terms of probability, equation 2.

    Args:
        probabilities: Of each class, `(..., C)`, the mean over draws; or of label 1 in two classes, `(...)`.
        labels: Integers in 0..C-1, `(...)`.
        mask: True where a label is real.

    Returns:
        A scalar in [0, 2].

    Raises:
        ValueError: If the shapes disagree.
    """
    probabilities = _check_classes(probabilities, labels, mask)
    classes = torch.arange(probabilities.shape[-1], device=labels.device)
    hit = (labels.unsqueeze(-1) == classes).to(probabilities.dtype)
    return _masked_mean((probabilities - hit).square().sum(-1), mask)


def _check_classes(probabilities: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """The probability of every class, `(..., C)`."""
    if probabilities.shape == labels.shape:
        probabilities = torch.stack([1 - probabilities, probabilities], -1)
    _check_shapes(probabilities.shape[:-1], labels, mask)
    return probabilities


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
