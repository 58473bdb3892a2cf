"""Fan charts say what the numbers say: labels, bands, points and axes are read back from the axes."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from bmaml_ppl.diagnostics.scores import interval_bounds
from bmaml_ppl.learned import History
from bmaml_ppl.plots import plot_learning_curve, plot_prior_predictive, plot_task

X = torch.linspace(0, 1, 5)
DRAWS = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))


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


def test_own_axes_have_a_legend_and_given_ones_share() -> None:
    assert plot_task(DRAWS, X, (X, X)).get_legend() is not None
    assert plot_prior_predictive(DRAWS, X).get_legend() is not None
    assert plot_task(DRAWS, X, (X, X), ax=plt.subplots()[1]).get_legend() is None


def test_prior_predictive_lists_real_tasks_once_in_the_order_of_their_inputs() -> None:
    ax = plot_prior_predictive(DRAWS, X, tasks=[(X, X), (X.flip(0), 2 * X.flip(0))], task_label="one pig")
    assert _legend(ax) == ["90% interval", "50% interval", "median", "one pig"]
    assert len(ax.lines) == 3
    np.testing.assert_allclose(_array(ax.lines[2].get_xdata()), X)
    np.testing.assert_allclose(_array(ax.lines[2].get_ydata()), 2 * X)


def test_draws_of_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"draws have shape \(200, 1, 5\)"):
        plot_task(DRAWS[:, None], X, (X, X))


def test_padded_draws_are_refused() -> None:
    draws = DRAWS.clone()
    draws[:, 4] = torch.nan
    with pytest.raises(ValueError, match="200 non-finite of 1000 values; padded rows"):
        plot_task(draws, X, (X, X))


def test_inputs_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="x does not ascend"):
        plot_prior_predictive(DRAWS, X.flip(0))
