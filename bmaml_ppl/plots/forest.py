"""One latent of many tasks side by side."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from bmaml_ppl.diagnostics.scores import interval_bounds
from bmaml_ppl.plots.style import BLUE, GREY, ORANGE, check_finite, legend_above, lighten, make_axes, to_array

__all__ = ["plot_forest"]

_INCHES_PER_TASK = 0.2
_MOST_NAMES = 100
_WIDE, _NARROW = 0.9, 0.5


def plot_forest(
    draws: Tensor,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
    prior: Tensor | None = None,
    truth: Tensor | None = None,
    sort: bool = True,
    labels: tuple[str, str] = ("latent", "task"),
    title: str | None = None,
) -> Axes:
    """Median, 50 % and 90 % interval of one latent of many tasks, a row each, the largest median on top.

    More than 100 tasks are drawn without their names.

    Args:
        draws: Posterior draws of the latent, (S, T).
        ax: Where to draw; None makes a figure as high as the tasks need.
        names: Of the T tasks; None numbers them from 0.
        prior: Prior draws of the same latent, (S',): its 90 % interval is a band behind the tasks.
        truth: What each task's latent is, (T,), where that is known.
        sort: Whether tasks are sorted by their median; else the first is on top.
        labels: Of the axes, with units.
        title: Of the axes.

    Raises:
        ValueError: If draws are not (S, T) or not finite, or names, prior or truth have another shape.
    """
    names = [str(i) for i in range(draws.shape[-1])] if names is None else list(names)
    _check(draws, names, prior, truth)
    ax = make_axes(ax, (6.4, 1.4 + _INCHES_PER_TASK * min(max(len(names), 6), _MOST_NAMES)))
    median = draws.median(0).values
    order = median.argsort(descending=True, stable=True) if sort else torch.arange(len(names))
    rows = np.arange(len(names))
    if prior is not None:
        low, high = (bound.item() for bound in interval_bounds(prior, _WIDE))
        ax.axvspan(low, high, color=lighten(GREY, 0.2), lw=0, label=f"prior, {_WIDE:.0%} interval", zorder=0)
    for level, width, strength in ((_WIDE, 1.5, 0.6), (_NARROW, 4.0, 1.0)):
        low, high = (to_array(bound[order]) for bound in interval_bounds(draws, level))
        ax.hlines(rows, low, high, color=lighten(BLUE, strength), lw=width, label=f"{level:.0%} interval")
    ax.plot(to_array(median[order]), rows, "o", mfc="white", mec=BLUE, mew=1.5, ms=5, label="median")
    if truth is not None:
        ax.plot(to_array(truth[order]), rows, "x", color=ORANGE, mew=2, ms=6, label="truth")
    ax.set(xlabel=labels[0], ylabel=labels[1], ylim=(len(names) - 0.4, -0.6))
    if len(names) <= _MOST_NAMES:
        ax.set_yticks(rows, [names[i] for i in order.tolist()], parse_math=False)
    else:
        ax.set(yticks=[], ylabel=f"{labels[1]} ({len(names)}{', sorted by median' if sort else ''})")
    legend_above(ax, title)
    return ax


def _check(draws: Tensor, names: list[str], prior: Tensor | None, truth: Tensor | None) -> None:
    if draws.ndim != 2:
        raise ValueError(
            f"draws have shape {tuple(draws.shape)}; give one latent of T tasks, (S, T): of a site of several "
            "coordinates write sites['coef'][:, :, 0]"
        )
    if len(names) != draws.shape[1]:
        raise ValueError(f"got {len(names)} names for {draws.shape[1]} tasks; give one a task, posterior.names")
    if prior is not None and prior.ndim != 1:
        raise ValueError(f"prior has shape {tuple(prior.shape)}; give draws of the same one latent, (S,)")
    if truth is not None and truth.shape != draws.shape[1:]:
        raise ValueError(f"truth has shape {tuple(truth.shape)}; give one value a task, {tuple(draws.shape[1:])}")
    check_finite("draws", draws)
