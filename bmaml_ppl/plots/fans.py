"""Fan charts of predictions."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from torch import Tensor

from bmaml_ppl.diagnostics.scores import interval_bounds
from bmaml_ppl.plots.style import BLACK, BLUE, ORANGE, check_finite, lighten, make_axes, to_array

__all__ = ["Points", "plot_prior_predictive", "plot_task"]

Points = tuple[Tensor, Tensor]
"""Inputs and outputs, (N,) each."""


def plot_task(
    draws: Tensor,
    x: Tensor,
    support: Points,
    query: Points | None = None,
    ax: Axes | None = None,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    labels: tuple[str, str] = ("input", "output"),
    title: str | None = None,
) -> Axes:
    """A fan chart of one task: median and central bands of its predictions, points seen and points held out.

    Axes of its own have a legend; on given axes none is drawn, so that panels can share one.

    Args:
        draws: Predictive draws, (S, N), in the units of the output.
        x: Where they were drawn, (N,), ascending.
        support: What the task adapted to.
        query: What it did not see.
        ax: Where to draw; None makes a figure.
        levels: Probabilities of the bands.
        labels: Of the axes, with units.
        title: Of the axes.

    Raises:
        ValueError: If the draws are not (S, N) or not finite, or x does not ascend.
    """
    drawn = _fan(draws, x, make_axes(ax), levels)
    drawn.plot(*_arrays(support), "o", color=BLACK, ms=6, ls="none", label="seen")
    if query is not None:
        drawn.plot(*_arrays(query), "s", mfc="white", mec=ORANGE, mew=1.5, ms=5, label="held out")
    drawn.set(xlabel=labels[0], ylabel=labels[1], title=title)
    return _with_legend(drawn, ax)


def plot_prior_predictive(
    draws: Tensor,
    x: Tensor,
    ax: Axes | None = None,
    *,
    tasks: Sequence[Points] = (),
    levels: Sequence[float] = (0.5, 0.9),
    labels: tuple[str, str] = ("input", "output"),
    task_label: str = "one task",
    title: str | None = None,
) -> Axes:
    """A fan chart of what the prior expects of a task before any observation, over the curves of real tasks.

    Axes of its own have a legend, as those of `plot_task`.

    Args:
        draws: Prior predictive draws, (S, N), in the units of the output.
        x: Where they were drawn, (N,), ascending.
        ax: Where to draw; None makes a figure.
        tasks: Observations of real tasks, drawn as thin lines in the order of their inputs.
        levels: Probabilities of the bands.
        labels: Of the axes, with units.
        task_label: What the legend calls a real task.
        title: Of the axes.

    Raises:
        ValueError: If the draws are not (S, N) or not finite, or x does not ascend.
    """
    drawn = _fan(draws, x, make_axes(ax), levels)
    for i, (inputs, outputs) in enumerate(tasks):
        order = inputs.argsort(stable=True)
        points = _arrays((inputs[order], outputs[order]))
        drawn.plot(*points, color=BLACK, lw=0.5, alpha=0.5, label=task_label if i == 0 else None)
    drawn.set(xlabel=labels[0], ylabel=labels[1], title=title)
    return _with_legend(drawn, ax)


def _arrays(points: Points) -> tuple[Any, Any]:
    return to_array(points[0]), to_array(points[1])


def _fan(draws: Tensor, x: Tensor, ax: Axes, levels: Sequence[float]) -> Axes:
    if draws.ndim != 2 or x.ndim != 1 or draws.shape[1] != len(x):
        raise ValueError(
            f"draws have shape {tuple(draws.shape)} and x {tuple(x.shape)}; give the draws of one task, (S, N), and "
            "x, (N,): for one task of a batch write draws[:, i]"
        )
    check_finite("draws", draws)
    if bool((x.diff() < 0).any()):
        raise ValueError("x does not ascend, and the bands would fold; write x, order = x.sort() and draws[:, order]")
    at = to_array(x)
    for i, level in enumerate(sorted(levels, reverse=True)):
        lower, upper = (to_array(bound) for bound in interval_bounds(draws, level))
        ax.fill_between(at, lower, upper, color=lighten(BLUE, 0.2 + 0.3 * i), lw=0, label=f"{level:.0%} interval")
    ax.plot(at, to_array(draws.median(0).values), color=BLUE, lw=2, label="median")
    return ax


def _with_legend(ax: Axes, given: Axes | None) -> Axes:
    if given is None:
        ax.legend(frameon=False)
    return ax
