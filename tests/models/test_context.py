"""A network steered by context: its density by hand, its weights' gradients, and a family that it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import bmaml_ppl as bp
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.inference import smc
from bmaml_ppl.models import context_network

F64 = torch.float64
SIZES = (2, 5, 4, 1)


def _data(num: int = 6, width: int = 2, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    x = torch.randn(num, width, dtype=dtype) if width > 1 else torch.randn(num, dtype=dtype)
    return {"x": x, "y": torch.randn(num, dtype=dtype)}


def _generic_prior(density: Density) -> dict[str, Tensor]:
    """Weights away from their regular start, at which the noise does not depend on the context."""
    return {name: value.double() + 0.3 * torch.randn(value.shape, dtype=F64) for name, value in density.prior.items()}


def _by_hand(params: dict[str, Tensor], x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Means and noise, row by row."""
    weights = {name.removeprefix("network$$$"): value for name, value in params.items()}
    means = []
    for row in x:
        hidden = row
        for layer in range(2):
            hidden = weights[f"layers.{layer}.weight"] @ hidden + weights[f"layers.{layer}.bias"]
            size = len(hidden)
            steered = weights[f"steering.{layer}.weight"] @ context
            hidden = torch.tanh(hidden * (1 + steered[:size]) + steered[size:])
        means.append(weights["layers.2.weight"][0] @ hidden + weights["layers.2.bias"][0])
    hidden = torch.tanh(weights["noise.0.weight"] @ context + weights["noise.0.bias"])
    noise = torch.exp(weights["noise.2.weight"][0] @ hidden + weights["noise.2.bias"][0])
    return torch.stack(means), noise


def test_log_joint_is_the_closed_form() -> None:
    data = _data()
    density = from_model(context_network(SIZES, num_context=3), data)
    params, z = _generic_prior(density), torch.randn(3, dtype=F64)
    mean, noise = _by_hand(params, data["x"], z)
    expected = Normal(0.0, 1.0).log_prob(z).sum() + Normal(mean, noise).log_prob(data["y"]).sum()
    torch.testing.assert_close(density.log_joint(z, params, data), expected)
    assert {name: tuple(site.shape) for name, site in density.sites.items()} == {"context": (3,)}
    assert density.networks == set(density.prior)


def test_the_gradient_reaches_every_weight_and_the_context() -> None:
    data = _data()
    density = from_model(context_network(SIZES, num_context=2), data)
    params, names = _generic_prior(density), sorted(density.prior)

    def log_joint(z: Tensor, *values: Tensor) -> Tensor:
        return density.log_joint(z, params | dict(zip(names, values, strict=True)), data)

    leaves = [value.clone().requires_grad_() for value in (torch.randn(2, dtype=F64), *(params[n] for n in names))]
    assert torch.autograd.gradcheck(log_joint, leaves)
    gradients = torch.autograd.grad(log_joint(*leaves), leaves)
    assert all(bool((gradient.abs() > 1e-6).any()) for gradient in gradients)


def test_the_first_noise_is_the_given_one_whatever_the_context() -> None:
    data = _data(width=1)
    density = from_model(context_network((1, 8, 1), initial_noise=0.2), data)
    for z in torch.randn(3, 4, dtype=F64):
        fn = density.observe(z, density.prior, data)["obs"].fn
        torch.testing.assert_close(fn.stddev, torch.full((6,), 0.2, dtype=F64), rtol=1e-6, atol=0)


def test_tasks_differ_at_the_start_in_a_few_respects() -> None:
    # Functions of unit size, neither all the same nor wild.
    x = torch.linspace(-2, 2, 50)
    density = from_model(context_network((1, 64, 64, 1)), {"x": x, "y": x})
    contexts = torch.randn(200, 4)
    curves = torch.stack([density.observe(z, density.prior, {"x": x, "y": x})["obs"].fn.loc for z in contexts])
    assert 0.2 < curves.std(0).mean() < 2
    assert 0.2 < curves.std(1).mean() < 3


def test_data_choose_the_dtype() -> None:
    data = {"x": torch.arange(5.0), "y": torch.randn(5)}
    density = from_model(context_network((1, 4, 1)), data)
    z = torch.randn(4)
    doubles = {name: value.double() for name, value in data.items()}
    precise = from_model(context_network((1, 4, 1)), doubles)
    found = precise.log_joint(z.double(), precise.prior, doubles)
    assert found.dtype == F64
    torch.testing.assert_close(found.float(), density.log_joint(z, density.prior, data))
    column = {**data, "x": data["x"][:, None]}
    torch.testing.assert_close(density.log_joint(z, density.prior, column), density.log_joint(z, density.prior, data))


def test_one_seed_gives_one_network_and_the_global_generator_rests() -> None:
    data, before = _data(dtype=torch.float32), torch.get_rng_state()
    first, again, other = (from_model(context_network(SIZES, seed=s), data).prior for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network$$$layers.0.weight"], other["network$$$layers.0.weight"])


def test_other_activations_are_used() -> None:
    data = _data()
    plain, bent = (from_model(context_network(SIZES, activation=a), data) for a in (torch.relu, torch.tanh))
    z = torch.randn(4, dtype=F64)
    assert plain.log_joint(z, plain.prior, data) != bent.log_joint(z, bent.prior, data)


def _levels(num_tasks: int, num: int, seed: int) -> bp.Tasks:
    """Constant functions at levels N(0, 1), with noise 0.1."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(num_tasks, 1, generator=generator) + 0.1 * torch.randn(num_tasks, num, generator=generator)
    return bp.Tasks({"x": torch.rand(num_tasks, num, generator=generator), "y": y}, outputs=("y",))


def test_what_tasks_differ_in_is_learned_and_kept(tmp_path: Path) -> None:
    # One point says all but the noise. Knowing nothing costs an error of 1, the first network 0.8 and more.
    prior = bp.meta_learn(
        context_network((1, 8, 1), num_context=2),
        _levels(60, 8, 0),
        num_support=range(1, 4),
        num_steps=150,
        inference=smc(num_particles=32, num_steps=8, num_moves=2),
        optimizer=lambda params: torch.optim.Adam(params, lr=0.02),
        device="cpu",
        progress=False,
    )
    prior.save(tmp_path / "prior.safetensors")
    again = bp.load_prior(tmp_path / "prior.safetensors", context_network((1, 8, 1), num_context=2, seed=1))
    episode = _levels(40, 12, 1).split_observations(2)
    errors = []
    for each in (prior, again):
        posterior = each.adapt(episode.support, inference=smc(num_particles=200, num_steps=20), compile=False)
        mean = posterior.predict(episode.query)["obs"].mean(0)
        errors.append((mean - episode.query.data["y"]).square().mean().sqrt())
    assert errors[0] < 0.35
    assert torch.equal(*errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": (1, 1)}, "at least three sizes"),
        ({"network": (1, 0, 1)}, "at least three sizes"),
        ({"network": (1, 4, 2)}, "the last 1"),
        ({"network": (1, 4, 1), "num_context": 0}, "num_context=0 must be at least 1"),
        ({"network": (1, 4, 1), "initial_noise": 0.0}, r"initial_noise=0\.0 must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        context_network(**options)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"network takes \(N, 2\)"):
        from_model(context_network(SIZES), _data(width=3))
    with pytest.raises(ValueError, match=r"y has shape \(5, 1\)"):
        from_model(context_network(SIZES), {"x": torch.randn(5, 2), "y": torch.randn(5, 1)})
