"""Neural linear regression against closed forms: density, evidence, gradients, and what it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal
from torch.func import jacrev

import bmaml_ppl as bp
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.inference import map_estimate
from bmaml_ppl.models import neural_linear
from bmaml_ppl.objectives import query_nll

F64 = torch.float64
SIZES = (2, 4, 3)


def _data(num: int = 5, width: int = 2) -> dict[str, Tensor]:
    x = torch.randn(num, width, dtype=F64) if width > 1 else torch.randn(num, dtype=F64)
    return {"x": x, "y": torch.randn(num, dtype=F64)}


def _module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _generic_prior(density: Density) -> dict[str, Tensor]:
    """Meta-parameters away from their regular start, in float64."""
    params = {name: value.double() for name, value in density.prior.items()}
    params["mean"] = torch.randn(4, dtype=F64)
    if "scale_tril" in params:
        params["scale_tril"] = 0.3 * torch.randn(4, 4, dtype=F64).tril(-1) + (torch.rand(4, dtype=F64) + 0.1).diag()
    else:
        params["scale"] = torch.rand(4, dtype=F64) + 0.1
    return {**params, "noise": torch.tensor(0.4, dtype=F64)}


def _design(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """An intercept and the perceptron's features, by hand."""
    hidden = x
    for layer in range(2):
        weight, bias = (params[f"features$$${kind}.{layer}"] for kind in ("weights", "biases"))
        hidden = torch.tanh(hidden @ weight.T + bias)
    return torch.cat([torch.ones(len(x), 1, dtype=F64), hidden], 1)


def _factor(params: dict[str, Tensor]) -> Tensor:
    return params["scale_tril"] if "scale_tril" in params else params["scale"].diag()


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_log_joint_is_the_closed_form(covariance: Any) -> None:
    data = _data()
    density = from_model(neural_linear(SIZES, covariance=covariance), data)
    params = _generic_prior(density)
    z = torch.randn(4, dtype=F64)
    prior = MultivariateNormal(params["mean"], scale_tril=_factor(params)).log_prob(z)
    likelihood = Normal(_design(params, data["x"]) @ z, params["noise"]).log_prob(data["y"]).sum()
    torch.testing.assert_close(density.log_joint(z, params, data), prior + likelihood)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_laplace_evidence_is_exact(covariance: Any) -> None:
    data = _data()
    density = from_model(neural_linear(SIZES, covariance=covariance), data)
    params = _generic_prior(density)
    design, variance = _design(params, data["x"]), params["noise"] ** 2
    precision = torch.cholesky_inverse(_factor(params)) + design.T @ design / variance
    information = torch.cholesky_inverse(_factor(params)) @ params["mean"] + design.T @ data["y"] / variance
    mode = torch.linalg.solve(precision, information)
    curvature = -jacrev(jacrev(lambda z: density.log_joint(z, params, data)))(mode)
    torch.testing.assert_close(curvature, precision)
    evidence = density.log_joint(mode, params, data) - 0.5 * torch.logdet(curvature / (2 * torch.pi))
    half = design @ _factor(params)
    marginal = MultivariateNormal(design @ params["mean"], half @ half.T + variance * torch.eye(5, dtype=F64))
    torch.testing.assert_close(evidence, marginal.log_prob(data["y"]))


