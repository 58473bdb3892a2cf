"""Scores against closed forms and naive loops."""

import math
from collections.abc import Callable

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


@pytest.mark.parametrize("residuals", ["rms", "absolute"])
def test_calibration_error_of_cdf_is_the_authors_formula(residuals: scores.Residuals) -> None:
    cdf = torch.rand(37, dtype=F64).square()
    gaps = [float((cdf <= q).double().mean()) - q for q in np.linspace(0.05, 0.95, 20)]
    expected = math.sqrt(np.mean(np.square(gaps))) if residuals == "rms" else np.mean(np.abs(gaps))
    assert scores.calibration_error_of_cdf(cdf, residuals=residuals).item() == pytest.approx(float(expected))


@pytest.mark.parametrize("residuals", ["rms", "absolute"])
def test_calibration_error_of_many_draws_is_that_of_their_cdf(residuals: scores.Residuals) -> None:
    target = 1.5 * torch.randn(30, dtype=F64)
    # 4,999 quantiles of a normal stand in for draws: ranks divided by 5,000 are its CDF within 1 / 5,000.
    draws = torch.distributions.Normal(0.0, 1.0).icdf(torch.arange(1, 5000, dtype=F64) / 5000)
    ours = scores.calibration_error(draws[:, None].expand(-1, 30), target, residuals=residuals)
    cdf = torch.distributions.Normal(0.0, 1.0).cdf(target)
    exact = scores.calibration_error_of_cdf(cdf, residuals=residuals)
    # A target whose CDF is that near to a level would count in part: none is.
    assert float((cdf[:, None] - torch.linspace(0.05, 0.95, 20, dtype=F64)).abs().min()) > 2e-4
    torch.testing.assert_close(ours, exact)


def test_residuals_are_known() -> None:
    with pytest.raises(ValueError, match='"rms" or "absolute"'):
        scores.calibration_error_of_cdf(torch.rand(3), residuals="squared")  # type: ignore[arg-type]


def test_pit_by_hand() -> None:
    draws = torch.tensor([1.0, 2.0, 2.0, 5.0])[:, None].expand(-1, 4)
    target = torch.tensor([0.0, 2.0, 3.0, 9.0])
    torch.testing.assert_close(scores.pit(draws, target), torch.tensor([0.1, 0.5, 0.7, 0.9]))
    counts = scores.pit(draws.long(), target.long())
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.5, 0.7, 0.9]))
    random = scores.pit(draws, target, generator=torch.Generator().manual_seed(0))
    low, high = torch.tensor([0.0, 1, 3, 4]) / 5, torch.tensor([1.0, 4, 4, 5]) / 5
    assert bool(((low <= random) & (random <= high)).all())


def test_pit_blanks_padding() -> None:
    draws, target = _draws_and_target()
    mask = torch.rand(target.shape) < 0.6
    values = scores.pit(draws, target, mask)
    assert torch.equal(values.isnan(), ~mask)
    torch.testing.assert_close(values[mask], scores.pit(draws[:, mask], target[mask]))


@pytest.mark.parametrize("discrete", [False, True])
def test_randomised_pit_is_uniform(discrete: bool) -> None:
    draws, target = _draws_and_target(7, (40_000,))
    if discrete:
        draws, target = draws.round(), target.round()
    values = scores.pit(draws, target, generator=torch.Generator().manual_seed(0)).sort().values
    distance = (values - torch.arange(1, 40_001, dtype=F64) / 40_000).abs().max()
    # Kolmogorov's 1 - 1e-6 quantile is 2.69 / sqrt(n).
    assert float(distance) < 2.69 / math.sqrt(40_000)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_energy_score_by_naive_loop(shape: tuple[int, ...]) -> None:
    draws, target = _draws_and_target(8, shape)
    total = []
    for x, y in zip(draws.reshape(8, -1, 3).unbind(1), target.reshape(-1, 3), strict=True):
        near = np.mean([float((a - y).norm()) for a in x])
        total.append(near - np.mean([[float((a - b).norm()) for a in x] for b in x]) / 2)
    assert scores.energy_score(draws, target).item() == pytest.approx(np.mean(total))
    far = scores.energy_score(draws + 1e6, target + 1e6)
    assert far.item() == pytest.approx(np.mean(total), abs=1e-6)


def test_energy_score_of_one_coordinate_is_the_crps() -> None:
    draws, target = _draws_and_target()
    torch.testing.assert_close(scores.energy_score(draws[..., None], target[..., None]), scores.crps(draws, target))


