"""Tests of uniformity against enumeration, known rejection rates and ranks of wrong posteriors."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bmaml_ppl.diagnostics.uniformity import (
    chi_square_p_values,
    ecdf_band,
    ecdf_cuts,
    ecdf_difference,
    ecdf_p_values,
    rank_histogram,
)

F64 = torch.float64


def _uniform(num_ranks: int, num_draws: int, num_quantities: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_draws + 1, (num_ranks, num_quantities), generator=generator)


def _ranks_of(spread: float, shift: float = 0.0, num_ranks: int = 400, num_draws: int = 99) -> Tensor:
    """Ranks of standard normal truths among draws of a posterior that is wrong by a factor and a shift."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(num_ranks, generator=generator)
    draws = shift + spread * torch.randn(num_draws, num_ranks, generator=generator)
    return (draws < truth).sum(0)


def _minimal_tail(ranks: tuple[int, ...], num_draws: int) -> float:
    """T by its definition, with binomial probabilities from Python's integers."""
    size, least = len(ranks), 2.0
    for k in range(1, num_draws + 1):
        p, count = k / (num_draws + 1), sum(r < k for r in ranks)
        mass = [math.comb(size, c) * p**c * (1 - p) ** (size - c) for c in range(size + 1)]
        least = min(least, 2 * sum(mass[: count + 1]), 2 * sum(mass[count:]))
    return least


def test_p_values_by_enumeration() -> None:
    # Every one of the 4^5 sets of 5 ranks in 0..3.
    sets = list(itertools.product(range(4), repeat=5))
    tails = np.array([_minimal_tail(ranks, 3) for ranks in sets])
    exact = [(tails <= t * (1 + 1e-9)).mean() for t in tails]
    found = ecdf_p_values(torch.tensor(sets).T, 3)
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-9)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_band_by_enumeration(level: float) -> None:
    sets = torch.tensor(list(itertools.product(range(4), repeat=5))).T
    difference = ecdf_difference(sets, 3)
    lower, upper = ecdf_band(5, 3, level)
    inside = ((difference >= lower[:, None] - 1e-12) & (difference <= upper[:, None] + 1e-12)).all(0)
    assert float(inside.double().mean()) >= level
    assert torch.equal(inside, ecdf_p_values(sets, 3) > 1 - level)


def test_ecdf_difference_by_naive_loop() -> None:
    ranks = _uniform(30, 9, 2)
    naive = [[np.mean([float(r < k) for r in ranks[:, q]]) - k / 10 for q in range(2)] for k in range(1, 10)]
    np.testing.assert_allclose(ecdf_difference(ranks, 9).numpy(), naive, atol=1e-12)
    np.testing.assert_allclose(ecdf_difference(ranks[:, 0], 9).numpy(), np.array(naive)[:, 0], atol=1e-12)


def test_many_draws_are_cut_in_a_hundred_places() -> None:
    assert ecdf_cuts(4).tolist() == [1, 2, 3, 4]
    cuts = ecdf_cuts(1000)
    assert len(cuts) == len(cuts.unique()) == 100
    assert (int(cuts[0]), int(cuts[-1])) == (1, 1000)


TESTS: dict[str, Callable[[Tensor, int], Tensor]] = {"ecdf": ecdf_p_values, "chi square": chi_square_p_values}


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_uniform_ranks_are_rejected_at_the_stated_rate(name: str, alpha: float) -> None:
    # 2,000 sets: a test of size alpha leaves these bounds, five standard errors, once in a million.
    rejected = (TESTS[name](_uniform(100, 19, 2000), 19) <= alpha).double().mean()
    error = 5 * math.sqrt(alpha * (1 - alpha) / 2000)
    assert alpha - error < float(rejected) < alpha + error


@pytest.mark.parametrize("num_draws", [19, 99, 1000])
def test_five_hundred_uniform_sets_leave_the_band_at_its_rate(num_draws: int) -> None:
    lower, upper = ecdf_band(60, num_draws, 0.95)
    difference = ecdf_difference(_uniform(60, num_draws, 500), num_draws)
    outside = ((difference < lower[:, None] - 1e-12) | (difference > upper[:, None] + 1e-12)).any(0)
    # The mean is at most .05, with standard error .0097.
    assert 0.005 < float(outside.double().mean()) < 0.1


@pytest.mark.parametrize(
    ("spread", "shift"),
    [(math.sqrt(0.5), 0.0), (math.sqrt(2.0), 0.0), (1.0, 0.35), (1.0, -0.35)],
    ids=["half the variance", "twice the variance", "too high", "too low"],
)
def test_wrong_posteriors_are_rejected(spread: float, shift: float) -> None:
    ranks = _ranks_of(spread, shift)
    assert float(ecdf_p_values(ranks, 99)) < 1e-3
    assert float(chi_square_p_values(ranks, 99)) < 1e-2
    assert float(ecdf_p_values(_ranks_of(1.0), 99)) > 0.05


def test_difference_shows_what_is_wrong() -> None:
    cuts = ecdf_cuts(99)
    narrow, high = ecdf_difference(_ranks_of(0.7), 99), ecdf_difference(_ranks_of(1.0, 0.5), 99)
    assert bool((narrow[(cuts > 10) & (cuts < 30)] > 0).all())
    assert bool((narrow[(cuts > 70) & (cuts < 90)] < 0).all())
    assert bool((high[(cuts > 10) & (cuts < 90)] > 0).all())


def test_p_values_reach_far_below_what_simulation_could() -> None:
    ranks = torch.zeros(200, dtype=torch.long)
    assert float(ecdf_p_values(ranks, 99)) < 1e-12


def test_histogram_by_naive_loop() -> None:
    ranks = _uniform(200, 10, 3)
    found = rank_histogram(ranks, 10, 4)
    for b, q in itertools.product(range(4), range(3)):
        assert int(found.counts[b, q]) == sum(int(r) * 4 // 11 == b for r in ranks[:, q])
    torch.testing.assert_close(found.expected, torch.tensor([3, 3, 3, 2], dtype=F64) / 11 * 200)
    assert bool((found.counts.sum(0) == 200).all())


def test_histogram_takes_twenty_ranks_a_bin() -> None:
    assert len(rank_histogram(_uniform(200, 99, 1), 99).counts) == 10
    assert len(rank_histogram(_uniform(200, 4, 1), 4).counts) == 5
    assert len(rank_histogram(_uniform(5, 99, 1), 99).counts) == 2


def test_histogram_bounds_hold_at_their_level() -> None:
    found = rank_histogram(_uniform(200, 99, 2000), 99, level=0.95)
    outside = (found.counts < found.lower[:, None]) | (found.counts > found.upper[:, None])
    # Binomial(200, .1): the interval of probability .95 or more; 20,000 bins have standard error .0015.
    assert 0.02 < float(outside.double().mean()) < 0.05 + 0.0075
    tails = [sum(math.comb(200, c) * 0.1**c * 0.9 ** (200 - c) for c in range(k + 1)) for k in range(201)]
    lowest = next(k for k in range(201) if tails[k] > 0.025)
    assert int(found.lower[0]) == lowest


def test_ranks_are_checked() -> None:
    for ranks in (torch.tensor([0, 10]), torch.tensor([-1, 3]), torch.rand(4), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"integers in 0\.\.9"):
            ecdf_p_values(ranks, 9)
    with pytest.raises(ValueError, match="2 to 10 bins"):
        rank_histogram(torch.tensor([0, 9]), 9, 11)
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        ecdf_band(10, 9, 95.0)
