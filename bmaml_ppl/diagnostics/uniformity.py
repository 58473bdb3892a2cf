r"""Are ranks uniform? Tests, bands and histograms for simulation-based calibration, as pure functions.

`ranks` is `(N,)` or `(N, Q)`, integers in 0..S: of each of N independent simulations, how many of `num_draws` = S
posterior draws lie below the simulated truth, for each of Q quantities. Right posteriors have ranks that are uniform
on the S + 1 values, so the number of ranks below k is Binomial(N, k / (S+1)).

The graphical test looks at the counts below all `cuts` k at once. T = min_k 2 min(P(C_k <= c_k), P(C_k >= c_k)) is
small where any count is far out; its distribution is computed exactly, by carrying the counts from cut to cut, so
p-values and bands need no simulation and no seed. Counts are whole numbers, so a test at level a rejects uniform
ranks with a probability of at most a, and little less.

References:
    Talts et al. (2018), Validating Bayesian inference algorithms with simulation-based calibration (arXiv:1804.06788).
    Sailynoja, Burkner and Vehtari (2022), Graphical test for discrete uniformity (arXiv:2103.10522), section 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Histogram",
    "chi_square_p_values",
    "ecdf_band",
    "ecdf_cuts",
    "ecdf_difference",
    "ecdf_p_values",
    "rank_histogram",
]

_MOST_CUTS = 100
_RANKS_A_BIN = 20
_TINY = 1e-6


class Histogram(NamedTuple):
    """Counts of ranks in bins of nearly equal width.

    Attributes:
        counts: (B,) or (B, Q).
        expected: Mean of each bin's count for uniform ranks, (B,).
        lower: Lower bound of each bin's count for uniform ranks, (B,), one bin at a time.
        upper: Upper bound, (B,).
    """

    counts: Tensor
    expected: Tensor
    lower: Tensor
    upper: Tensor


def ecdf_cuts(num_draws: int) -> Tensor:
    """The cuts k at which ranks are counted: 1..S, or 100 evenly spaced ones of them, `(K,)`."""
    if num_draws <= _MOST_CUTS:
        return torch.arange(1, num_draws + 1)
    return torch.linspace(1, num_draws, _MOST_CUTS, dtype=torch.float64).round().long()


def ecdf_difference(ranks: Tensor, num_draws: int) -> Tensor:
    """Share of the ranks below each cut k, minus `k / (S+1)`.

    Above 0 on the left and below it on the right is a posterior that is too narrow; above 0 everywhere is one that
    lies too high.

    Args:
        ranks: `(N,)` or `(N, Q)`, integers in 0..S.
        num_draws: S.

    Returns:
        Differences at `ecdf_cuts(num_draws)`, `(K,)` or `(K, Q)`.

    Raises:
        ValueError: If ranks are not integers in 0..S.
    """
    counts = _count_below(ranks, num_draws)
    expected = _cut_probabilities(num_draws).reshape(-1, *(1,) * (counts.ndim - 1))
    return counts.double() / len(ranks) - expected


def ecdf_band(num_ranks: int, num_draws: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Band that holds the whole `ecdf_difference` of uniform ranks with a probability of at least `level`.

    Args:
        num_ranks: N.
        num_draws: S.
        level: Probability, in (0, 1).

    Returns:
        Lower and upper bounds at `ecdf_cuts(num_draws)`, `(K,)` each, both inside the band.

    Raises:
        ValueError: If the level is outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"Got level={level}; it is a probability in (0, 1). Write 0.95 for 95 %.")
    probabilities = _cut_probabilities(num_draws)
    tails = _tail_probabilities(num_ranks, probabilities)
    # P(T <= a) is at most K a, so that the lower end is always inside.
    low, high = (1 - level) / (2 * len(probabilities)), 1.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        enough = _stay_probability(*_bounds(tails, middle), probabilities, num_ranks) >= level
        low, high = (middle, high) if enough else (low, middle)
    lower, upper = _bounds(tails, low)
    return lower.double() / num_ranks - probabilities, upper.double() / num_ranks - probabilities


def ecdf_p_values(ranks: Tensor, num_draws: int) -> Tensor:
    """Probability that uniform ranks have a T as small as these: the p-value of the graphical test.

    It is at most a exactly where `ecdf_difference` leaves the band of level 1 - a. Below 1e-6 it is K T, which is no
    smaller than the p-value.

    Args:
        ranks: `(N,)` or `(N, Q)`, integers in 0..S.
        num_draws: S.

    Returns:
        A scalar, or `(Q,)`.

    Raises:
        ValueError: If ranks are not integers in 0..S.
    """
    probabilities = _cut_probabilities(num_draws)
    tails = _tail_probabilities(len(ranks), probabilities)
    counts = _count_below(ranks, num_draws)
    observed = tails.gather(1, counts.reshape(len(counts), -1)).amin(0)
    distinct, place = observed.unique(return_inverse=True)
    values = [_least_tail_p_value(float(t), tails, probabilities) for t in distinct]
    return torch.tensor(values, dtype=torch.float64)[place].reshape(counts.shape[1:])


def _least_tail_p_value(least: float, tails: Tensor, probabilities: Tensor) -> float:
    """P(T <= least) for uniform ranks."""
    at_most = least * len(probabilities)
    if at_most < _TINY:  # the difference from 1 would be rounding error, and the bounds as wide as N
        return at_most
    return min(max(1 - _stay_probability(*_bounds(tails, least), probabilities, tails.shape[1] - 1), 0.0), 1.0)


def rank_histogram(ranks: Tensor, num_draws: int, num_bins: int | None = None, level: float = 0.99) -> Histogram:
    """Counts ranks in bins, with the central binomial interval of each.

    One bin in 1 / (1 - level) of uniform ranks is expected outside its interval, so many bins need `ecdf_p_values`.

    Args:
        ranks: `(N,)` or `(N, Q)`, integers in 0..S.
        num_draws: S.
        num_bins: B; None takes one for 20 ranks (Talts et al.), at least 2 and at most S + 1.
        level: Probability of each bin's interval.

    Raises:
        ValueError: If ranks are not integers in 0..S, or there are more bins than ranks.
    """
    _check_ranks(ranks, num_draws)
    num_bins = _choose_bins(len(ranks), num_draws, num_bins)
    bins = torch.arange(num_bins).reshape(-1, *(1,) * ranks.ndim)
    counts = (ranks.cpu() * num_bins // (num_draws + 1) == bins).sum(1)
    width = (torch.arange(num_draws + 1) * num_bins // (num_draws + 1)).bincount()
    probabilities = width.double() / (num_draws + 1)
    lower, upper = _bounds(_tail_probabilities(len(ranks), probabilities), 1 - level)
    return Histogram(counts, probabilities * len(ranks), lower, upper)


def chi_square_p_values(ranks: Tensor, num_draws: int, num_bins: int | None = None) -> Tensor:
    """P-value of Pearson's chi-square test on `rank_histogram`, a scalar or `(Q,)`; blind to the order of bins."""
    found = rank_histogram(ranks, num_draws, num_bins)
    expected = found.expected.reshape(-1, *(1,) * (ranks.ndim - 1))
    statistic = ((found.counts - expected).square() / expected).sum(0)
    freedom = torch.full_like(statistic, (len(found.counts) - 1) / 2)
    return torch.special.gammaincc(freedom, statistic / 2)


