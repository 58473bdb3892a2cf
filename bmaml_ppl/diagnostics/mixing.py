"""Whether chains that began apart ended together, for many coordinates at once."""

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

__all__ = ["ess", "rhat"]


def rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat of chains, the larger of those of location and of spread: (C, S, ...) -> (...).

    It equals ArviZ's, which takes one coordinate at a time. NaN below 4 draws a chain, or one chain; infinite where a
    coordinate never moved.

    Reference:
        Vehtari et al. (2021), Rank-normalization, folding, and localization: an improved R-hat, section 4.
    """
    if draws.shape[0] < 2 or draws.shape[1] < 4:
        return draws.new_full(draws.shape[2:], torch.nan, dtype=torch.float64)
    draws = draws.double()
    folded = (draws - draws.flatten(0, 1).quantile(0.5, 0)).abs()
    both = [split_gelman_rubin(_normalise_ranks(each), 0, 1) for each in (draws, folded)]
    return torch.where(_moved(draws), torch.maximum(*both), torch.inf)


def ess(draws: Tensor) -> Tensor:
    """Bulk effective number of draws of chains, (C, S, ...) -> (...), from the same paper; 0 where nothing moved."""
    half = draws.shape[1] // 2
    if half < 2:
        return draws.new_full(draws.shape[2:], torch.nan, dtype=torch.float64)
    split = torch.cat([draws[:, :half], draws[:, -half:]]).double()
    return torch.where(_moved(draws), effective_sample_size(_normalise_ranks(split), 0, 1), 0.0)


def _moved(draws: Tensor) -> Tensor:
    return (draws != draws[:, :1]).flatten(0, 1).any(0)


def _normalise_ranks(draws: Tensor) -> Tensor:
    """Normal scores of the ranks among all chains; equal draws, as after rejections, share their mean rank."""
    flat = draws.flatten(0, 1).movedim(0, -1).contiguous()
    ordered = flat.sort(-1).values
    ranks = (torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True) + 1) / 2
    scores = torch.special.ndtri((ranks.double() - 0.375) / (flat.shape[-1] + 0.25))
    return scores.movedim(-1, 0).reshape(draws.shape)
