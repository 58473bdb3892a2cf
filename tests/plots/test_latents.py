"""Latents of one task: histograms of area one, and paths that start and end where the particles do."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from bmaml_ppl.plots import plot_particles, plot_prior_posterior

GENERATOR = torch.Generator().manual_seed(0)
PRIOR, POSTERIOR = torch.randn(2000, generator=GENERATOR), 1 + 0.1 * torch.randn(500, generator=GENERATOR)
PATH = torch.randn(6, 4, 3, generator=GENERATOR)


def _legend(ax: Axes) -> list[str]:
    return ax.get_legend_handles_labels()[1]


def _area(ax: Axes, index: int) -> float:
    stairs: Any = ax.patches[index].get_data()  # type: ignore[attr-defined]
    return float((stairs.values * np.diff(stairs.edges)).sum())


def test_both_histograms_have_the_area_of_what_is_shown() -> None:
    ax = plot_prior_posterior(PRIOR, POSTERIOR, labels=("growth (kg)", "density"), title="pig a")
    assert _legend(ax) == ["prior", "posterior"]
    assert _area(ax, 0) == pytest.approx(0.99, abs=0.002)
    assert _area(ax, 1) == pytest.approx(0.99, abs=0.01)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("growth (kg)", "density", "pig a")


def test_heights_are_densities() -> None:
    ax = plot_prior_posterior(torch.linspace(0, 4, 1001), torch.linspace(1, 2, 1001))
    for index, height in ((0, 1 / 4), (1, 1.0)):
        values = ax.patches[index].get_data().values  # type: ignore[attr-defined]
        np.testing.assert_allclose(values[1:-1], height, rtol=0.03)


def test_one_far_draw_does_not_flatten_the_rest() -> None:
    ax = plot_prior_posterior(torch.cat([PRIOR, torch.tensor([1e6])]), POSTERIOR)
    assert ax.get_xlim()[1] < 10


def test_few_draws_are_all_drawn_and_marked() -> None:
    ax = plot_prior_posterior(PRIOR, POSTERIOR[:20], truth=1.0)
    assert _legend(ax) == ["prior", "posterior", "posterior draws", "truth"]
    assert _area(ax, 1) == pytest.approx(1.0)
    np.testing.assert_array_equal(np.asarray(ax.lines[0].get_xdata()), POSTERIOR[:20])


def test_a_point_estimate_is_a_line() -> None:
    ax = plot_prior_posterior(PRIOR, torch.tensor([0.7]))
    assert "posterior (one point)" in _legend(ax)
    assert np.asarray(ax.lines[0].get_xdata()) == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize(
    ("prior", "posterior", "told"),
    [
        (PRIOR[:, None], POSTERIOR, r"prior draws have shape \(2000, 1\)"),
        (PRIOR, POSTERIOR[None], r"posterior draws have shape \(1, 500\)"),
        (PRIOR / 0, POSTERIOR, "prior draws holds 2000 non-finite"),
    ],
)
def test_draws_of_several_coordinates_are_refused(prior: torch.Tensor, posterior: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plot_prior_posterior(prior, posterior)


def test_two_coordinates_are_drawn_against_each_other() -> None:
    ax = plot_particles(PATH, coordinates=(0, 2), truth=(0.5, -0.5))
    assert _legend(ax) == ["path", "start", "after 5 steps", "truth"]
    paths, starts, ends, truth = ax.lines[:4], ax.lines[4], ax.lines[5], ax.lines[6]
    for particle, line in enumerate(paths):
        np.testing.assert_array_equal(np.asarray(line.get_xdata()), PATH[:, particle, 0])
        np.testing.assert_array_equal(np.asarray(line.get_ydata()), PATH[:, particle, 2])
    np.testing.assert_array_equal(np.asarray(starts.get_xdata()), PATH[0, :, 0])
    np.testing.assert_array_equal(np.asarray(ends.get_ydata()), PATH[-1, :, 2])
    assert (truth.get_xdata()[0], truth.get_ydata()[0]) == (0.5, -0.5)  # type: ignore[index]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("coordinate 0", "coordinate 2")


def test_one_coordinate_is_drawn_over_the_steps() -> None:
    ax = plot_particles({"noise": PATH[:, :, 0].exp(), "coef": PATH[:, :, 1:]}, coordinates="coef[1]", truth=0.0)
    np.testing.assert_array_equal(np.asarray(ax.lines[1].get_xdata()), range(6))
    np.testing.assert_array_equal(np.asarray(ax.lines[1].get_ydata()), PATH[:, 1, 2])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("adaptation step", "coef[1]")


def test_sites_are_named_in_order() -> None:
    sites = {"noise": PATH[:, :, 0], "matrix": PATH[:, :, :2].reshape(6, 4, 1, 2)}
    ax = plot_particles(sites, coordinates=("noise", "matrix[0,1]"), labels=("noise (kg)", "slope (kg)"), title="a")
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("noise (kg)", "slope (kg)", "a")
    np.testing.assert_array_equal(np.asarray(ax.lines[0].get_ydata()), PATH[:, 0, 1])


@pytest.mark.parametrize(
    ("path", "more", "told"),
    [
        (PATH[:, None], {}, r"path \(6, 1, 4, 3\); give the particles of one task"),
        ({"coef": PATH[0, 0]}, {}, r"coef \(3,\); give the particles"),
        (PATH, {"coordinates": (0, 3)}, "no coordinate 3; the path has 3"),
        ({"coef": PATH}, {"coordinates": "coff[0]"}, r"no coordinate 'coff\[0\]'; the path has 3: coef\[0\]"),
        (PATH, {"coordinates": (0, 1, 2)}, "got 3 coordinates"),
        (PATH, {"truth": 1.0}, "truth holds 1 numbers for 2 coordinates"),
        (PATH * torch.nan, {}, "non-finite"),
    ],
)
def test_what_is_no_path_of_one_task_is_refused(path: Any, more: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plot_particles(path, **more)


def test_a_heavy_tailed_prior_leaves_room_for_the_posterior() -> None:
    prior = torch.tan(torch.pi * (torch.linspace(0.0005, 0.9995, 1000) - 0.5))
    low, high = plot_prior_posterior(prior, POSTERIOR).get_xlim()
    assert -6 < low < -4
    assert 4 < high < 6
