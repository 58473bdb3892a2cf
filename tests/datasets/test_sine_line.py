"""The mixture of sinusoids and lines: ranges, families, and a support set that cannot tell them apart."""

from math import pi
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from bmaml_ppl.datasets.sine_line import ambiguous_task, sine_line

RANGES = {"amplitude": (0.1, 5.0), "phase": (0.0, pi), "slope": (-3.0, 3.0), "intercept": (-3.0, 3.0)}


def test_parameters_and_inputs_fill_the_published_ranges() -> None:
    tasks, _, parameters = sine_line(2000, 5, seed=0)
    assert parameters.keys() == RANGES.keys() | {"is_line"}
    for name, (low, high) in RANGES.items():
        values = parameters[name]
        assert values.shape == (2000,)
        assert low <= float(values.min())
        assert float(values.max()) <= high
        # A uniform mean is within 5 standard errors of the middle: false alarm below 1e-6.
        assert abs(float(values.mean()) - (low + high) / 2) <= 5 * (high - low) / (12 * 2000) ** 0.5
    x = tasks.data["x"]
    assert -5 <= float(x.min()) < -4.9
    assert 4.9 < float(x.max()) <= 5


def test_names_tell_the_families_apart() -> None:
    tasks, curve, parameters = sine_line(7, 4, seed=0)
    assert tasks.names == ("sine 0", "line 1", "sine 2", "line 3", "sine 4", "line 5", "sine 6")
    assert parameters["is_line"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    x = torch.linspace(-5, 5, 9).expand(7, 9)
    p = {name: value[:, None] for name, value in parameters.items()}
    expected = p["amplitude"] * torch.sin(x - p["phase"])
    expected[1::2] = (p["slope"] * x + p["intercept"])[1::2]
    torch.testing.assert_close(curve(x), expected)


def test_noise_is_the_same_for_both_families() -> None:
    tasks, curve, _ = sine_line(400, 100, seed=1, noise=0.3)
    residual = tasks.data["y"] - curve(tasks.data["x"])
    # 20,000 residuals a family: the relative error of a standard deviation is .005, 5 of them allowed.
    assert float(residual[0::2].std()) == pytest.approx(0.3, rel=0.025)
    assert float(residual[1::2].std()) == pytest.approx(0.3, rel=0.025)
    clean = sine_line(4, 3, seed=0, noise=0.0)
    assert torch.equal(clean.tasks.data["y"], clean.curve(clean.tasks.data["x"]))


def test_one_seed_gives_one_draw_and_the_global_generator_rests() -> None:
    before = torch.get_rng_state()
    first, again, other = (sine_line(3, 4, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.tasks.data["y"], again.tasks.data["y"])
    assert not torch.equal(first.tasks.data["y"], other.tasks.data["y"])
    longer = sine_line(3, 9, seed=5)
    assert all(torch.equal(longer.parameters[name], value) for name, value in first.parameters.items())
    assert first.tasks.outputs == ("y",)


def _evidence(x: Tensor, y: Tensor, sine: bool) -> Tensor:
    """Log p(y | family) at noise .3, by a midpoint rule over its two parameters."""
    grid = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    names = ("amplitude", "phase") if sine else ("slope", "intercept")
    first, second = (low + (high - low) * grid for low, high in (RANGES[name] for name in names))
    a, b = first[:, None, None], second[:, None]
    curves = a * torch.sin(x - b) if sine else a * x + b
    return Normal(curves, 0.3).log_prob(y).sum(-1).flatten().logsumexp(0)


@pytest.mark.parametrize("num_observations", [3, 5, 10])
def test_an_ambiguous_support_set_leaves_both_families_likely(num_observations: int) -> None:
    support = ambiguous_task(num_observations).support
    x, y = (support.data[name][0].double() for name in ("x", "y"))
    sine = torch.sigmoid(_evidence(x, y, sine=True) - _evidence(x, y, sine=False))
    assert 0.35 < float(sine) < 0.65


def test_a_clear_support_set_does_not() -> None:
    x = torch.linspace(-5, 5, 5, dtype=torch.float64)
    y = 2 * torch.sin(x - 1)
    assert _evidence(x, y, sine=True) - _evidence(x, y, sine=False) > 10


def test_both_curves_pass_close_to_the_ambiguous_points_and_part_elsewhere() -> None:
    support, sine, line = ambiguous_task(9)
    x, y = support.data["x"], support.data["y"]
    assert support.names == ("ambiguous",)
    assert x.shape == y.shape == (1, 9)
    wave, straight = sine["amplitude"] * torch.sin(x - sine["phase"]), line["slope"] * x + line["intercept"]
    assert float((wave - y).abs().max()) < 0.086
    torch.testing.assert_close(y - wave, straight - y)
    far = torch.tensor([-4.0, 4.0])
    gap = sine["amplitude"] * torch.sin(far - sine["phase"]) - line["slope"] * far - line["intercept"]
    assert float(gap.abs().min()) > 5


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_tasks is 0"):
        sine_line(0, 3, seed=0)
    with pytest.raises(ValueError, match="num_observations is 0"):
        sine_line(3, 0, seed=0)
    with pytest.raises(ValueError, match=r"noise=-1\.0"):
        sine_line(3, 3, seed=0, noise=-1.0)
    with pytest.raises(ValueError, match="num_observations is 0"):
        ambiguous_task(0)
    wrong: list[dict[str, Any]] = [{"amplitude": 3.1}, {"phase": -0.1}, {"amplitude": 2.0, "phase": 1.6}]
    for options in wrong:
        with pytest.raises(ValueError, match="outside a family"):
            ambiguous_task(**options)
    for width in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"width={width}"):
            ambiguous_task(width=width)
