"""One task's latents: against their prior, and on their way from it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from bmaml_ppl.plots.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    check_finite,
    flatten_sites,
    legend_above,
    lighten,
    make_axes,
    to_array,
)

__all__ = ["plot_particles", "plot_prior_posterior"]

_FEW = 50
_MOST_BINS = 60
_MANY = 200
_SHOWN = (0.005, 0.995)


def plot_prior_posterior(
    prior: Tensor,
    posterior: Tensor,
    ax: Axes | None = None,
    *,
    truth: float | None = None,
    labels: tuple[str, str] = ("latent", "density"),
    title: str | None = None,
) -> Axes:
    """Histograms of one latent coordinate before and after a task's observations, both of area 1.

    The axis spans 99 % of either's draws, and less of heavy tails. Up to 50 posterior draws are marked below as
    well, since a histogram of few particles shows its bins; draws that are all equal are one vertical line.

    Args:
        prior: Prior draws of the coordinate, (S,).
        posterior: Posterior draws, (S',).
        ax: Where to draw; None makes a figure.
        truth: What it is, where that is known.
        labels: Of the axes, with units.
        title: Of the axes.

    Raises:
        ValueError: If the draws are not (S,), or not finite.
    """
    for name, draws in (("prior", prior), ("posterior", posterior)):
        if draws.ndim != 1:
            raise ValueError(
                f"{name} draws have shape {tuple(draws.shape)}; give one coordinate, (S,): sites['coef'][:, 0]"
            )
        check_finite(f"{name} draws", draws)
    ax = make_axes(ax)
    before, after = to_array(prior), to_array(posterior)
    ax.set_xlim(*_span(before, after, truth))
    _draw_histogram(ax, before, "prior", {"color": lighten(GREY, 0.35), "fill": True})
    _draw_histogram(ax, after, "posterior", {"color": BLUE, "lw": 2})
    if len(after) <= _FEW:
        ax.plot(after, np.zeros(len(after)), "|", color=BLACK, ms=12, label="posterior draws", clip_on=False)
    if truth is not None:
        ax.axvline(truth, color=ORANGE, ls="--", lw=2, label="truth")
    ax.set(xlabel=labels[0], ylabel=labels[1], title=title)
    ax.legend(frameon=False)
    return ax


def plot_particles(
    path: Tensor | Mapping[str, Tensor],
    ax: Axes | None = None,
    *,
    coordinates: Sequence[int | str] | int | str = (0, 1),
    truth: Sequence[float] | float | None = None,
    labels: tuple[str, str] | None = None,
    title: str | None = None,
) -> Axes:
    """Paths of one task's particles through adaptation: one coordinate over the steps, or two against each other.

    Args:
        path: Particles after 0, 1, ... steps, (num_steps + 1, M, D), or the latent sites of one task by name,
            (num_steps + 1, M, *shape), as `bmaml_ppl.diagnostics.trajectory.trace_adaptation` returns them.
        ax: Where to draw; None makes a figure.
        coordinates: One or two of the D coordinates, by number, or by name such as "coef[0]".
        truth: What each coordinate is, where that is known.
        labels: Of the axes, with units; None names the coordinates.
        title: Of the axes.

    Raises:
        ValueError: If the path is of another shape, not finite, or has no such coordinate.
    """
    names, chosen = _choose(path, [coordinates] if isinstance(coordinates, int | str) else list(coordinates))
    ax = make_axes(ax)
    steps = np.broadcast_to(np.arange(len(chosen))[:, None], chosen.shape[:2])
    x, y = (steps, chosen[..., 0]) if len(names) == 1 else (chosen[..., 0], chosen[..., 1])
    ax.plot(x, y, color=lighten(BLUE, 0.5), lw=0.8, label=["path", *["_"] * (x.shape[1] - 1)])
    ax.plot(x[0], y[0], "o", mfc="white", mec=GREY, mew=1.2, ms=5, label="start")
    ax.plot(x[-1], y[-1], "o", color=BLUE, ms=5, label=f"after {len(chosen) - 1} steps")
    if truth is not None:
        _mark_truth(ax, np.atleast_1d(np.asarray(truth, dtype=float)), len(names))
    shown = labels or (("adaptation step", names[0]) if len(names) == 1 else (names[0], names[1]))
    ax.set(xlabel=shown[0], ylabel=shown[1])
    legend_above(ax, title, columns=4)
    return ax


def _span(before: np.ndarray, after: np.ndarray, truth: float | None) -> tuple[float, float]:
    ends = [*_bulk(before), *_bulk(after), *([] if truth is None else [truth])]
    pad = 0.05 * (max(ends) - min(ends)) or 1.0
    return float(min(ends) - pad), float(max(ends) + pad)


def _bulk(draws: np.ndarray) -> tuple[float, float]:
    """Where 99 % of many draws are, or all of few, but at most five interquartile ranges about the median."""
    low, high = (draws.min(), draws.max()) if len(draws) <= _MANY else np.quantile(draws, _SHOWN)
    first, median, third = np.quantile(draws, (0.25, 0.5, 0.75))
    reach = 2.5 * (third - first) or np.inf
    return float(max(low, median - reach)), float(min(high, median + reach))


def _draw_histogram(ax: Axes, draws: np.ndarray, label: str, style: dict[str, Any]) -> None:
    """Bins of equal width as wide as the draws need (Freedman and Diaconis), heights that make the whole area 1."""
    if draws.min() == draws.max():
        ax.axvline(draws[0], color=style["color"], lw=3, label=f"{label} (one point)")
        return
    low, high = _bulk(draws)
    inside = draws[(draws >= low) & (draws <= high)]
    edges = np.histogram_bin_edges(inside, bins="fd") if low < high else np.array([low - 0.5, low + 0.5])
    edges = edges if len(edges) <= _MOST_BINS else np.linspace(low, high, _MOST_BINS)
    height = np.histogram(inside, edges)[0] / (len(draws) * np.diff(edges))
    ax.stairs(height, edges, label=label, **style)


def _choose(path: Tensor | Mapping[str, Tensor], wanted: list[int | str]) -> tuple[list[str], np.ndarray]:
    """The names of one or two coordinates, and their (num_steps + 1, M, 1 or 2)."""
    shapes = {"path": path.shape} if isinstance(path, Tensor) else {name: v.shape for name, v in path.items()}
    if (isinstance(path, Tensor) and path.ndim != 3) or min(map(len, shapes.values())) < 2:
        raise ValueError(
            f"got {', '.join(f'{k} {tuple(v)}' for k, v in shapes.items())}; give the particles of one task, "
            "(num_steps + 1, M, D), or its sites, (num_steps + 1, M, ...): of a batch write "
            "{name: value[:, i] for name, value in path.items()}"
        )
    known, values = flatten_sites(path, 2)
    check_finite("path", values)
    if len(wanted) not in (1, 2):
        raise ValueError(f"got {len(wanted)} coordinates {wanted}; give one, or two: coordinates=(0, 1)")
    found = []
    for one in wanted:
        if one not in (known if isinstance(one, str) else range(len(known))):
            raise ValueError(f"there is no coordinate {one!r}; the path has {len(known)}: {', '.join(known[:8])}")
        found.append(known.index(one) if isinstance(one, str) else one)
    shown = [f"coordinate {known[i]}" if isinstance(path, Tensor) else known[i] for i in found]
    return shown, to_array(values[..., found])


def _mark_truth(ax: Axes, truth: np.ndarray, num_coordinates: int) -> None:
    if len(truth) != num_coordinates:
        raise ValueError(f"truth holds {len(truth)} numbers for {num_coordinates} coordinates; give one for each")
    if num_coordinates == 1:
        ax.axhline(truth[0], color=ORANGE, ls="--", lw=2, label="truth")
    else:
        ax.plot(*truth[:, None], "*", color=ORANGE, ms=14, mec="white", label="truth")
