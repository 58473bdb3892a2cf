"""Curves are the shares that they claim, right predictions stay in the bands, and wrong ones leave them."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor

from bmaml_ppl.diagnostics.scores import pit
from bmaml_ppl.diagnostics.uniformity import ecdf_band, ecdf_difference
from bmaml_ppl.plots import plot_calibration, plot_pit, plot_sbc

NUM = 200


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _predictions(spread: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = _generator()
    target = torch.randn(NUM, generator=generator)
    return shift + spread * torch.randn(999, NUM, generator=generator), target


def _curve(ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    line = ax.lines[-1]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def _band(ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Bounds at the points of the curve."""
    vertices: Any = ax.collections[0].get_paths()[0].vertices
    num = len(_curve(ax)[0])
    return vertices[1 : num + 1, 1], vertices[num + 2 : 2 * num + 2, 1][::-1]


def _stays(ax: Axes) -> bool:
    lower, upper = _band(ax)
    curve = _curve(ax)[1]
    return bool(((lower <= curve + 1e-9) & (curve <= upper + 1e-9)).all())


def _legend(ax: Axes) -> list[str]:
    return ax.get_legend_handles_labels()[1]


# A right prediction leaves the band for at most 5 % of the seeds; this one does not.
@pytest.mark.parametrize(
    ("spread", "shift", "inside"), [(1.0, 0.0, True), (0.5, 0.0, False), (2.0, 0.0, False), (1.0, 0.5, False)]
)
def test_only_calibrated_predictions_stay_inside_the_band(spread: float, shift: float, inside: bool) -> None:
    draws, target = _predictions(spread, shift)
    assert _stays(plot_calibration(draws, target)) is inside
    assert _stays(plot_pit(pit(draws, target))) is inside


def test_calibration_curve_is_the_share_of_targets_below_each_quantile() -> None:
    draws, target = _predictions(spread=0.5)
    ax = plot_calibration(draws, target, title="a")
    nominal, observed = _curve(ax)
    below = [(target < draws.quantile(q, dim=0)).float().mean() for q in nominal[1:-1]]
    np.testing.assert_allclose(observed[1:-1], below, atol=1.5 / NUM)
    assert _legend(ax) == ["95% band, all at once", "calibrated", "200 targets"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("nominal probability", "observed frequency", "a")


def test_bands_are_those_of_the_counts() -> None:
    draws, target = _predictions()
    for ax, middle in ((plot_calibration(draws, target), 1.0), (plot_pit(pit(draws, target)), 0.0)):
        lower, upper = (bound.numpy() for bound in ecdf_band(NUM, 49))
        at = middle * _curve(ax)[0][1:-1]
        np.testing.assert_allclose(_band(ax)[0][1:-1], lower + at, atol=1e-6)
        np.testing.assert_allclose(_band(ax)[1][1:-1], upper + at, atol=1e-6)


def test_band_of_many_targets_is_narrower() -> None:
    values = torch.rand(8000, generator=_generator())
    few, many = (np.ptp(np.stack(_band(plot_pit(values[:n]))), axis=0).max() for n in (2000, 8000))
    assert many == pytest.approx(few / 2)


def test_masked_targets_do_not_count() -> None:
    draws, target = _predictions()
    mask = torch.arange(NUM) < 50
    masked = plot_calibration(draws, target.masked_fill(~mask, 1e6), mask=mask)
    np.testing.assert_array_equal(_curve(masked)[1], _curve(plot_calibration(draws[:, :50], target[:50]))[1])
    assert _legend(masked)[-1] == "50 targets"
    assert _legend(plot_pit(pit(draws, target, mask)))[-1] == "50 targets"


def test_counts_are_calibrated_though_they_tie() -> None:
    rate = torch.tensor(2.0)
    draws = torch.poisson(rate.expand(500, NUM), generator=_generator())
    target = torch.poisson(rate.expand(NUM), generator=torch.Generator().manual_seed(1))
    assert _stays(plot_calibration(draws, target))


def test_histogram_counts_targets_and_shows_too_narrow_predictions() -> None:
    draws, target = _predictions(spread=0.5)
    ax = plot_pit(pit(draws, target), kind="histogram")
    bars: Any = ax.patches[1].get_data()  # type: ignore[attr-defined]
    assert bars.values.sum() == NUM
    span: Any = ax.patches[0]
    high = span.get_y() + span.get_height()
    assert bars.values[0] > high
    assert bars.values[-1] > high
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylabel() == "targets"


def test_ranks_of_each_quantity_are_drawn_and_judged() -> None:
    ranks = torch.randint(0, 100, (300, 2), generator=_generator())
    ranks[:, 1] //= 2
    ax = plot_sbc(ranks, 99, names=["slope", "noise"], title="SBC")
    np.testing.assert_allclose(np.asarray(ax.lines[1].get_ydata())[1:-1], ecdf_difference(ranks, 99)[:, 0])
    right, wrong = _legend(ax)[2:]
    assert right.startswith("slope (p = 0.")
    assert wrong.startswith("noise (p = ")
    assert not _stays(ax)
    assert ax.lines[1].get_linestyle() != ax.lines[2].get_linestyle()


def test_of_many_quantities_the_suspicious_ones_are_named() -> None:
    ranks = torch.randint(0, 20, (200, 12), generator=_generator())
    ranks[:, 7] //= 2
    labels = _legend(plot_sbc(ranks, 19, names=[f"site {i}" for i in range(12)]))
    assert "7 others" in labels
    assert any(label.startswith("site 7 (p = ") for label in labels)
    assert len(labels) == 2 + 1 + 5


@pytest.mark.parametrize(
    ("plot", "told"),
    [
        (lambda: plot_calibration(torch.zeros(9, 3), torch.zeros(4)), "must be equal"),
        (lambda: plot_pit(torch.tensor([0.5, 1.2])), "got 0.5 to 1.2"),
        (lambda: plot_pit(torch.tensor([torch.nan])), "got none"),
        (lambda: plot_pit(torch.tensor([0.5]), kind="bars"), 'choose "ecdf" or "histogram"'),  # type: ignore[arg-type]
        (lambda: plot_sbc(torch.zeros(5).long(), 9), r"ranks have shape \(5,\)"),
        (lambda: plot_sbc(torch.zeros(5, 2).long(), 9, names=["a"]), "1 names for 2 quantities"),
        (lambda: plot_sbc(torch.full((5, 1), 10), 9), "integers in 0..9"),
    ],
)
def test_what_is_no_probability_or_rank_is_refused(plot: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plot()
