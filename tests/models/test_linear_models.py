"""Growth curves, linear regressions, schools and radon: densities are Pyro's, hierarchies are recovered."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import biject_to

import bmaml_ppl as bp
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.inference import svgd
from bmaml_ppl.models import (
    county_radon,
    eight_schools,
    eight_schools_data,
    eight_schools_tasks,
    growth_curve,
    linear_regression,
    neural_linear,
    radon_houses,
    school_effect,
)

F64 = torch.float64


def _growth_data(num: int = 5) -> dict[str, Tensor]:
    return {"time": torch.linspace(-1, 1, num, dtype=F64), "value": torch.randn(num, dtype=F64)}


def _linear_data() -> dict[str, Tensor]:
    return {"x": torch.randn(5, 3, dtype=F64), "y": torch.randn(5, dtype=F64)}


def _radon_data() -> dict[str, Tensor]:
    data = {"floor": torch.tensor([0.0, 1.0, 0.0], dtype=F64), "log_radon": torch.randn(3, dtype=F64)}
    county = {name: torch.full((), value, dtype=F64) for name, value in (("uranium", 0.3), ("mean_floor", 0.25))}
    return data | county | {"county": torch.tensor([0, 2, 2])}


def _schools_data() -> dict[str, Tensor]:
    return {key: value.double() for key, value in eight_schools_data().items()}


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "growth full": (growth_curve, _growth_data),
    "growth diagonal": (lambda: growth_curve(1, covariance="diagonal"), _growth_data),
    "growth constant": (lambda: growth_curve(0), _growth_data),
    "linear": (lambda: linear_regression(3), _linear_data),
    "neural linear": (lambda: neural_linear((3, 4, 2)), _linear_data),
    "radon houses": (lambda: radon_houses(3), _radon_data),
    "county": (county_radon, lambda: {key: value for key, value in _radon_data().items() if key != "county"}),
    "eight schools": (eight_schools, _schools_data),
    "school": (school_effect, _schools_data),
}


def _pyro_log_joint(model: Any, density: Density, z: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Pyro's own trace in an ordinary parameter store, with the Jacobians added by hand."""
    values = density.constrain(z, density.prior, data)
    with pyro.poutine.trace() as traced, pyro.condition(data=values):
        model(**data)
    total = torch.as_tensor(traced.trace.log_prob_sum())
    for site in density.sites.values():
        transform = biject_to(site.support)
        unconstrained = z[site.slice].reshape(site.unconstrained_shape)
        total = total + transform.log_abs_det_jacobian(unconstrained, transform(unconstrained)).sum()
    return total.detach()


@pytest.mark.parametrize("name", CASES)
def test_density_is_pyros(name: str) -> None:
    model, data = CASES[name][0](), CASES[name][1]()
    density = from_model(model, data)
    z = torch.randn(density.dim, dtype=F64)
    torch.testing.assert_close(density.log_joint(z, density.prior, data), _pyro_log_joint(model, density, z, data))


def test_growth_curve_is_a_polynomial() -> None:
    data = _growth_data()
    density = from_model(growth_curve(3), data)
    z = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    t, noise = data["time"], density.prior["noise"]
    curve = 1 - 2 * t + 0.5 * t**2 + 3 * t**3
    expected = torch.distributions.Normal(curve, noise).log_prob(data["value"])
    torch.testing.assert_close(density.log_likelihood(z, density.prior, data)["obs"], expected)


def test_linear_regression_takes_one_feature_as_a_vector() -> None:
    x, y = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64)
    vector, matrix = (from_model(linear_regression(1), {"x": v, "y": y}) for v in (x, x[:, None]))
    z = torch.randn(2, dtype=F64)
    left = vector.log_joint(z, vector.prior, {"x": x, "y": y})
    torch.testing.assert_close(left, matrix.log_joint(z, matrix.prior, {"x": x[:, None], "y": y}))


