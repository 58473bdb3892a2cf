"""Scores against closed forms and naive loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bmaml_ppl.diagnostics import scores

F64 = torch.float64


def _draws_and_target(num_draws: int = 50, shape: tuple[int, ...] = (4, 6)) -> tuple[Tensor, Tensor]:
    return torch.randn(num_draws, *shape, dtype=F64), torch.randn(shape, dtype=F64)


def test_rmse_by_hand() -> None:
    mean, target = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 4.0, 1.0])
    assert scores.rmse(mean, target).item() == pytest.approx(math.sqrt(20 / 3))
    mask = torch.tensor([True, True, False])
    assert scores.rmse(mean, target, mask).item() == pytest.approx(math.sqrt(2))


def test_mixture_log_density_is_log_of_mean() -> None:
    log_likelihood = torch.randn(7, 3, dtype=F64)
    torch.testing.assert_close(scores.mixture_log_density(log_likelihood), log_likelihood.exp().mean(0).log())
    far = scores.mixture_log_density(torch.full((5, 2), -1e4))
    torch.testing.assert_close(far, torch.full((2,), -1e4))


@pytest.mark.parametrize("num_draws", [1, 2, 20, 101])
@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.99])
def test_interval_bounds_are_weibull_quantiles(num_draws: int, level: float) -> None:
    draws, _ = _draws_and_target(num_draws)
    lower, upper = scores.interval_bounds(draws, level)
    expected = np.quantile(draws.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
    np.testing.assert_allclose(torch.stack([lower, upper]).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_coverage_is_a_count() -> None:
    draws, target = _draws_and_target()
    lower, upper = scores.interval_bounds(draws, 0.5)
    pairs = zip(lower.ravel(), target.ravel(), upper.ravel(), strict=True)
    inside = [float(low <= y <= high) for low, y, high in pairs]
    assert scores.coverage(draws, target, 0.5).item() == pytest.approx(sum(inside) / len(inside))


@pytest.mark.parametrize("num_draws", [20, 40])
def test_exchangeable_draws_cover_their_level(num_draws: int) -> None:
    # 40,000 targets: standard error .0015; five of them give a false alarm once in a million.
    draws, target = _draws_and_target(num_draws, (40_000,))
    assert scores.coverage(draws, target, 0.9).item() == pytest.approx(0.9, abs=0.0075)


def test_interval_score_matches_its_definition() -> None:
    draws, target = _draws_and_target()
    lower, upper = scores.interval_bounds(draws, 0.8)
    alpha = 0.2
    naive = [
        (u - low) + 2 / alpha * (low - y) * (y < low) + 2 / alpha * (y - u) * (y > u)
        for low, u, y in zip(lower.ravel(), upper.ravel(), target.ravel(), strict=True)
    ]
    torch.testing.assert_close(scores.interval_score(draws, target, 0.8), torch.stack(naive).mean())


def test_calibration_error_by_naive_loop() -> None:
    draws, target = _draws_and_target(9, (5,))
    draws[:3, 0] = target[0]
    squares = []
    for level in np.linspace(0.05, 0.95, 20):
        shares = []
        for i in range(5):
            below, equal = int((draws[:, i] < target[i]).sum()), int((draws[:, i] == target[i]).sum())
            ranks = range(below, below + equal + 1)
            shares.append(np.mean(np.clip([(level * 10 - below) / len(ranks)] * len(ranks), 0, 1)))
        squares.append((np.mean(shares) - level) ** 2)
    assert scores.calibration_error(draws, target).item() == pytest.approx(math.sqrt(np.mean(squares)))


def test_calibration_error_tends_to_pacoh() -> None:
    target = 1.5 * torch.randn(200, dtype=F64)
    normal = torch.distributions.Normal(torch.zeros(200, dtype=F64), torch.ones(200, dtype=F64))
    levels = torch.linspace(0.05, 0.95, 20, dtype=F64)
    frequency = (normal.cdf(target)[:, None] <= levels).double().mean(0)
    pacoh = (frequency - levels).square().mean().sqrt()
    ours = scores.calibration_error(normal.sample((20_000,)), target)
    assert ours.item() == pytest.approx(pacoh.item(), abs=0.01)


@pytest.mark.parametrize("num_draws", [4, 20])
def test_calibration_error_vanishes_for_exchangeable_draws(num_draws: int) -> None:
    # Each frequency has standard error at most .0025 over 40,000 targets, so the RMS cannot near .0125.
    draws, target = _draws_and_target(num_draws, (40_000,))
    assert scores.calibration_error(draws, target).item() < 0.0125
    counts = torch.poisson(torch.full((num_draws + 1, 40_000), 2.0))
    assert scores.calibration_error(counts[1:], counts[0]).item() < 0.0125
    assert scores.calibration_error(0.3 * draws, target).item() > 0.1


def test_crps_by_naive_loop_and_closed_form() -> None:
    draws, target = _draws_and_target(30)
    naive = (draws - target).abs().mean(0) - (draws[:, None] - draws[None]).abs().mean((0, 1)) / 2
    torch.testing.assert_close(scores.crps(draws, target), naive.mean())
    # CRPS of N(0, 1) at 0 is (sqrt(2) - 1) / sqrt(pi).
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(4000) + 0.5) / 4000)[:, None]
    closed = (math.sqrt(2) - 1) / math.sqrt(math.pi)
    assert scores.crps(quantiles, torch.zeros(1)).item() == pytest.approx(closed, abs=1e-3)


MASKED = {
    "rmse": lambda draws, target, mask: scores.rmse(draws.mean(0), target, mask),
    "coverage": lambda draws, target, mask: scores.coverage(draws, target, 0.5, mask),
    "interval_score": lambda draws, target, mask: scores.interval_score(draws, target, 0.5, mask),
    "calibration_error": scores.calibration_error,
    "crps": scores.crps,
}


@pytest.mark.parametrize("name", MASKED)
def test_mask_leaves_padding_out(name: str) -> None:
    draws, target = _draws_and_target()
    mask = torch.rand(target.shape) < 0.6
    expected = MASKED[name](draws[:, mask], target[mask], None)
    torch.testing.assert_close(MASKED[name](draws, target, mask), expected)
    draws[:, ~mask] = torch.nan
    torch.testing.assert_close(MASKED[name](draws, target, mask), expected)
    assert MASKED[name](draws, target, torch.zeros_like(mask)).isnan()


@pytest.mark.parametrize("name", MASKED)
def test_scores_go_under_vmap(name: str) -> None:
    draws, target = _draws_and_target()
    mask = torch.rand(target.shape) < 0.6
    mask[:, 0] = True
    batched = torch.func.vmap(MASKED[name], in_dims=(1, 0, 0))(draws, target, mask)
    looped = [MASKED[name](draws[:, i], target[i], mask[i]) for i in range(4)]
    torch.testing.assert_close(batched, torch.stack(looped))


@pytest.mark.parametrize("name", MASKED)
def test_errors_name_the_shapes(name: str) -> None:
    draws, target = _draws_and_target()
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(4, 5\)"):
        MASKED[name](draws, target[:, :5], None)
    with pytest.raises(ValueError, match="torch.float64.*torch.bool"):
        MASKED[name](draws, target, target)


@pytest.mark.parametrize("level", [0.0, 1.0, 90.0])
def test_level_is_a_probability(level: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        scores.interval_bounds(torch.zeros(3, 2), level)