def _choose_bins(num_ranks: int, num_draws: int, num_bins: int | None) -> int:
    if num_bins is None:
        return min(num_draws + 1, max(2, num_ranks // _RANKS_A_BIN))
    if not 2 <= num_bins <= num_draws + 1:
        raise ValueError(f"Got num_bins={num_bins}; ranks of {num_draws} draws fall in 2 to {num_draws + 1} bins.")
    return num_bins


def _check_ranks(ranks: Tensor, num_draws: int) -> None:
    if ranks.is_floating_point() or not ranks.numel() or ranks.min() < 0 or ranks.max() > num_draws:
        has = f"{ranks.dtype} from {ranks.min()} to {ranks.max()}" if ranks.numel() else "none"
        raise ValueError(f"Ranks among {num_draws} draws are integers in 0..{num_draws}, got {has}.")


def _cut_probabilities(num_draws: int) -> Tensor:
    return ecdf_cuts(num_draws).double() / (num_draws + 1)


def _count_below(ranks: Tensor, num_draws: int) -> Tensor:
    """How many ranks lie below each cut, (K,) or (K, Q)."""
    _check_ranks(ranks, num_draws)
    return torch.stack([(ranks.cpu() < k).sum(0) for k in ecdf_cuts(num_draws)])


def _tail_probabilities(num: int, probabilities: Tensor) -> Tensor:
    """2 min(P(C <= c), P(C >= c)) of Binomial(N, p) for every p and c, (K, N + 1)."""
    counts = torch.arange(num + 1, dtype=torch.float64)
    mass = _binomial(counts, num, probabilities.unsqueeze(1))
    return 2 * torch.minimum(mass.cumsum(1), mass.flip(1).cumsum(1).flip(1))


def _binomial(counts: Tensor, num: Tensor | int, probability: Tensor) -> Tensor:
    """Probability mass of Binomial(num, probability); 0 at negative counts."""
    size, valid = torch.as_tensor(num, dtype=torch.float64), counts.clamp_min(0)
    ways = torch.lgamma(size + 1) - torch.lgamma(valid + 1) - torch.lgamma(size - valid + 1)
    log_mass = ways + valid * torch.log(probability) + (size - valid) * torch.log1p(-probability)
    return torch.where(counts < 0, 0.0, log_mass.exp())


def _bounds(tails: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """First and last count at each cut whose tail probability is above a level, (K,); none where first > last."""
    # Counts that mirror each other have equal tails up to rounding.
    inside = tails > level * (1 + 1e-9)
    last = tails.shape[1] - 1
    some = inside.any(1)
    lower, upper = inside.byte().argmax(1), last - inside.flip(1).byte().argmax(1)
    return torch.where(some, lower, last), torch.where(some, upper, -1)


def _stay_probability(lower: Tensor, upper: Tensor, probabilities: Tensor, num: int) -> float:
    """Probability that the counts of N uniform values below rising cuts all stay within bounds.

    Given c of N values below one cut, the number between it and the next is Binomial(N - c, their share of the rest):
    Sailynoja et al., section 2.2.
    """
    if bool((lower > upper).any()):
        return 0.0
    counts, mass, before = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 0.0
    for low, high, probability in zip(lower.tolist(), upper.tolist(), probabilities.tolist(), strict=True):
        following = torch.arange(low, high + 1, dtype=torch.float64)
        share = torch.tensor((probability - before) / (1 - before), dtype=torch.float64)
        moves = _binomial(following - counts.unsqueeze(1), (num - counts).unsqueeze(1), share)
        counts, mass, before = following, mass @ moves, probability
    return float(mass.sum())
