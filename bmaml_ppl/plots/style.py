"""What all figures share: colours, axes, and tensors as arrays."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from torch import Tensor

__all__ = [
    "BLACK",
    "BLUE",
    "CYCLE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "check_finite",
    "flatten_sites",
    "legend_above",
    "lighten",
    "make_axes",
    "to_array",
]

BLUE, ORANGE, GREEN, PURPLE, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#767676"

_COLUMN_INCHES = 1.2

CYCLE: tuple[tuple[str, Any], ...] = (
    (BLUE, "-"),
    (ORANGE, "--"),
    (GREEN, "-."),
    (PURPLE, (0, (1, 1))),
    (BLACK, (0, (6, 2, 1, 2, 1, 2))),
    (GREY, (0, (3, 3))),
)
"""Colours, each with a line style of its own."""


def make_axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.2)) -> Axes:
    """The given axes, or those of a new figure of so many inches."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def to_array(values: Tensor) -> Any:
    """The same numbers for matplotlib."""
    return values.detach().cpu().numpy()


def lighten(color: str, strength: float) -> tuple[float, ...]:
    """The colour mixed with white; opaque, so that what lies over another keeps the colour of its legend."""
    strength = min(strength, 1.0)
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(color))


def legend_above(ax: Axes, title: str | None = None, *, columns: int = 3) -> None:
    """A legend between the title and the axes, where it covers no data; of fewer columns where the axes are narrow."""
    handles, labels = ax.get_legend_handles_labels()
    room = ax.get_position().width * ax.figure.get_figwidth()  # type: ignore[union-attr]
    columns = max(1, min(columns, len(labels), int(room / _COLUMN_INCHES)))
    # Handles fill columns first; in rows, the order of drawing is the order of reading.
    order = [i for column in range(columns) for i in range(column, len(labels), columns)]
    ax.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        frameon=False,
        ncols=columns,
        fontsize="small",
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        borderaxespad=0.2,
    )
    ax.set_title(title or "", pad=10 + 14 * -(-len(labels) // columns))


def check_finite(what: str, values: Tensor) -> None:
    """Refuses what matplotlib would leave out without a word.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if broken := int((~torch.isfinite(values)).sum()):
        raise ValueError(
            f"{what} holds {broken} non-finite of {values.numel()} values; padded rows are NaN: leave them out, "
            "for one task of a batch write draws[:, i, :length]"
        )


def flatten_sites(values: Tensor | Mapping[str, Tensor], num_lead: int) -> tuple[list[str], Tensor]:
    """Coordinates of all sites side by side, and their names such as `coef[0]`.

    Args:
        values: One tensor, (..., D), whose coordinates are named by number, or sites by name, (..., *shape).
        num_lead: Leading dimensions that are no coordinates.

    Returns:
        D names, and (..., D).
    """
    if isinstance(values, Tensor):
        return [str(i) for i in range(values.shape[-1])], values
    names: list[str] = []
    for site, value in values.items():
        shape = value.shape[num_lead:]
        names += [f"{site}[{','.join(map(str, index))}]" if index else site for index in product(*map(range, shape))]
    return names, torch.cat([value.reshape(*value.shape[:num_lead], -1) for value in values.values()], -1)
