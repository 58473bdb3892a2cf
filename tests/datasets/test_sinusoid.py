"""The sinusoid families: published ranges, clean curves, and reproducibility."""

from collections.abc import Callable
from math import pi

import pytest
import torch

from bmaml_ppl.datasets.sinusoid import SinusoidTasks, sine_offset, sinusoid, sinusoid_maml

FAMILIES: list[Callable[..., SinusoidTasks]] = [sinusoid, sinusoid_maml, sine_offset]
RANGES = {
    sinusoid: {"amplitude": (0.1, 5.0), "frequency": (0.5, 2.0), "phase": (0.0, 2 * pi)},
    sinusoid_maml: {"amplitude": (0.1, 5.0), "frequency": (1.0, 1.0), "phase": (0.0, pi)},
    sine_offset: {"amplitude": (0.1, 5.0), "frequency": (0.5, 2.0), "offset": (-2.0, 2.0)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_inputs_fill_the_published_ranges(family: Callable[..., SinusoidTasks]) -> None:
    tasks, _, parameters = family(2000, 5, seed=0)
    assert parameters.keys() == RANGES[family].keys()
    for name, (low, high) in RANGES[family].items():
        values = parameters[name]
        assert values.shape == (2000,)
        assert float(values.min()) >= low
        assert float(values.max()) <= high
        # A uniform mean is within 5 standard errors of the middle: false alarm below 1e-6.
        assert abs(float(values.mean()) - (low + high) / 2) <= 5 * (high - low) / (12 * 2000) ** 0.5 + 1e-6
    x = tasks.data["x"]
    assert float(x.min()) >= -5
    assert float(x.max()) <= 5
    assert float(x.max() - x.min()) > 9.9


def test_sinusoid_noise_is_proportional_to_the_amplitude() -> None:
    tasks, curve, parameters = sinusoid(500, 100, seed=1)
    residual = (tasks.data["y"] - curve(tasks.data["x"])) / parameters["amplitude"][:, None]
    # 50,000 residuals: the relative error of a standard deviation is .0032, 5 of them allowed.
    assert float(residual.std()) == pytest.approx(0.01, rel=0.016)


def test_the_clean_curves_are_the_papers_equations() -> None:
    x = torch.linspace(-5, 5, 7).expand(4, 7)
    _, curve, p = sinusoid(4, 3, seed=0)
    a, w, b = (p[name][:, None] for name in ("amplitude", "frequency", "phase"))
    torch.testing.assert_close(curve(x), a * torch.sin(w * x - b))
    _, curve, p = sinusoid_maml(4, 3, seed=0)
    torch.testing.assert_close(curve(x), p["amplitude"][:, None] * torch.sin(x - p["phase"][:, None]))
    _, curve, p = sine_offset(4, 3, seed=0)
    a, w, c = (p[name][:, None] for name in ("amplitude", "frequency", "offset"))
    torch.testing.assert_close(curve(x), a * torch.sin(w * x) + c)


def test_noiseless_families_lie_on_their_curve() -> None:
    for tasks, curve, _ in (
        sinusoid_maml(5, 4, seed=0),
        sinusoid(5, 4, seed=0, noise_factor=0.0),
        sine_offset(5, 4, seed=0, noise_sd=0.0),
    ):
        assert torch.equal(tasks.data["y"], curve(tasks.data["x"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_gives_one_draw_and_the_global_generator_rests(family: Callable[..., SinusoidTasks]) -> None:
    before = torch.get_rng_state()
    first, again, other = family(3, 4, seed=5), family(3, 4, seed=5), family(3, 4, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.tasks.data["y"], again.tasks.data["y"])
    assert not torch.equal(first.tasks.data["y"], other.tasks.data["y"])
    longer = family(3, 9, seed=5)
    assert all(torch.equal(longer.parameters[name], value) for name, value in first.parameters.items())
    assert first.tasks.outputs == ("y",)
    assert first.tasks.constants == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_below_one_are_refused(family: Callable[..., SinusoidTasks]) -> None:
    with pytest.raises(ValueError, match="num_tasks is 0"):
        family(0, 3, seed=0)
    with pytest.raises(ValueError, match="num_observations is 0"):
        family(3, 0, seed=0)


def test_negative_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="give 0 or more"):
        sinusoid(2, 2, seed=0, noise_factor=-1.0)
