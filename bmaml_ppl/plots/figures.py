"""Single figures that no window knows of, and their files."""

import io
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bmaml_ppl.plots.style import legend_above

__all__ = ["draw_figure", "encode_png"]


def draw_figure(
    plot: Callable[..., Axes], *arguments: Any, size: tuple[float, float] = (6.4, 4.2), **options: Any
) -> Figure:
    """One plot with its legend as a figure of its own: `draw_figure(plot_pit, values, title="a").savefig(path)`.

    Args:
        plot: A function of `bmaml_ppl.plots` that takes axes.
        *arguments: Its arguments.
        size: Width and height in inches.
        **options: Its options.
    """
    figure = Figure(figsize=size, layout="constrained")
    ax = plot(*arguments, ax=figure.subplots(), **options)
    if ax.get_legend() is None and ax.get_legend_handles_labels()[1]:
        legend_above(ax, ax.get_title())
    return figure


def encode_png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
