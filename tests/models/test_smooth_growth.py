"""Growth curves with smooth departures: the kernel they approximate, the density, and bad options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bmaml_ppl.density import Density, from_model
from bmaml_ppl.models import smooth_growth

F64 = torch.float64


def _data(num: int = 7) -> dict[str, Tensor]:
    return {"time": torch.linspace(-1.6, 1.6, num, dtype=F64), "value": torch.randn(num, dtype=F64)}


def _noise_free(density: Density, z: Tensor, data: dict[str, Tensor], **prior: Tensor) -> Tensor:
    """The mean of the observations at z, (N,), from densities: a normal's score at 0 is mean / variance."""
    value = torch.zeros_like(data["time"]).requires_grad_()
    parameters = {**density.prior, "noise": torch.ones((), dtype=F64), **prior}
    log_density = density.log_likelihood(z, parameters, {**data, "value": value})["obs"]
    (score,) = torch.autograd.grad(log_density.sum(), value)
    return score


@pytest.mark.parametrize(("size", "boundary", "tolerance"), [(40, 5.0, 1e-4), (8, 2.2, 0.24)])
def test_departures_have_the_squared_exponential_kernel(size: int, boundary: float, tolerance: float) -> None:
    data = _data()
    density = from_model(smooth_growth(0, num_functions=size, boundary=boundary), data)
    length, growth, scale = (torch.tensor(v, dtype=F64) for v in (0.7, 0.4, 0.5))
    prior = {"length": length, "departure_growth": growth}
    weights = scale * torch.eye(size + 1, dtype=F64)[1:]
    columns = torch.stack([_noise_free(density, z, data, **prior) for z in weights], -1)
    t = data["time"]
    kernel = scale**2 * torch.exp(-(((t[:, None] - t) / length) ** 2) / 2)
    grown = torch.exp(-growth * t)
    got = (grown[:, None] * columns) @ (grown[:, None] * columns).T
    # The boundary's mirror image takes exp(-2 (B - t)^2 / l^2) of the variance at t: 0.23 at 1.6 for B = 2.2.
    torch.testing.assert_close(got / scale**2, kernel / scale**2, rtol=0, atol=tolerance)


def test_without_departures_it_is_a_polynomial_with_growing_noise() -> None:
    data = _data()
    density = from_model(smooth_growth(2), data)
    z = torch.cat([torch.tensor([1.0, -2.0, 0.5], dtype=F64), torch.zeros(8, dtype=F64)])
    mean, root = torch.tensor([0.5, 1.0, 0.0], dtype=F64), torch.tensor([[1.0, 0, 0], [2, 1, 0], [0, 0, 3]], dtype=F64)
    prior = {**density.prior, "noise_growth": torch.tensor(0.3, dtype=F64), "mean": mean, "scale_tril": root}
    t = data["time"]
    normal = torch.distributions.Normal(1.5 + t + 1.5 * t**2, prior["noise"] * torch.exp(0.3 * t))
    expected = normal.log_prob(data["value"])
    torch.testing.assert_close(density.log_likelihood(z, prior, data)["obs"], expected)
    assert {name: tuple(value.shape) for name, value in density.prior.items()} == {
        "mean": (3,),
        "scale_tril": (3, 3),
        "departure": (),
        "departure_growth": (),
        "length": (),
        "noise": (),
        "noise_growth": (),
    }


def test_heavy_tails_are_students() -> None:
    data = _data()
    density = from_model(smooth_growth(0, num_functions=2, heavy_tails=True), data)
    z = torch.zeros(3, dtype=F64)
    expected = torch.distributions.StudentT(density.prior["freedom"], 0.0, density.prior["noise"])
    torch.testing.assert_close(density.log_likelihood(z, density.prior, data)["obs"], expected.log_prob(data["value"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: smooth_growth(-1), "degree=-1"),
        (lambda: smooth_growth(num_functions=0), "num_functions=0"),
        (lambda: smooth_growth(boundary=0.0), "boundary=0.0"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