@pytest.mark.parametrize("kind", ["sizes", "module"])
def test_the_gradient_reaches_every_weight_of_the_network(kind: str) -> None:
    data = _data()
    density = from_model(neural_linear(SIZES if kind == "sizes" else _module()), data)
    params = _generic_prior(density)
    z = torch.randn(4, dtype=F64)
    names = sorted(density.networks)
    assert len(names) == 4

    def log_joint(*values: Tensor) -> Tensor:
        return density.log_joint(z, params | dict(zip(names, values, strict=True)), data)

    leaves = [params[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(log_joint, leaves)
    gradients = torch.autograd.grad(log_joint(*leaves), leaves)
    assert all(bool((g.abs() > 1e-6).any()) for g in gradients)


def test_sites_shapes_and_starts() -> None:
    data = _data(width=1)
    density = from_model(neural_linear((1, 40, 40, 32), initial_scale=2.0, initial_noise=0.1), data)
    assert {name: tuple(site.shape) for name, site in density.sites.items()} == {"coef": (33,)}
    assert density.dim == 33
    assert len(density.networks) == 6
    torch.testing.assert_close(density.prior["scale_tril"], 2 / 32**0.5 * torch.eye(33, dtype=F64))
    assert density.prior["noise"].item() == pytest.approx(0.1)
    column = {"x": data["x"][:, None], "y": data["y"]}
    z = torch.randn(33, dtype=F64)
    left = density.log_joint(z, density.prior, data)
    torch.testing.assert_close(left, density.log_joint(z, density.prior, column))
    assert density.simulate(z, density.prior, data)["obs"].shape == (5,)


def test_functions_of_the_first_prior_are_of_unit_size() -> None:
    # sqrt(E f^2) = sqrt((1 + sum h^2) / H), exactly; tanh features keep it between a third and one.
    x = torch.linspace(-2, 2, 50, dtype=F64)
    density = from_model(neural_linear((1, 40, 40, 32)), {"x": x, "y": x})
    points = torch.eye(33, dtype=F64)
    curves = torch.stack([density.observe(z, density.prior, {"x": x, "y": x})["obs"].fn.loc for z in points])
    size = (curves.square().sum(0) / 32).sqrt()
    assert size.min() > 1 / 3
    assert size.max() < 1.1
    assert curves[1:].std(1).mean() > 0.1  # and features vary with x


def test_one_seed_gives_one_network_and_the_global_generator_rests() -> None:
    before = torch.get_rng_state()
    first, again, other = (from_model(neural_linear(SIZES, seed=s), _data_of(0)).prior for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features$$$weights.0"], other["features$$$weights.0"])


def _data_of(seed: int) -> dict[str, Tensor]:
    draw = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    return {"x": draw[:, :2], "y": draw[:, 2]}


def test_a_module_is_left_alone() -> None:
    module = _module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(4, 6, 2, dtype=F64)
    tasks = bp.Tasks({"x": x, "y": x.sum(-1)}, outputs=("y",))
    prior = bp.meta_learn(neural_linear(module), tasks, num_support=3, num_steps=3, device="cpu", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not torch.equal(prior.params["features$$$0.weight"], before["0.weight"])


def test_a_learned_prior_comes_back_from_a_file(tmp_path: Path) -> None:
    x = torch.rand(4, 8)
    tasks = bp.Tasks({"x": x, "y": torch.sin(3 * x)}, outputs=("y",))
    prior = bp.meta_learn(neural_linear((1, 3, 2)), tasks, num_support=3, num_steps=2, device="cpu", progress=False)
    prior.save(tmp_path / "prior.safetensors")
    again = bp.load_prior(tmp_path / "prior.safetensors", neural_linear((1, 3, 2), seed=1))
    first, second = (p.adapt(tasks).predict(tasks)["obs"] for p in (prior, again))
    assert torch.equal(first, second)


def test_learns_sinusoids_better_than_a_constant() -> None:
    # One Newton step ends at the posterior mean, so that this learns to predict by it. A constant's error is that
    # of the data's spread, 4.1; 200 steps reach 1.8, and these 100 stay far below it.
    train, test = (sinusoid(size, 20, seed=seed).tasks for size, seed in ((100, 0), (40, 1)))
    prior = bp.meta_learn(
        neural_linear((1, 20, 16)),
        train.standardize(),
        num_support=10,
        num_steps=100,
        inference=map_estimate(num_steps=1),
        objective=query_nll(),
        device="cpu",
        progress=False,
    )
    episode = test.split_observations(10)
    predicted = prior.adapt(episode.support).predict(episode.query)["obs"].mean(0)
    target = episode.query.data["y"]
    assert (predicted - target).square().mean() < 0.7 * (target - train.data["y"].mean()).square().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": (1,)}, "at least two sizes"),
        ({"network": (1, 0)}, "at least two sizes"),
        ({"network": (1, 3), "covariance": "banded"}, "covariance='banded'"),
        ({"network": (1, 3), "initial_scale": 0.0}, r"initial_scale=0\.0 must be positive"),
        ({"network": (1, 3), "initial_noise": -1.0}, r"initial_noise=-1\.0 must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neural_linear(**options)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"network takes \(N, 2\)"):
        from_model(neural_linear(SIZES), _data(width=3))
    with pytest.raises(ValueError, match=r"y has shape \(5, 1\)"):
        from_model(neural_linear(SIZES), {"x": torch.randn(5, 2), "y": torch.randn(5, 1)})
    with pytest.raises(ValueError, match=r"output has shape \(5,\); give features \(5, H\)"):
        from_model(neural_linear(nn.Flatten(0)), {"x": torch.randn(5), "y": torch.randn(5)})