def test_energy_score_sees_dependence() -> None:
    first = torch.randn(2, 400, 50, dtype=F64)
    draws = torch.stack([first[0], first[0]], -1)
    target = torch.randn(50, 1, dtype=F64).expand(-1, 2)
    independent = torch.stack([first[0], first[1]], -1)
    assert scores.energy_score(draws, target) < scores.energy_score(independent, target)


def test_energy_score_leaves_masked_coordinates_out() -> None:
    draws, target = _draws_and_target(9, (4, 6))
    mask = torch.rand(target.shape) < 0.6
    mask[0], mask[1, 0] = False, True
    kept = [i for i in range(4) if mask[i].any()]
    each = [scores.energy_score(draws[:, i, mask[i]][:, None], target[i, mask[i]][None]) for i in kept]
    draws[:, ~mask] = torch.nan
    torch.testing.assert_close(scores.energy_score(draws, target, mask), torch.stack(each).mean())


def _labels(num: int = 200, classes: int = 4) -> tuple[Tensor, Tensor]:
    return torch.softmax(2 * torch.randn(num, classes, dtype=F64), -1), torch.randint(0, classes, (num,))


def test_expected_calibration_error_by_naive_loop() -> None:
    probabilities, labels = _labels()
    confidence, predicted = probabilities.max(-1)
    total = 0.0
    for m in range(1, 11):
        inside = [i for i in range(200) if (m - 1) / 10 < confidence[i] <= m / 10]
        if inside:
            accuracy = np.mean([float(predicted[i] == labels[i]) for i in inside])
            total += len(inside) / 200 * abs(float(accuracy) - float(confidence[inside].mean()))
    assert scores.expected_calibration_error(probabilities, labels, num_bins=10).item() == pytest.approx(total)


def test_expected_calibration_error_of_right_and_wrong_confidence() -> None:
    # 40,000 labels in 15 bins: the sum of |gaps| of calibrated ones is about .008, and cannot near .02.
    probabilities = torch.softmax(torch.randn(40_000, 3, dtype=F64), -1)
    labels = torch.multinomial(probabilities, 1)[:, 0]
    assert scores.expected_calibration_error(probabilities, labels).item() < 0.02
    sharper = torch.softmax(3 * probabilities.log(), -1)
    assert scores.expected_calibration_error(sharper, labels).item() > 0.1
    certain = torch.eye(3, dtype=F64)[labels]
    assert scores.expected_calibration_error(certain, labels).item() == 0


def test_brier_score_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    labels = torch.tensor([0, 1])
    expected = (0.09 + 0.04 + 0.01 + 0.01 + 0.81 + 0.64) / 2
    assert scores.brier_score(probabilities, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("score", [scores.brier_score, scores.expected_calibration_error])
def test_binary_probabilities_are_two_classes(score: Callable[..., Tensor]) -> None:
    probability, labels = torch.rand(50, dtype=F64), torch.randint(0, 2, (50,))
    torch.testing.assert_close(
        score(probability, labels), score(torch.stack([1 - probability, probability], -1), labels)
    )
    if score is scores.brier_score:
        torch.testing.assert_close(score(probability, labels), 2 * (probability - labels).square().mean())


@pytest.mark.parametrize("score", [scores.brier_score, scores.expected_calibration_error])
def test_classification_scores_take_masks_and_vmap(score: Callable[..., Tensor]) -> None:
    probabilities, labels = _labels(60)
    mask = torch.rand(60) < 0.6
    expected = score(probabilities[mask], labels[mask])
    batched = torch.func.vmap(score)(
        *(value.reshape(3, 20, *value.shape[1:]) for value in (probabilities, labels, mask))
    )
    looped = [score(probabilities[i : i + 20], labels[i : i + 20], mask[i : i + 20]) for i in (0, 20, 40)]
    torch.testing.assert_close(batched, torch.stack(looped))
    probabilities[~mask] = torch.nan
    torch.testing.assert_close(score(probabilities, labels, mask), expected)
    with pytest.raises(ValueError, match=r"\(60,\).*\(59,\)"):
        score(probabilities, labels[:-1])


MASKED = {
    "rmse": lambda draws, target, mask: scores.rmse(draws.mean(0), target, mask),
    "coverage": lambda draws, target, mask: scores.coverage(draws, target, 0.5, mask),
    "interval_score": lambda draws, target, mask: scores.interval_score(draws, target, 0.5, mask),
    "calibration_error": scores.calibration_error,
    "calibration_error_absolute": lambda d, t, m: scores.calibration_error(d, t, m, residuals="absolute"),
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
