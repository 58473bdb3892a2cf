"""The pictures of the sinusoid study at small sizes, and their numbers against exact ones."""

import json
from functools import partial
from math import sqrt
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.distributions import Normal

from bmaml_ppl.datasets.sinusoid import sine_offset
from bmaml_ppl.experiments.sinusoid import pictures
from bmaml_ppl.experiments.sinusoid.pictures import Drawn, draw_adaptation, draw_banana, draw_mixture, draw_pictures
from bmaml_ppl.experiments.sinusoid.scoring import TEST_SEED
from bmaml_ppl.experiments.sinusoid.settings import SinusoidSettings

TINY = SinusoidSettings(effort=1e-4, num_test_tasks=3, workers=1, device="cpu")
"""Two meta-steps, or one."""


@pytest.fixture(scope="module")
def mixture() -> Drawn:
    return draw_mixture()


@pytest.fixture(scope="module")
def banana() -> Drawn:
    return draw_banana(num_steps=300, num_draws=150)


@pytest.fixture(scope="module")
def adaptation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Drawn]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pictures")
    return folder, draw_adaptation(folder, TINY, shots=(5,), num_tasks=3)


def _titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def _labels(ax: Axes) -> set[str]:
    return set(ax.get_legend_handles_labels()[1])


def test_svgd_reaches_both_components_from_far_away(mixture: Drawn) -> None:
    figure, numbers = mixture
    exact, end = numbers["exact"], numbers["iteration 500"]
    assert exact["mean"] == pytest.approx(2 / 3)
    assert exact["sd"] == pytest.approx(sqrt(1 + 32 / 9))
    assert exact["right_of_0"] == pytest.approx(0.6591, abs=1e-4)
    # A hundred particles count shares in hundredths; adaptive steps of .1 keep them moving a little.
    assert end["mean"] == pytest.approx(exact["mean"], abs=0.1)
    assert end["sd"] == pytest.approx(exact["sd"], abs=0.1)
    assert end["right_of_0"] == pytest.approx(exact["right_of_0"], abs=0.03)
    assert numbers["iteration 0"]["mean"] == pytest.approx(-10, abs=0.3)
    assert numbers["iteration 75"]["right_of_0"] == 0
    assert len(figure.axes) == 6
    assert _titles(figure)[-1].startswith("iteration 500: mean 0.")


def test_the_exact_density_that_is_drawn_integrates_to_one(mixture: Drawn) -> None:
    lines = [line for line in mixture[0].axes[-1].lines if "kernel" in str(line.get_label())]
    z, density = (torch.as_tensor(values) for values in lines[0].get_data())
    assert torch.trapezoid(density, z).item() == pytest.approx(1, abs=1e-3)
    (target,) = (path.vertices for path in mixture[0].axes[-1].collections[0].get_paths())
    x, y = torch.as_tensor(target).T
    assert abs(torch.trapezoid(y, x).item()) == pytest.approx(1, abs=1e-3)


def test_chains_have_the_bananas_moments_and_descent_its_mode(banana: Drawn) -> None:
    _, numbers = banana
    exact, chains = numbers["exact"], numbers["HMC"]
    assert exact["sd"] == pytest.approx([1, sqrt(0.5 + 0.35**2)])
    # Standard errors of about .05: 400 effective draws and more, of which z2's have heavy tails.
    assert min(chains["effective_draws"]) > 300
    assert chains["mean"] == pytest.approx(exact["mean"], abs=0.15)
    assert chains["sd"] == pytest.approx(exact["sd"], abs=0.15)
    assert chains["inside_90"] == pytest.approx(0.9, abs=0.03)
    assert numbers["gradient descent"]["mean"] == pytest.approx([0, -0.5], abs=0.05)
    assert numbers["gradient descent"]["sd"][0] < 0.2


