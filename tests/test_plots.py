"""Figures say what the numbers say: labels, bands, points and axes are read back from the axes."""

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from bmaml_ppl.diagnostics.scores import interval_bounds
from bmaml_ppl.learned import History
from bmaml_ppl.plots import draw_learning, plot_gradient_norm, plot_learning_curve, plot_prior_predictive, plot_task

X = torch.linspace(0, 1, 5)
DRAWS = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def _array(values: Any) -> np.ndarray:
    return np.asarray(values)


def _legend(ax: Axes) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def test_task_shows_bands_median_and_both_kinds_of_points() -> None:
    ax = plot_task(DRAWS, X, (X[:2], X[:2]), (X[2:], X[2:]), labels=("time (weeks)", "weight (kg)"), title="a")
    assert _legend(ax) == ["90% interval", "50% interval", "median", "seen", "held out"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("time (weeks)", "weight (kg)", "a")
    lower, upper = interval_bounds(DRAWS, 0.9)
    band = _array(ax.collections[0].get_paths()[0].vertices)
    assert band[:, 1].min() == pytest.approx(lower.min().item())
    assert band[:, 1].max() == pytest.approx(upper.max().item())
    median, seen, held_out = ax.lines
    np.testing.assert_allclose(_array(median.get_ydata()), DRAWS.median(0).values)
    assert (_array(seen.get_xdata()).size, _array(held_out.get_xdata()).size) == (2, 3)
    assert seen.get_marker() != held_out.get_marker()


def test_bands_differ_in_lightness_and_have_the_colour_of_their_legend() -> None:
    ax = plot_task(DRAWS, X, (X, X))
    wide, narrow = (_array(band.get_facecolor())[0] for band in ax.collections)
    assert wide[:3].sum() > narrow[:3].sum() + 0.3
    assert wide[3] == narrow[3] == 1


def test_given_axes_are_drawn_on_and_returned() -> None:
    _, ax = plt.subplots()
    assert plot_task(DRAWS, X, (X, X), ax=ax) is ax
    assert plot_learning_curve(History([1.0], [1.0]), ax) is ax


def test_prior_predictive_lists_real_tasks_once() -> None:
    ax = plot_prior_predictive(DRAWS, X, tasks=[(X, X), (X, 2 * X)], task_label="one pig")
    assert _legend(ax) == ["90% interval", "50% interval", "median", "one pig"]
    assert len(ax.lines) == 3


def test_draws_of_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"draws have shape \(200, 1, 5\)"):
        plot_task(DRAWS[:, None], X, (X, X))


def test_learning_curve_keeps_its_axis_and_marks_what_is_beyond() -> None:
    loss = [1000.0] + [10.0 - 0.1 * i for i in range(99)]
    ax = plot_learning_curve(History(loss, [1.0] * 100), window=5)
    assert ax.get_ylim()[1] < 20
    assert _legend(ax) == ["each step", "running median of 5", "beyond the axis"]
    np.testing.assert_array_equal(_array(ax.lines[2].get_xdata()), [1])
    np.testing.assert_allclose(_array(ax.lines[1].get_ydata())[50], loss[50])


def test_gradient_norm_is_logarithmic_where_it_can_be() -> None:
    assert plot_gradient_norm(History([1.0, 1.0], [1.0, 10.0])).get_yscale() == "log"
    assert plot_gradient_norm(History([1.0, 1.0], [0.0, 10.0])).get_yscale() == "linear"


def test_learning_figure_leaves_no_window_open() -> None:
    above, below = draw_learning(History([2.0, 1.0], [1.0, 10.0])).axes
    assert (above.get_ylabel(), below.get_ylabel()) == ("loss (mean over a batch of tasks)", "gradient norm")
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "meta-step")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("plot", [plot_learning_curve, plot_gradient_norm])
def test_an_empty_history_is_refused(plot: Callable[[History], Axes]) -> None:
    with pytest.raises(ValueError, match="empty after loading a prior"):
        plot(History())
