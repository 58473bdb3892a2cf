"""Single figures have a legend, belong to no window, and are the same bytes each time."""

import matplotlib.pyplot as plt
import torch

from bmaml_ppl.plots import draw_figure, encode_png, plot_pit, plot_task

X = torch.linspace(0, 1, 5)
DRAWS = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))


def test_a_figure_has_a_legend_and_no_window() -> None:
    figure = draw_figure(plot_task, DRAWS, X, (X, X), title="a", size=(5, 3))
    (ax,) = figure.axes
    assert ax.get_legend() is not None
    assert ax.get_title() == "a"
    assert figure.get_size_inches().tolist() == [5, 3]
    assert plt.get_fignums() == []


def test_the_same_figure_is_the_same_file() -> None:
    first, second = (encode_png(draw_figure(plot_pit, torch.linspace(0, 1, 50), kind="histogram")) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert (int.from_bytes(first[16:20]), int.from_bytes(first[20:24])) == (round(6.4 * 110), round(4.2 * 110))