def test_particles_with_one_kernel_are_a_little_narrower_than_the_banana(banana: Drawn) -> None:
    figure, numbers = banana
    for name in ("SVGD, one kernel", "SVGD, one kernel, whitened"):
        assert numbers[name]["mean"] == pytest.approx([0, 0], abs=0.1)
        assert numbers[name]["sd"][0] == pytest.approx(1, abs=0.08)
        assert numbers[name]["sd"][1] == pytest.approx(numbers["exact"]["sd"][1], abs=0.15)
        low, high = numbers[name]["sd_of_z1_later"]
        assert high - low < 0.1
    assert len(figure.axes) == 6
    assert "exact" in _labels(figure.axes[2])


def test_equal_seeds_draw_equal_pictures() -> None:
    small = partial(draw_banana, num_particles=10, num_steps=5, num_draws=4)
    assert small()[1] == small()[1]
    assert small(seed=1)[1]["HMC"] != small()[1]["HMC"]
    few = partial(draw_mixture, num_particles=5, iterations=(0, 3))
    assert few()[1] == few()[1] != few(seed=1)[1]


def test_adaptation_shows_every_step_and_every_particle(adaptation: tuple[Path, Drawn]) -> None:
    figure, numbers = adaptation[1]
    found = numbers["5 shots"]
    assert {name: list(steps) for name, steps in found.items()} == {
        "offset_maml": ["0 steps", "1 step", "5 steps", "10 steps"],
        "offset_pretraining": ["0 steps", "1 step", "5 steps", "10 steps"],
        "offset_bmaml": ["0 steps", "1 step", "5 steps", "10 steps"],
    }
    point, _, posterior = figure.axes
    assert _labels(point) == {"0 steps", "1 step", "10 steps", "true curve", "observations adapted to"}
    assert "each of 10 particles, after 5 steps" in _labels(posterior)
    assert "MAML, K = 5" in _titles(figure)[0]
    assert f"1: {found['offset_maml']['1 step']['mse']:.3g}" in _titles(figure)[0]
    for steps in found.values():
        assert steps["0 steps"]["mse"] != steps["10 steps"]["mse"]
        assert all(0 <= scores["coverage90"] <= 1 for scores in steps.values())


def test_each_panel_shows_the_task_and_what_was_seen_of_it(adaptation: tuple[Path, Drawn]) -> None:
    made = sine_offset(3, 5, seed=TEST_SEED)
    curves = made.curve(torch.linspace(-5, 5, 101).expand(3, -1))
    parameters = torch.stack(list(made.parameters.values()))
    away = (parameters - parameters.mean(1, keepdim=True)) / parameters.std(1, keepdim=True)
    typical = int(away.norm(dim=0).argsort()[1])
    for ax in adaptation[1][0].axes:
        lines = {str(line.get_label()): torch.as_tensor(line.get_ydata()) for line in ax.lines}
        torch.testing.assert_close(lines["true curve"], curves[typical])
        torch.testing.assert_close(lines["observations adapted to"], made.tasks.data["y"][typical])


def test_quantiles_of_a_mixture_have_its_probability() -> None:
    mean, sd = torch.tensor([[-3.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.5, 2.0], [1.0, 2.0]])
    for level in (0.05, 0.5, 0.95):
        found = pictures._mixture_quantile(mean, sd, level)
        torch.testing.assert_close(Normal(mean, sd).cdf(found).mean(0), torch.full((2,), level), atol=1e-5, rtol=0)
    assert pictures._mixture_quantile(mean, sd, 0.95)[1].item() == pytest.approx(2 * 1.6449, abs=1e-3)


def test_all_pictures_are_written(adaptation: tuple[Path, Drawn], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, (_, before) = adaptation
    monkeypatch.setattr(pictures, "draw_adaptation", partial(draw_adaptation, shots=(5,)))
    monkeypatch.setattr(pictures, "draw_mixture", partial(draw_mixture, num_particles=5, iterations=(0, 2)))
    monkeypatch.setattr(pictures, "draw_banana", partial(draw_banana, num_particles=10, num_steps=3, num_draws=4))
    numbers = draw_pictures(folder, TINY)
    assert list(numbers) == ["adaptation", "mixture", "banana"]
    assert numbers["adaptation"] == before
    assert json.loads(json.dumps(numbers)) == numbers
    for name in numbers:
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
