"""Figures: each function draws on given axes (or new ones) and returns them; nothing is saved or shown here.

Colours are Okabe and Ito's, which readers with any common colour vision tell apart, and what differs in colour
differs in shape or line as well.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

from bmaml_ppl.diagnostics.scores import interval_bounds
from bmaml_ppl.learned import History

__all__ = ["draw_learning", "plot_gradient_norm", "plot_learning_curve", "plot_prior_predictive", "plot_task"]

BLUE, ORANGE, BLACK, GREY = "#0072B2", "#D55E00", "#000000", "#767676"

Points = tuple[Tensor, Tensor]
"""Inputs and outputs, (N,) each."""


def plot_learning_curve(history: History, ax: Axes | None = None, *, window: int = 25) -> Axes:
    """The meta-learning loss of each step, and its running median.

    The axis spans what the median spans (and most of the steps), so that one early outlier does not flatten
    the rest; steps beyond it are marked at the edge.

    Args:
        history: What the outer loop saw.
        ax: Where to draw; None makes a figure.
        window: Steps of the running median, centred.

    Raises:
        ValueError: If the history is empty, as it is after loading a prior.
    """
    ax = _axes(ax)
    loss = _entries(history.loss, "loss")
    smooth = _running_median(loss, window)
    steps = np.arange(1, len(loss) + 1)
    ax.plot(steps, loss, color=GREY, lw=0.6, alpha=0.6, label="each step")
    ax.plot(steps, smooth, color=BLUE, lw=2, label=f"running median of {min(window, len(loss))}")
    low, high = min(smooth.min(), np.quantile(loss, 0.01)), max(smooth.max(), np.quantile(loss, 0.97))
    pad = 0.05 * (high - low) or 1.0
    ax.set_ylim(low - pad, high + pad)
    if (beyond := (loss > high + pad)).any():
        edge = np.full(int(beyond.sum()), high + pad)
        ax.plot(steps[beyond], edge, "^", color=GREY, ms=4, clip_on=False, label="beyond the axis")
    ax.set(xlabel="meta-step", ylabel="loss (mean over a batch of tasks)")
    ax.legend(frameon=False)
    return ax


def plot_gradient_norm(history: History, ax: Axes | None = None, *, window: int = 25) -> Axes:
    """The norm of the meta-gradient before clipping, on a logarithmic axis; arguments as `plot_learning_curve`."""
    ax = _axes(ax)
    norm = _entries(history.grad_norm, "gradient norm")
    steps = np.arange(1, len(norm) + 1)
    ax.plot(steps, norm, color=GREY, lw=0.6, alpha=0.6, label="each step")
    ax.plot(
        steps, _running_median(norm, window), color=ORANGE, lw=2, label=f"running median of {min(window, len(norm))}"
    )
    if (norm > 0).all():
        ax.set_yscale("log")
        for axis_format in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis_format(LogFormatter(minor_thresholds=(2, 0.5)))
    ax.set(xlabel="meta-step", ylabel="gradient norm")
    ax.legend(frameon=False)
    return ax


def draw_learning(history: History) -> Figure:
    """The loss above the gradient norm, as one figure that no window knows of: `figure.savefig(path)`."""
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    plot_learning_curve(history, above).set_xlabel("")
    plot_gradient_norm(history, below)
    return figure


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
        ValueError: If the draws are not (S, N).
    """
    ax = _fan(draws, x, _axes(ax), levels)
    ax.plot(*_arrays(support), "o", color=BLACK, ms=6, label="seen")
    if query is not None:
        ax.plot(*_arrays(query), "s", mfc="white", mec=ORANGE, mew=1.5, ms=5, label="held out")
    ax.set(xlabel=labels[0], ylabel=labels[1], title=title)
    return ax


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

    Args:
        draws: Prior predictive draws, (S, N), in the units of the output.
        x: Where they were drawn, (N,), ascending.
        ax: Where to draw; None makes a figure.
        tasks: Observations of real tasks, drawn as thin lines.
        levels: Probabilities of the bands.
        labels: Of the axes, with units.
        task_label: What the legend calls a real task.
        title: Of the axes.

    Raises:
        ValueError: If the draws are not (S, N).
    """
    ax = _fan(draws, x, _axes(ax), levels)
    for i, task in enumerate(tasks):
        ax.plot(*_arrays(task), color=BLACK, lw=0.5, alpha=0.5, label=task_label if i == 0 else None)
    ax.set(xlabel=labels[0], ylabel=labels[1], title=title)
    return ax


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _arrays(points: Points) -> tuple[Any, Any]:
    return points[0].cpu().numpy(), points[1].cpu().numpy()


def _fan(draws: Tensor, x: Tensor, ax: Axes, levels: Sequence[float]) -> Axes:
    if draws.ndim != 2 or x.ndim != 1 or draws.shape[1] != len(x):
        raise ValueError(
            f"draws have shape {tuple(draws.shape)} and x {tuple(x.shape)}; give the draws of one task, (S, N), and "
            "x, (N,): for one task of a batch write draws[:, i]"
        )
    at = x.cpu().numpy()
    for i, level in enumerate(sorted(levels, reverse=True)):
        lower, upper = (bound.cpu().numpy() for bound in interval_bounds(draws, level))
        # Opaque, so that a band has the colour of its legend where it lies over another.
        ax.fill_between(at, lower, upper, color=_lighten(BLUE, 0.2 + 0.3 * i), lw=0, label=f"{level:.0%} interval")
    ax.plot(at, draws.median(0).values.cpu().numpy(), color=BLUE, lw=2, label="median")
    return ax


def _lighten(color: str, strength: float) -> tuple[float, ...]:
    strength = min(strength, 1.0)
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(color))


def _entries(values: Sequence[float], what: str) -> np.ndarray:
    if not values:
        raise ValueError(f"the history holds no {what}; it is there after meta_learn, and empty after loading a prior")
    return np.asarray(values)


def _running_median(values: np.ndarray, window: int) -> np.ndarray:
    half = window // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
