"""The one-compartment model: its curve against the textbook's formula, its limit, and a subject's rates recovered."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev

import bmaml_ppl as bp
from bmaml_ppl.density import from_model
from bmaml_ppl.inference import laplace
from bmaml_ppl.models import one_compartment
from bmaml_ppl.models.pharmacokinetics import OralDose, concentration_after

F64 = torch.float64
TIME = torch.tensor([0.0, 0.1, 1.0, 5.0, 24.0], dtype=F64)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def _textbook(time: Tensor, dose: Any, ka: Any, ke: Any, cl: Any) -> Tensor:
    return dose * ka * ke / (cl * (ka - ke)) * (torch.exp(-ke * time) - torch.exp(-ka * time))


@pytest.mark.parametrize(("ka", "ke"), [(1.5, 0.08), (0.08, 1.5), (3.0, 2.9), (0.1, 0.1005)])
def test_concentration_is_the_textbooks(ka: float, ke: float) -> None:
    rates = [_number(v) for v in (4.0, ka, ke, 0.04)]
    torch.testing.assert_close(concentration_after(TIME, *rates), _textbook(TIME, *rates), rtol=1e-9, atol=1e-12)


def _of_rates(rates: Tensor) -> Tensor:
    return concentration_after(TIME, _number(4.0), rates[0], rates[1], _number(0.04)).sum()


def test_equal_rates_have_the_limit_and_its_derivatives() -> None:
    k, t = 0.3, TIME
    value = concentration_after(t, _number(4.0), _number(k), _number(k), _number(0.04))
    torch.testing.assert_close(value, 100 * k * k * t * torch.exp(-k * t))
    # q = t exp(-m t) (1 + (d t)^2 / 24 + ...) with m the mean of the rates and d their difference.
    rate, decay = _number(k), torch.exp(-k * t)
    first = 100 * (rate * t * decay - rate**2 * t**2 * decay / 2).sum()
    at = torch.tensor([k, k], dtype=F64)
    torch.testing.assert_close(grad(_of_rates)(at), first.expand(2))
    second = 100 * (-k * t**2 * decay + k**2 * t**3 * decay / 3).sum()
    torch.testing.assert_close(jacrev(grad(_of_rates))(at).diagonal(), second.expand(2))


@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_derivatives_do_not_jump_where_the_series_ends(factor: float) -> None:
    # The exponents differ by 0.02 at the last time when the rates differ by 0.02 / 24.
    at = torch.tensor([0.3 + factor * 0.02 / 24, 0.3], dtype=F64)
    t = TIME[-1:]

    def ours(rates: Tensor) -> Tensor:
        return concentration_after(t, _number(4.0), rates[0], rates[1], _number(0.04)).sum()

    def textbook(rates: Tensor) -> Tensor:
        return _textbook(t, 4.0, rates[0], rates[1], 0.04).sum()

    torch.testing.assert_close(jacrev(grad(ours))(at), jacrev(grad(textbook))(at), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rates", [(1e3, 1e-3), (1e-3, 1e3), (1e6, 1e6)])
def test_extreme_rates_are_finite_in_single_precision(rates: tuple[float, float]) -> None:
    def total(logs: Tensor) -> Tensor:
        values = logs.exp()
        return concentration_after(TIME.float(), torch.tensor(4.0), values[0], values[1], torch.tensor(0.04)).sum()

    logs = torch.tensor(rates).log()
    assert torch.isfinite(total(logs))
    assert torch.isfinite(grad(total)(logs)).all()
    assert torch.isfinite(jacrev(grad(total))(logs)).all()


@pytest.mark.parametrize("relative", [False, True])
def test_density_is_the_normal_around_the_curve(relative: bool) -> None:
    data = {"time": TIME, "dose": _number(4.0), "concentration": torch.rand(5, dtype=F64)}
    density = from_model(one_compartment(OralDose(spread=0.2), relative_noise=relative), data, ["dose"])
    z = torch.tensor([0.4, -2.5, -3.0], dtype=F64)
    curve = _textbook(TIME, 4.0, *z.exp())
    sd = (density.prior["noise"] ** 2 + (0.1 * curve if relative else 0.0) ** 2) ** 0.5
    expected = torch.distributions.Normal(curve, sd).log_prob(data["concentration"])
    torch.testing.assert_close(density.log_likelihood(z, density.prior, data)["obs"], expected)
    log_prior = torch.distributions.Normal(density.prior["mean"], 0.2).log_prob(z).sum()
    torch.testing.assert_close(density.log_prior(z, density.prior, data), log_prior)
    torch.testing.assert_close(density.prior["mean"].exp(), torch.tensor([1.0, 0.1, 0.05], dtype=F64))


def test_rates_of_one_subject_are_recovered() -> None:
    rates = {"absorption": 1.4, "elimination": 0.09, "clearance": 0.045}
    time = torch.linspace(0.1, 24, 60, dtype=F64).expand(2, 60)
    dose = torch.tensor([4.0, 5.0], dtype=F64)
    curves = torch.stack([_textbook(t, d, *rates.values()) for t, d in zip(time, dose, strict=True)])
    tasks = bp.Tasks({"time": time, "concentration": curves}, constants={"dose": dose}, outputs=("concentration",))
    prior = bp.meta_learn(
        one_compartment(), tasks, num_support=20, num_steps=0, inference=laplace(), device="cpu", progress=False
    )
    predicted = prior.adapt(tasks).predict(tasks, num_samples=400)
    for name, rate in rates.items():
        # Without noise in the data, only the pull of the prior is left: the noise it assumes, 0.5 mg/L, is small.
        torch.testing.assert_close(predicted[name].mean(0), torch.full((2,), rate, dtype=F64), rtol=0.1, atol=0)
        assert (predicted[name].std(0) < 0.2 * rate).all()
