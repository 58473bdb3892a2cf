"""Learning curves say what the history says: labels, medians and edges are read back from the axes."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes

from bmaml_ppl.learned import History
from bmaml_ppl.plots import draw_learning, plot_gradient_norm, plot_learning_curve


def _legend(ax: Axes) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def test_learning_curve_keeps_its_axis_and_marks_what_is_beyond() -> None:
    loss = [1000.0] + [10.0 - 0.1 * i for i in range(99)]
    ax = plot_learning_curve(History(loss, [1.0] * 100), window=5)
    assert ax.get_ylim()[1] < 20
    assert _legend(ax) == ["each step", "running median of 5", "beyond the axis"]
    np.testing.assert_array_equal(np.asarray(ax.lines[2].get_xdata()), [1])
    np.testing.assert_allclose(np.asarray(ax.lines[1].get_ydata())[50], loss[50])


def test_learning_curve_marks_what_is_below_too() -> None:
    loss = [10.0 - 0.1 * i for i in range(199)]
    loss[50] = -1000.0
    ax = plot_learning_curve(History(loss, [1.0] * 199), window=5)
    assert ax.get_ylim()[0] > -20
    assert _legend(ax)[-1] == "below the axis"
    np.testing.assert_array_equal(np.asarray(ax.lines[2].get_xdata()), [51])


def test_gradient_norm_is_logarithmic_where_it_can_be() -> None:
    assert plot_gradient_norm(History([1.0, 1.0], [1.0, 10.0])).get_yscale() == "log"
    assert plot_gradient_norm(History([1.0, 1.0], [0.0, 10.0])).get_yscale() == "linear"


def test_small_gradient_norms_are_labelled_without_powers() -> None:
    ax = plot_gradient_norm(History([1.0] * 3, [0.1, 0.3, 0.9]))
    ax.figure.canvas.draw()
    labels = [label.get_text() for label in (*ax.get_yticklabels(), *ax.get_yticklabels(minor=True))]
    assert "0.1" in labels
    assert not any("e" in label for label in labels)


def test_meta_steps_are_whole_numbers() -> None:
    ax = plot_learning_curve(History([3.0, 2.0, 1.0], [1.0] * 3))
    ax.figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_learning_figure_leaves_no_window_open() -> None:
    above, below = draw_learning(History([2.0, 1.0], [1.0, 10.0])).axes
    assert (above.get_ylabel(), below.get_ylabel()) == ("loss (mean over a batch of tasks)", "gradient norm")
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "meta-step")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("plot", [plot_learning_curve, plot_gradient_norm])
def test_an_empty_history_is_refused(plot: Callable[[History], Axes]) -> None:
    with pytest.raises(ValueError, match="empty after loading a prior"):
        plot(History())
