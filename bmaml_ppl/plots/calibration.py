"""Are probabilities right? Reliability curves, probability integral transforms and ranks, with simultaneous bands."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from bmaml_ppl.diagnostics.scores import pit
from bmaml_ppl.diagnostics.uniformity import (
    ecdf_band,
    ecdf_cuts,
    ecdf_difference,
    ecdf_p_values,
    rank_histogram,
)
from bmaml_ppl.plots.style import BLUE, CYCLE, GREY, legend_above, lighten, make_axes, to_array

__all__ = ["plot_calibration", "plot_pit", "plot_sbc"]

_CELLS = 50
_MOST_BARS = 20
_MOST_EXACT = 2000
_TARGETS_A_BAR = 5


def plot_calibration(
    draws: Tensor,
    target: Tensor,
    ax: Axes | None = None,
    *,
    mask: Tensor | None = None,
    level: float = 0.95,
    labels: tuple[str, str] = ("nominal probability", "observed frequency"),
    title: str | None = None,
) -> Axes:
    """How often targets lie below their predictive quantiles, against how often they should.

    The curve of a calibrated prediction stays inside the band everywhere with the probability `level`, if targets are
    independent; those of one task share its posterior, so that the band is then too narrow. In the middle, a curve
    flatter than the diagonal is of too narrow a prediction and a steeper one of too wide a one; a curve above the
    diagonal throughout is of predictions that lie too high. Targets that equal draws are ranked among them at random,
    with a fixed seed.

    Args:
        draws: Predictive draws, (S, ...).
        target: What was observed, (...).
        ax: Where to draw; None makes a figure.
        mask: True where a target is real; None where all are.
        level: Probability of the band.
        labels: Of the axes.
        title: Of the axes.

    Raises:
        ValueError: If the shapes disagree, or no target is real.
    """
    ranks = _cells(pit(draws, target, mask, generator=torch.Generator().manual_seed(0)))
    ax = make_axes(ax, (4.8, 5.0))
    at = _with_ends(ecdf_cuts(_CELLS - 1) / _CELLS, last=1.0)
    _draw_band(ax, len(ranks), _CELLS - 1, level, at, middle=at)
    ax.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1, label="calibrated")
    ax.plot(at, _with_ends(ecdf_difference(ranks, _CELLS - 1)) + at, color=BLUE, lw=2, label=_count("targets", ranks))
    ax.set(xlabel=labels[0], ylabel=labels[1], xlim=(0, 1), ylim=(0, 1), aspect="equal")
    legend_above(ax, title, columns=2)
    return ax


def plot_pit(
    values: Tensor,
    ax: Axes | None = None,
    *,
    kind: Literal["ecdf", "histogram"] = "ecdf",
    level: float = 0.95,
    labels: tuple[str, str] | None = None,
    title: str | None = None,
) -> Axes:
    """Probability integral transforms of targets: their ECDF minus the uniform one, or their histogram.

    Those of a calibrated prediction are uniform: their ECDF, or all bars at once, stay inside the band with at least
    the probability `level`, if targets are independent. Too narrow a prediction has its values at both ends.

    Args:
        values: In [0, 1], of any shape, as `bmaml_ppl.diagnostics.scores.pit` returns them; NaN is padding.
        ax: Where to draw; None makes a figure.
        kind: "ecdf" or "histogram".
        level: Probability of the band.
        labels: Of the axes.
        title: Of the axes.

    Raises:
        ValueError: If values are outside [0, 1], there is none, or the kind is unknown.
    """
    if kind not in ("ecdf", "histogram"):
        raise ValueError(f'kind={kind!r} is not known; choose "ecdf" or "histogram"')
    ax = make_axes(ax)
    if kind == "ecdf":
        ranks = _cells(values)
        at = _with_ends(ecdf_cuts(_CELLS - 1) / _CELLS, last=1.0)
        _draw_band(ax, len(ranks), _CELLS - 1, level, at)
        ax.plot(at, _with_ends(ecdf_difference(ranks, _CELLS - 1)), color=BLUE, lw=2, label=_count("targets", ranks))
    else:
        _draw_bars(ax, values, level)
    shown = labels or ("probability integral transform", "ECDF minus uniform" if kind == "ecdf" else "targets")
    ax.set(xlabel=shown[0], ylabel=shown[1], xlim=(0, 1))
    legend_above(ax, title)
    return ax


def plot_sbc(
    ranks: Tensor,
    num_draws: int,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    labels: tuple[str, str] = ("rank / number of ranks", "ECDF minus uniform"),
    title: str | None = None,
) -> Axes:
    """Simulation-based calibration: the ECDF of each quantity's ranks, minus the uniform one.

    The curve of each quantity with a right posterior stays inside the band with at least the probability `level`; the
    legend tells the p-value of each curve, which is below 1 - level where it leaves the band. Of more than six
    quantities, the five with the smallest are named.

    Args:
        ranks: Ranks of N simulated truths among the posterior draws, for Q quantities, (N, Q), integers in 0..S.
        num_draws: S.
        ax: Where to draw; None makes a figure.
        names: Of the Q quantities; None numbers them.
        level: Probability of the band, for each quantity.
        labels: Of the axes.
        title: Of the axes.

    Raises:
        ValueError: If ranks are not (N, Q) integers in 0..S, or there is not one name a quantity.
    """
    if ranks.ndim != 2:
        raise ValueError(f"ranks have shape {tuple(ranks.shape)}; give (N, Q): of one quantity write ranks[:, None]")
    names = [f"quantity {i}" for i in range(ranks.shape[1])] if names is None else list(names)
    if len(names) != ranks.shape[1]:
        raise ValueError(f"got {len(names)} names for {ranks.shape[1]} quantities; give one for each")
    ax = make_axes(ax)
    at = _with_ends(ecdf_cuts(num_draws) / (num_draws + 1), last=1.0)
    _draw_band(ax, len(ranks), num_draws, level, at)
    curves, p_values = ecdf_difference(ranks, num_draws), ecdf_p_values(ranks, num_draws)
    order = p_values.argsort(stable=True).tolist()
    named = range(len(names)) if len(names) <= len(CYCLE) else sorted(order[: len(CYCLE) - 1])
    for i in (others := [i for i in order if i not in named]):
        label = f"{len(others)} others" if i == others[0] else None
        ax.plot(at, _with_ends(curves[:, i]), color=lighten(GREY, 0.6), lw=0.8, label=label)
    for i, (color, line) in zip(named, CYCLE, strict=False):
        label = f"{names[i]} (p = {p_values[i]:.2g})"
        ax.plot(at, _with_ends(curves[:, i]), color=color, ls=line, lw=1.8, label=label)
    ax.set(xlabel=labels[0], ylabel=labels[1], xlim=(0, 1))
    legend_above(ax, title)
    return ax


def _cells(values: Tensor, num: int = _CELLS) -> Tensor:
    """The cell of equal ones that each value in [0, 1] is in, (N,), without NaN."""
    real = values[~values.isnan()].double()
    if not real.numel() or real.min() < 0 or real.max() > 1:
        has = f"{real.min():.4g} to {real.max():.4g}" if real.numel() else "none"
        raise ValueError(f"probability integral transforms are in [0, 1], got {has}; write pit(draws, target, mask)")
    return (real * num).long().clamp(max=num - 1)


def _draw_band(
    ax: Axes, num: int, num_draws: int, level: float, at: np.ndarray, middle: np.ndarray | float = 0
) -> None:
    # The band of many values takes long, and is that of fewer ones, shrunk, to within 2 %.
    shrink = min(1.0, (_MOST_EXACT / num) ** 0.5)
    lower, upper = (shrink * _with_ends(bound) for bound in ecdf_band(min(num, _MOST_EXACT), num_draws, level))
    color, label = lighten(GREY, 0.25), f"{level:.0%} band, all at once"
    ax.fill_between(at, middle + lower, middle + upper, color=color, lw=0, label=label)
    if np.ndim(middle) == 0:
        ax.axhline(0, color=GREY, ls="--", lw=1, label="uniform")


def _draw_bars(ax: Axes, values: Tensor, level: float) -> None:
    num_bars = min(_MOST_BARS, max(2, int((~values.isnan()).sum()) // _TARGETS_A_BAR))
    ranks = _cells(values, num_bars)
    # Bonferroni's bound makes intervals of single bars one band for all.
    found = rank_histogram(ranks, num_bars - 1, num_bars, 1 - (1 - level) / num_bars)
    low, high = found.lower[0].item(), found.upper[0].item()
    ax.axhspan(low, high, color=lighten(GREY, 0.25), lw=0, label=f"{level:.0%} band, all at once")
    ax.axhline(found.expected[0].item(), color=GREY, ls="--", lw=1, label="uniform")
    edges = np.linspace(0, 1, num_bars + 1)
    ax.stairs(to_array(found.counts), edges, color=BLUE, lw=2, label=_count("targets", ranks))
    ax.set_ylim(0, 1.05 * max(high, int(found.counts.max())))


def _with_ends(values: Tensor, first: float = 0.0, last: float = 0.0) -> np.ndarray:
    return np.concatenate([[first], to_array(values), [last]])


def _count(what: str, ranks: Tensor) -> str:
    return f"{len(ranks)} {what}"
