"""The sinusoid as a program: its density by hand, and its posterior of several modes against a grid."""

from dataclasses import replace
from math import log, pi
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Beta, Normal

import bmaml_ppl as bp
from bmaml_ppl.adaptation import as_task_data
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.density import from_model
from bmaml_ppl.inference import smc
from bmaml_ppl.models import sinusoid_program
from tests.toys import bind

F64 = torch.float64
ENDS = {"amplitude": 6.0, "frequency": 3.0, "phase": 2 * pi}


def _data(num: int = 5, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    return {"x": torch.randn(num, dtype=dtype), "y": torch.randn(num, dtype=dtype)}


def test_log_joint_is_the_closed_form() -> None:
    data = _data()
    density = from_model(sinusoid_program(), data)
    assert {name: tuple(value.shape) for name, value in density.prior.items()} == {
        "amplitude_shape": (2,), "frequency_shape": (2,), "phase_shape": (2,), "noise_ratio": (),
    }  # fmt: skip
    params = {name: torch.rand(value.shape, dtype=F64) + 0.5 for name, value in density.prior.items()}
    z = torch.randn(3, dtype=F64)
    shares = dict(zip(ENDS, torch.sigmoid(z), strict=True))
    values = {name: end * shares[name] for name, end in ENDS.items()}
    for name, value in density.constrain(z, params, data).items():
        torch.testing.assert_close(value, values[name])
    # Shares have the density of their Beta; that of z has the slope of the logistic function beside.
    expected = sum(Beta(*params[f"{name}_shape"]).log_prob(u) + (u * (1 - u)).log() for name, u in shares.items())
    mean = values["amplitude"] * torch.sin(values["frequency"] * data["x"] - values["phase"])
    noise = params["noise_ratio"] * values["amplitude"]
    expected = expected + Normal(mean, noise).log_prob(data["y"]).sum()
    torch.testing.assert_close(density.log_joint(z, params, data), expected)


def test_every_meta_parameter_has_a_gradient() -> None:
    data = _data()
    density = from_model(sinusoid_program(), data)
    names, z = sorted(density.prior), torch.randn(3, dtype=F64)
    leaves = [(density.prior[name] + 0.3).requires_grad_() for name in names]

    def log_joint(*values: Tensor) -> Tensor:
        return density.log_joint(z, dict(zip(names, values, strict=True)), data)

    assert torch.autograd.gradcheck(log_joint, leaves)
    assert all(bool((gradient.abs() > 1e-6).all()) for gradient in torch.autograd.grad(log_joint(*leaves), leaves))


def test_options_are_where_latents_end_and_the_noise_starts() -> None:
    data = _data(dtype=torch.float32)
    model = sinusoid_program(largest_amplitude=2.0, highest_frequency=0.5, initial_noise=0.2)
    density = from_model(model, data)
    for far, share in ((50.0, 1.0), (-50.0, 0.0), (0.0, 0.5)):
        values = density.constrain(torch.full((3,), far), density.prior, data)
        for name, end in {"amplitude": 2.0, "frequency": 0.5, "phase": 2 * pi}.items():
            assert values[name].item() == pytest.approx(share * end, abs=1e-6)
            assert 0 < values[name] < end
    assert density.prior["noise_ratio"].item() == pytest.approx(0.2)
    fn = density.observe(torch.zeros(3), density.prior, data)["obs"].fn
    torch.testing.assert_close(fn.stddev, torch.full((5,), 0.2))


def test_the_first_prior_is_uniform() -> None:
    data = _data(dtype=torch.float32)
    density = from_model(sinusoid_program(), data)
    torch.manual_seed(0)
    z = torch.func.vmap(lambda _: density.draw_prior(density.prior, data), randomness="different")(torch.zeros(4000))
    drawn = torch.func.vmap(lambda one: density.constrain(one, density.prior, data))(z)
    # Mean and mean square of a uniform share, within 4.5 standard errors of 4,000: one false alarm in 20,000.
    for name, end in ENDS.items():
        share = drawn[name] / end
        assert abs(share.mean() - 0.5) < 4.5 * (1 / 12 / 4000) ** 0.5
        assert abs(share.square().mean() - 1 / 3) < 4.5 * (4 / 45 / 4000) ** 0.5


def _on_grid(data: dict[str, Tensor], ratio: float, size: tuple[int, int, int]) -> tuple[float, dict[str, Tensor]]:
    """Log evidence under the uniform prior, and marginals of each latent, (size,), by the midpoint rule."""
    at = [end * (torch.arange(n, dtype=F64) + 0.5) / n for end, n in zip(ENDS.values(), size, strict=True)]
    joint = torch.zeros(size, dtype=F64)
    amplitude = at[0][:, None, None]
    for x, y in zip(data["x"].tolist(), data["y"].tolist(), strict=True):
        wave = torch.sin(at[1][:, None] * x - at[2])
        joint -= 0.5 * ((y - amplitude * wave) / (ratio * amplitude)).square()
    joint -= len(data["x"]) * ((ratio * amplitude).log() + 0.5 * log(2 * pi))
    evidence = joint.logsumexp((0, 1, 2)) - sum(log(n) for n in size)
    weights = joint.flatten().softmax(0).reshape(size)
    sums = {name: weights.sum([d for d in range(3) if d != i]) for i, name in enumerate(ENDS)}
    return float(evidence), sums


@pytest.mark.parametrize("index", [2, 6])
def test_a_posterior_of_several_modes_is_that_on_a_grid(index: int) -> None:
    # 16 populations of one task, whose estimates are compared with the grid's in standard errors; eleven numbers at 5.5
    # of them (Student's t of 15): one false alarm in 1,500. The evidence on a finer grid is the same to .0001.
    ratio, tasks = 0.3, sinusoid(30, 4, seed=5).tasks[index : index + 1].to(dtype=F64)
    evidence, marginals = _on_grid({name: value[0] for name, value in tasks.data.items()}, ratio, (100, 160, 120))
    assert _count_modes(marginals["frequency"]) >= 4
    inference = smc(num_particles=500, num_steps=20)
    bound = bind(sinusoid_program(initial_noise=ratio), tasks, inference, "prior")
    adapter, batch = replace(bound, randomness="different"), as_task_data(tasks)
    many = batch._replace(data={name: value.expand(16, -1) for name, value in batch.data.items()})
    torch.manual_seed(0)
    with torch.no_grad():
        state = adapter.adapt(adapter.density.prior, many)
    assert (state.temperature == 1).all()

    found, exact = [(state.log_evidence - evidence).exp()], [1.0]
    for i, (name, weights) in enumerate(marginals.items()):
        share, at = torch.sigmoid(state.particles[..., i]), (torch.arange(len(weights)) + 0.5) / len(weights)
        found += [share.mean(1), share.square().mean(1)]
        exact += [float(weights @ at.to(F64)), float(weights @ at.to(F64).square())]
        if name == "frequency":
            quarters = weights.unflatten(0, (4, -1)).sum(1).tolist()
            found += [((share * 4).long() == quarter).to(F64).mean(1) for quarter in range(4)]
            exact += quarters
    for values, value in zip(found, exact, strict=True):
        assert abs(values.mean() - value) < 5.5 * (values.std() / 4).clamp_min(1e-3)
    assert found[0].std() < 1
    assert max(values.std() for values in found[1:]) < 0.25


def _count_modes(weights: Tensor) -> int:
    """Separate stretches of a marginal that are at least a twentieth as high as its peak."""
    high = weights > 0.05 * weights.max()
    return int((high[1:] & ~high[:-1]).sum() + high[0])


def test_it_is_meta_learned_without_warnings() -> None:
    tasks, inference = sinusoid(8, 6, seed=0).tasks, smc(num_particles=20, num_steps=3, num_moves=1)
    prior = bp.meta_learn(
        sinusoid_program(), tasks, num_support=3, num_steps=3, inference=inference, device="cpu", progress=False
    )
    assert prior.start == "prior"
    assert all(bool((prior.params[name] != value).all()) for name, value in prior.density.prior.items())
    assert all(bool((value > 0).all()) for value in prior.params.values())


@pytest.mark.parametrize("option", ["largest_amplitude", "highest_frequency", "initial_noise"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_bad_options_are_refused(option: str, value: float) -> None:
    given: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=f"{option}={value} must be positive"):
        sinusoid_program(**given)
