"""Data outside the support of what observes them, and observations in forms that are easy to get wrong."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bmaml_ppl.density import from_model
from bmaml_ppl.observations import check_observations


def _model(make: Callable[[Tensor], Any]) -> Callable[..., None]:
    def model(y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("obs", make(a), obs=y)

    return model


def _poisson(a: Tensor) -> Any:
    return dist.Poisson(a.exp())


def _bernoulli(a: Tensor) -> Any:
    return dist.Bernoulli(logits=a)


OUTSIDE: dict[str, tuple[Callable[[Tensor], Any], list[float], str]] = {
    "standardised counts": (_poisson, [0.0, 0.1, 1.0, 2.0], "Poisson.*'y' holds 0.1"),
    "negative counts": (_poisson, [0.0, -3.0, 1.0, 2.0], "Poisson.*'y' holds -3"),
    "classes from 1": (_bernoulli, [1, 2, 1, 2], "Bernoulli.*'y' holds 2"),
    "standardised sizes": (lambda a: dist.LogNormal(a, 1.0), [1.0, -0.5, 1.0, 2.0], "LogNormal.*holds -0.5"),
    "an unknown class": (lambda a: dist.Categorical(logits=a * torch.ones(3)), [0, 1, 3, 2], "Categorical.*holds 3"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_values_outside_the_support_are_refused_by_name(name: str) -> None:
    make, values, message = OUTSIDE[name]
    with pytest.raises(ValueError, match=rf"(?s)'obs' is {message}.*standardize\(columns"):
        from_model(_model(make), {"y": torch.tensor(values)})


def test_a_support_that_depends_on_a_latent_is_not_checked() -> None:
    model = _model(lambda a: dist.Uniform(0.0, a.exp()))
    assert from_model(model, {"y": torch.tensor([1.0, 200.0, 3.0, 4.0])}).observed == {"obs": "y"}


def test_the_first_offending_task_of_a_batch_is_named_and_padding_is_not_looked_at() -> None:
    density = from_model(_model(_poisson), {"y": torch.tensor([0.0, 1.0, 2.0, 3.0])})
    y = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 0.5, 0.5], [0.0, 1.5, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False], [True, True, False, False]])
    before = torch.get_rng_state()
    check_observations(density, density.prior, {"y": y[:2]}, mask[:2], ["a", "b"])
    with pytest.raises(ValueError, match="'y' of task 'c' holds 1.5"):
        check_observations(density, density.prior, {"y": y}, mask, ["a", "b", "c"])
    with pytest.raises(ValueError, match="'y' of task 'b' holds 0.5"):
        check_observations(density, density.prior, {"y": y}, None, ["a", "b", "c"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_bools_and_integers_score_as_floats_do(dtype: torch.dtype) -> None:
    density = from_model(_model(_bernoulli), {"y": torch.tensor([1, 0, 1, 1]).to(dtype)})
    z, y = torch.tensor([0.4]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = density.log_joint(z, {}, {"y": y})
    assert torch.equal(density.log_joint(z, {}, {"y": y.to(dtype)}), expected)
    exact = dist.Bernoulli(logits=z).log_prob(y).sum() + dist.Normal(0.0, 1.0).log_prob(z)[0]
    torch.testing.assert_close(expected, exact)


def test_observations_that_would_be_counted_several_times_are_refused() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Normal(b[0] + b[1] * x[:, None], 0.3), obs=y)

    with pytest.raises(ValueError, match=r"'obs' has \(4, 4\) .*\(4,\) in plates \{'data': 4\}.*4 times.*squeeze"):
        from_model(model, {"x": torch.arange(4.0), "y": torch.arange(4.0)})


def test_a_value_computed_from_an_output_needs_a_model_that_runs_without_it() -> None:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Normal(a, 1.0), obs=torch.log(y))

    with pytest.raises(ValueError, match=r"'obs' observes something computed from data \['y'\].*obs=None if y is None"):
        from_model(model, {"y": torch.ones(4)})


def test_a_copy_that_equals_two_columns_is_refused() -> None:
    def model(treated: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Bernoulli(logits=a * treated), obs=None if y is None else y.float())

    data = {"treated": torch.tensor([1.0, 0.0, 1.0, 0.0]), "y": torch.tensor([1, 0, 1, 0])}
    with pytest.raises(ValueError, match="'obs' observes a copy of data 'treated' or of 'y'.*cast the column"):
        from_model(model, data)
    assert from_model(model, {**data, "y": torch.tensor([1, 0, 1, 1])}).observed == {"obs": "y"}
