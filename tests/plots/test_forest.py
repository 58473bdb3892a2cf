"""The forest's rows are the tasks' quantiles, in the order and with the names that it shows."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from bmaml_ppl.diagnostics.scores import interval_bounds
from bmaml_ppl.plots import plot_forest

LEVELS = torch.tensor([0.0, 5.0, -5.0])
DRAWS = LEVELS + torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
NAMES = ["a", "b", "c"]


def _names(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def _segments(ax: Axes, index: int) -> np.ndarray:
    lines: Any = ax.collections[index]
    return np.array([[segment[0][0], segment[1][0], segment[0][1]] for segment in lines.get_segments()])


def test_rows_are_sorted_with_the_largest_median_on_top() -> None:
    ax = plot_forest(DRAWS, names=NAMES, labels=("growth (kg)", "pig"), title="Growth")
    assert _names(ax) == ["b", "a", "c"]
    assert ax.yaxis_inverted()
    median = np.asarray(ax.lines[0].get_xdata())
    np.testing.assert_allclose(median, DRAWS.median(0).values[[1, 0, 2]])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("growth (kg)", "pig", "Growth")


def test_given_order_is_kept_on_request() -> None:
    assert _names(plot_forest(DRAWS, names=NAMES, sort=False)) == NAMES


def test_intervals_are_those_of_the_scores() -> None:
    ax = plot_forest(DRAWS, names=NAMES, sort=False)
    for index, level in enumerate((0.9, 0.5)):
        lower, upper = interval_bounds(DRAWS, level)
        np.testing.assert_allclose(_segments(ax, index)[:, 0], lower, rtol=1e-6)
        np.testing.assert_allclose(_segments(ax, index)[:, 1], upper, rtol=1e-6)
        np.testing.assert_array_equal(_segments(ax, index)[:, 2], range(3))


def test_prior_and_truth_are_drawn_and_named() -> None:
    prior = torch.linspace(-1, 1, 999)
    ax = plot_forest(DRAWS, names=NAMES, prior=prior, truth=LEVELS)
    assert ax.get_legend_handles_labels()[1] == [
        "prior, 90% interval",
        "90% interval",
        "50% interval",
        "median",
        "truth",
    ]
    band: Any = ax.patches[0]
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((-0.9, 0.9), abs=5e-3)
    np.testing.assert_allclose(np.asarray(ax.lines[1].get_xdata()), LEVELS[[1, 0, 2]])


def test_a_name_is_shown_as_it_is_written() -> None:
    ax = plot_forest(DRAWS, names=["$10 and $20", "b", "c"])
    ax.figure.canvas.draw()
    assert "$10 and $20" in _names(ax)
    assert not any(label.get_parse_math() for label in ax.get_yticklabels())


def test_many_tasks_are_counted_instead_of_named() -> None:
    draws = torch.randn(50, 101, generator=torch.Generator().manual_seed(0))
    ax = plot_forest(draws)
    assert _names(ax) == []
    assert ax.get_ylabel() == "task (101, sorted by median)"


@pytest.mark.parametrize(
    ("draws", "more", "told"),
    [
        (DRAWS[:, :, None], {}, r"draws have shape \(400, 3, 1\)"),
        (DRAWS, {"names": ["a"]}, "1 names for 3 tasks"),
        (DRAWS, {"prior": DRAWS}, r"prior has shape \(400, 3\)"),
        (DRAWS, {"truth": LEVELS[:2]}, r"truth has shape \(2,\)"),
        (DRAWS * torch.nan, {}, "1200 non-finite"),
    ],
)
def test_wrong_shapes_are_refused(draws: torch.Tensor, more: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plot_forest(draws, **more)