def test_schools_are_found_by_their_index() -> None:
    data = _schools_data()
    model = eight_schools()
    density = from_model(model, data)
    z = torch.randn(density.dim, dtype=F64)
    rows = torch.tensor([6, 1])
    part = {key: value[rows] for key, value in data.items()} | {"school": rows}
    whole = density.log_likelihood(z, {}, data)["obs"]
    torch.testing.assert_close(density.log_likelihood(z, {}, part)["obs"], whole[rows])


def test_doubled_schools_have_the_likelihood_of_one_estimate() -> None:
    tasks, data = eight_schools_tasks().to(dtype=F64), _schools_data()
    density = from_model(school_effect(), {"sigma": data["sigma"][:1], "y": data["y"][:1]})

    def likelihood(theta: float, task: dict[str, Tensor]) -> Tensor:
        return density.log_likelihood(torch.tensor([theta], dtype=F64), density.prior, task)["obs"].sum()

    for i in range(8):
        once = {key: value[i : i + 1] for key, value in data.items()}
        twice = {key: value[i] for key, value in tasks.data.items()}
        ratio = likelihood(3.0, once) - likelihood(-5.0, once)
        torch.testing.assert_close(likelihood(3.0, twice) - likelihood(-5.0, twice), ratio, rtol=1e-5, atol=1e-5)


def test_linear_hierarchy_is_recovered() -> None:
    # 60 tasks: standard errors are .065 for a mean, .046 for a scale and .006 for the noise; the tolerances are
    # at least 4 of them, and the start is 1 off a mean, .5 off a scale and .3 off the noise.
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 10, generator=generator)
    coef = torch.tensor([1.0, -1.0]) + 0.5 * torch.randn(60, 2, generator=generator)
    y = coef[:, :1] + coef[:, 1:] * x + 0.2 * torch.randn(60, 10, generator=generator)
    tasks = bp.Tasks({"x": x, "y": y}, outputs=("y",))
    prior = bp.meta_learn(
        linear_regression(1),
        tasks,
        num_support=5,
        num_steps=120,
        batch_size=20,
        inference=svgd(num_particles=10, num_steps=4),
        device="cpu",
        progress=False,
    )
    torch.testing.assert_close(prior.params["mean"], torch.tensor([1.0, -1.0]), atol=0.3, rtol=0)
    torch.testing.assert_close(prior.params["scale"], torch.tensor([0.5, 0.5]), atol=0.2, rtol=0)
    torch.testing.assert_close(prior.params["noise"], torch.tensor(0.2), atol=0.05, rtol=0)


def _three_steps(model: Any, tasks: bp.Tasks, num_support: int) -> bp.LearnedPrior:
    return bp.meta_learn(model, tasks, num_support=num_support, num_steps=3, device="cpu", progress=False)


def test_each_meta_learns_without_warnings() -> None:
    time = torch.linspace(-1, 1, 6).expand(5, 6)
    growth = bp.Tasks({"time": time, "value": 1 + time + 0.1 * torch.randn(5, 6)}, outputs=("value",))
    linear = bp.Tasks({"x": torch.randn(5, 6, 2), "y": torch.randn(5, 6)}, outputs=("y",))
    columns = {key: value[None] / 10 for key, value in eight_schools_data().items()}
    schools = bp.Tasks({**columns, "school": torch.arange(8)[None]}, outputs=("y",))
    assert _three_steps(growth_curve(), growth, 3).params["scale_tril"].shape == (3, 3)
    assert _three_steps(growth_curve(1, covariance="diagonal"), growth, 3).params["scale"].shape == (2,)
    assert _three_steps(linear_regression(2), linear, 3).params["mean"].shape == (3,)
    assert _three_steps(school_effect(), eight_schools_tasks().standardize(["y"]), 1).params["tau"] > 0
    prior = _three_steps(eight_schools(), schools, 4)
    assert prior.start == "free"
    assert prior.adapt(schools).sites()["eta"].shape == (20, 1, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: growth_curve(-1), "degree=-1"),
        (lambda: growth_curve(covariance="banded"), "covariance='banded'"),  # type: ignore[arg-type]
        (lambda: linear_regression(0), "num_features=0"),
        (lambda: eight_schools(0), "num_schools=0"),
        (lambda: from_model(linear_regression(2), _linear_data()), r"model takes \(N, 2\)"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
