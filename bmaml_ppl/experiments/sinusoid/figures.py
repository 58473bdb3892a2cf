"""The figures of the study's scores."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bmaml_ppl.experiments.sinusoid.recipes import FAIR, RECIPES, RELEASED
from bmaml_ppl.plots.style import BLACK, BLUE, GREEN, ORANGE, PURPLE

__all__ = ["PUBLISHED", "draw_figure_1", "draw_methods", "mean_and_interval", "size_of"]

Cells = Sequence[Mapping[str, Any]]

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
_MARKERS = ("o", "s", "^", "D")
_T = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
)  # 97.5 % quantiles of Student's t, from 1 degree of freedom

PUBLISHED: dict[str, dict[int, float]] = {
    "BMAML, published": {5: 2.042, 10: 1.371, 20: 0.844},
    "best learner, published": {5: 0.867, 10: 0.061, 20: 0.005},
    "Bayes limit": {5: 0.0086, 10: 0.00037, 20: 0.00012},
}
"""MSE by K: Tossou et al. (2019), Adaptive Deep Kernel Learning, for BMAML (of the last layer) and ADKL-KRR; the
posterior of amplitude, frequency and phase on a fine grid for the limit."""


def draw_figure_1(cells: Cells) -> Figure:
    """MSE against the number of training tasks: a row the released and the fair settings, a column a K.

    Points are means over seeds; bars are 95 % intervals of Student's t over the seeds.
    """
    shots = sorted({cell["asked"]["shots"] for cell in cells})
    figure = Figure(figsize=(4.4 * len(shots) + 1, 7.4), layout="constrained")
    axes = figure.subplots(2, len(shots), squeeze=False, sharex=True, sharey=True)
    for row, (names, title) in enumerate(((RELEASED, "as released"), (FAIR, "one likelihood, one metric"))):
        for column, k in enumerate(shots):
            chosen = [cell for cell in cells if cell["asked"]["shots"] == k]
            _draw_against_tasks(axes[row, column], chosen, tuple(names), released=row == 0)
            axes[row, column].set_title(f"{title}, K = {k}")
            axes[row, column].set_ylabel("MSE" if column == 0 else "")
        axes[row, 0].legend(frameon=False, fontsize=9)
    for ax in axes[1]:
        ax.set_xlabel("training tasks |T|")
    axes[0, 0].set_ylim(0, None)  # of all, once all are drawn
    return figure


def _draw_against_tasks(ax: Axes, cells: Cells, names: Sequence[str], *, released: bool) -> None:
    sizes = sorted({size_of(cell) for cell in cells})
    for i, name in enumerate(names):
        # The released code scores EMAML by its members and BMAML by the mean of its members.
        metric = "member_mse" if released and not name.startswith("bmaml") else "mse"
        at, means, bars = [], [], []
        for position, size in enumerate(sizes):
            values = [c["scores"][metric] for c in cells if c["asked"]["recipe"] == name and size_of(c) == size]
            if values:
                at.append(position + 0.06 * (i - (len(names) - 1) / 2))
                mean, half = mean_and_interval(values)
                means.append(mean)
                bars.append(half)
        label = RECIPES[name].title + (" (members)" if metric == "member_mse" and name != "maml_released" else "")
        ax.errorbar(
            at,
            means,
            bars if any(bars) else None,
            fmt=f"{_MARKERS[i]}-",
            color=_COLOURS[i],
            capsize=3,
            label=label,
            lw=1.2,
            ms=5,
        )
    ax.set_xticks(range(len(sizes)), ["∞" if size == float("inf") else f"{size:,.0f}" for size in sizes])


def size_of(cell: Mapping[str, Any]) -> float:
    """Training tasks of a cell."""
    return float("inf") if cell["asked"]["tasks"] is None else cell["asked"]["tasks"]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """A mean, and half of its 95 % interval by Student's t, 0 of one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    deviation = sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, _T[min(len(values) - 2, len(_T) - 1)] * deviation / sqrt(len(values))


def draw_methods(cells: Cells) -> Figure:
    """MSE by method and K on a logarithmic axis, with the published numbers and the limit as lines."""
    shots = sorted({cell["asked"]["shots"] for cell in cells})
    names = list(dict.fromkeys(cell["asked"]["recipe"] for cell in cells))
    figure = Figure(figsize=(3.6 * len(shots) + 2.4, 0.34 * len(names) + 1.8), layout="constrained")
    axes = figure.subplots(1, len(shots), squeeze=False, sharey=True)[0]
    for ax, k in zip(axes, shots, strict=True):
        for row, name in enumerate(names):
            for cell in cells:
                if cell["asked"]["recipe"] == name and cell["asked"]["shots"] == k:
                    score = cell["scores"]
                    ax.errorbar(score["mse"], row, xerr=2 * score["mse_error"], fmt="o", color=BLACK, ms=5, capsize=3)
        for (label, values), colour, style in zip(PUBLISHED.items(), _COLOURS, ("-", "--", ":"), strict=False):
            if k in values:
                ax.axvline(values[k], color=colour, ls=style, label=label)
        ax.set(xscale="log", xlabel="MSE (± 2 standard errors)", title=f"K = {k}")
        ax.grid(axis="y", color="#DDDDDD", lw=0.6)
    axes[0].set_yticks(range(len(names)), [RECIPES[name].title for name in names])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
