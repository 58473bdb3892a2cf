"""Learning curves of the outer loop."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from bmaml_ppl.learned import History
from bmaml_ppl.plots.style import BLUE, GREY, ORANGE, make_axes

__all__ = ["draw_learning", "plot_gradient_norm", "plot_learning_curve"]


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
    ax = make_axes(ax)
    loss = _entries(history.loss, "loss")
    smooth = _running_median(loss, window)
    steps = np.arange(1, len(loss) + 1)
    ax.plot(steps, loss, color=GREY, lw=0.6, alpha=0.6, label="each step")
    ax.plot(steps, smooth, color=BLUE, lw=2, label=f"running median of {min(window, len(loss))}")
    low, high = min(smooth.min(), np.quantile(loss, 0.01)), max(smooth.max(), np.quantile(loss, 0.97))
    pad = 0.05 * (high - low) or 1.0
    ax.set_ylim(low - pad, high + pad)
    for beyond, edge, marker in ((loss > high + pad, high + pad, "^"), (loss < low - pad, low - pad, "v")):
        if beyond.any():
            at = np.full(int(beyond.sum()), edge)
            ax.plot(steps[beyond], at, marker, color=GREY, ms=4, clip_on=False, label=_beyond(marker))
    ax.set(xlabel="meta-step", ylabel="loss (mean over a batch of tasks)")
    _finish(ax)
    return ax


def plot_gradient_norm(history: History, ax: Axes | None = None, *, window: int = 25) -> Axes:
    """The norm of the meta-gradient before clipping, on a logarithmic axis; arguments as `plot_learning_curve`."""
    ax = make_axes(ax)
    norm = _entries(history.grad_norm, "gradient norm")
    steps = np.arange(1, len(norm) + 1)
    ax.plot(steps, norm, color=GREY, lw=0.6, alpha=0.6, label="each step")
    ax.plot(
        steps, _running_median(norm, window), color=ORANGE, lw=2, label=f"running median of {min(window, len(norm))}"
    )
    if (norm > 0).all():
        ax.set_yscale("log")
        for axis_format in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis_format(_PlainLog(minor_thresholds=(2, 0.5)))
    ax.set(xlabel="meta-step", ylabel="gradient norm")
    _finish(ax)
    return ax


def draw_learning(history: History) -> Figure:
    """The loss above the gradient norm, as one figure that no window knows of: `figure.savefig(path)`."""
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    plot_learning_curve(history, above).set_xlabel("")
    plot_gradient_norm(history, below)
    return figure


class _PlainLog(LogFormatter):
    """Labels such as 0.4 where matplotlib writes 4e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _finish(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.legend(frameon=False)


def _beyond(marker: str) -> str:
    return "beyond the axis" if marker == "^" else "below the axis"


def _entries(values: Sequence[float], what: str) -> np.ndarray:
    if not values:
        raise ValueError(f"the history holds no {what}; it is there after meta_learn, and empty after loading a prior")
    return np.asarray(values)


def _running_median(values: np.ndarray, window: int) -> np.ndarray:
    half = window // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
