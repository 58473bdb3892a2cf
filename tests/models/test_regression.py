"""The hierarchical network against Pyro's density, a hand-written forward pass and the published sizes."""

from collections.abc import Callable
from math import log, prod
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call

import bmaml_ppl as bp
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.inference import map_estimate, svgd
from bmaml_ppl.models import hierarchical_regression
from bmaml_ppl.objectives import chaser, query_nll

F64 = torch.float64


def _data(num: int = 6, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    x = torch.linspace(-2, 2, num, dtype=dtype)
    return {"x": x, "y": torch.sin(x)}


def _module() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def _pyro_log_joint(model: Callable[..., Any], density: Density, z: Tensor, data: dict[str, Tensor]) -> Tensor:
    values = density.constrain(z, density.prior, data)
    with pyro.poutine.trace() as traced, pyro.condition(data=values):
        model(**data)
    log_det = sum(z[site.slice].sum() for name, site in density.sites.items() if name in ("gamma", "lam"))
    return torch.as_tensor(traced.trace.log_prob_sum() + log_det).detach()


@pytest.mark.parametrize("precisions", ["latent", "learned"])
@pytest.mark.parametrize("center", ["zero", "learned"])
@pytest.mark.parametrize("kind", ["sizes", "module"])
def test_density_is_pyros(center: Any, kind: str, precisions: Any) -> None:
    network: Any = (1, 4, 3, 1) if kind == "sizes" else _module()
    data = _data() if kind == "sizes" else {"x": torch.randn(6, 2, dtype=F64), "y": torch.randn(6, 3, dtype=F64)}
    model = hierarchical_regression(network, center=center, precisions=precisions)
    density = from_model(model, data)
    z = 0.3 * torch.randn(density.dim, dtype=F64)
    torch.testing.assert_close(density.log_joint(z, density.prior, data), _pyro_log_joint(model, density, z, data))


def test_the_authors_network_has_3403_coordinates() -> None:
    density = from_model(hierarchical_regression((1, 40, 40, 40, 1)), _data())
    assert density.dim == 3403
    assert {name: site.stop - site.start for name, site in density.sites.items()} == {
        "gamma": 1,
        "lam": 1,
        "weights": 3401,
    }
    assert density.prior == {}


def test_learned_precisions_leave_the_weights_alone_as_latents() -> None:
    model = hierarchical_regression(
        (1, 4, 1), center="learned", precisions="learned", initial_noise=0.2, initial_scale=0.3
    )
    density = from_model(model, _data())
    assert density.dim == 13
    assert list(density.sites) == ["weights"]
    torch.testing.assert_close(density.prior["noise"], torch.tensor(0.2, dtype=F64))
    torch.testing.assert_close(density.prior["scale"], torch.full((13,), 0.3, dtype=F64))
    z, scale = torch.randn(13, dtype=F64), torch.rand(13, dtype=F64) + 0.1
    params = density.prior | {"scale": scale, "noise": torch.tensor(0.5, dtype=F64)}
    mean = torch.relu(_data()["x"][:, None] * z[:4] + z[4:8]) @ z[8:12] + z[12]
    expected = Normal(params["theta"], scale).log_prob(z).sum() + Normal(mean, 0.5).log_prob(_data()["y"]).sum()
    torch.testing.assert_close(density.log_joint(z, params, _data()), expected)


def test_learned_precisions_are_learned() -> None:
    # y = a x with a ~ N(0, 1) and noise .3: the slope's spread must grow from .5 (its standard error is .11), the
    # intercept's fall from .5 and the noise from .4 (standard error .01).
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 10, generator=generator) * 4 - 2
    y = torch.randn(40, 1, generator=generator) * x + 0.3 * torch.randn(40, 10, generator=generator)
    prior = bp.meta_learn(
        hierarchical_regression((1, 1), center="learned", precisions="learned", initial_noise=0.4, initial_scale=0.5),
        bp.Tasks({"x": x, "y": y}, outputs=("y",)),
        num_support=5,
        num_steps=100,
        inference=svgd(num_particles=8, num_steps=8),
        device="cpu",
        progress=False,
    )
    assert prior.start == "prior"
    slope, intercept = prior.params["scale"]
    assert slope > 0.7
    assert intercept < 0.35
    assert prior.params["noise"].item() == pytest.approx(0.3, abs=0.06)


def test_weights_know_the_shapes_of_their_layers() -> None:
    sites = from_model(hierarchical_regression((1, 40, 3, 1)), _data()).sites
    assert sites["weights"].shapes == ((40, 1), (40,), (3, 40), (3,), (1, 3), (1,))
    assert sites["gamma"].shapes is None
    data = {"x": torch.randn(6, 2, dtype=F64), "y": torch.randn(6, 3, dtype=F64)}
    shapes = from_model(hierarchical_regression(_module(), precisions="learned"), data).sites["weights"].shapes
    assert shapes == ((5, 2), (5,), (5,), (5,), (3, 5), (3,))


def test_perceptron_is_the_forward_pass_by_hand() -> None:
    density = from_model(hierarchical_regression((1, 2, 3, 1)), _data())
    z = torch.randn(density.dim, dtype=F64)
    w = z[density.sites["weights"].slice]
    hidden = torch.relu(_data()["x"][:, None] @ w[:2].reshape(2, 1).T + w[2:4])
    hidden = torch.relu(hidden @ w[4:10].reshape(3, 2).T + w[10:13])
    mean = hidden @ w[13:16] + w[16]
    gamma = z[density.sites["gamma"].slice].exp()
    expected = 0.5 * (gamma.log() - log(2 * torch.pi)) - 0.5 * gamma * (_data()["y"] - mean) ** 2
    torch.testing.assert_close(density.log_likelihood(z, {}, _data())["obs"], expected)


def test_module_runs_on_slices_and_is_left_alone() -> None:
    module = _module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = {"x": torch.randn(6, 2, dtype=F64), "y": torch.randn(6, 3, dtype=F64)}
    density = from_model(hierarchical_regression(module), data)
    z = torch.randn(density.dim, dtype=F64)
    flat, named, start = z[density.sites["weights"].slice], {}, 0
    for name, parameter in module.named_parameters():
        named[name] = flat[start : start + parameter.numel()].reshape(parameter.shape)
        start += parameter.numel()
    mean = functional_call(module, named, (data["x"],))
    gamma = z[density.sites["gamma"].slice].exp()
    expected = (0.5 * (gamma.log() - log(2 * torch.pi)) - 0.5 * gamma * (data["y"] - mean) ** 2).sum(-1)
    torch.testing.assert_close(density.log_likelihood(z, {}, data)["obs"], expected)
    assert start == len(flat)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_free_particles_start_where_the_authors_do() -> None:
    # 20 x 1,600 Xavier weights: the standard error of their sd is 0.4 % of it.
    density = from_model(hierarchical_regression((1, 40, 40, 1), initial_noise=0.1), _data())
    particles = density.initial_particles(20, _data())
    gamma, lam = (particles[:, density.sites[name].slice] for name in ("gamma", "lam"))
    torch.testing.assert_close(gamma, torch.full_like(gamma, log(100)), atol=0.01, rtol=0)
    torch.testing.assert_close(lam, torch.zeros_like(lam), atol=0.01, rtol=0)
    assert gamma.std() > 0
    weights = particles[:, density.sites["weights"].slice]
    assert weights[:, 80:1680].std().item() == pytest.approx((2 / 80) ** 0.5, rel=0.02)
    assert weights[:, 40:80].std().item() == pytest.approx(0.01, rel=0.15)
    assert torch.corrcoef(weights)[0, 1].abs() < 0.1


def test_a_module_starts_like_its_own_initialiser() -> None:
    density = from_model(
        hierarchical_regression(nn.Linear(100, 40)), {"x": torch.randn(3, 100), "y": torch.randn(3, 40)}
    )
    weights = density.initial_particles(5, {"x": torch.randn(3, 100), "y": torch.randn(3, 40)})
    weights = weights[:, density.sites["weights"].slice]
    assert weights[:, :4000].std().item() == pytest.approx((1 / 300) ** 0.5, rel=0.06)


def test_learned_center_starts_at_the_networks_weights() -> None:
    module = _module()
    data = {"x": torch.randn(6, 2, dtype=F64), "y": torch.randn(6, 3, dtype=F64)}
    theta = from_model(hierarchical_regression(module, center="learned"), data).prior["theta"]
    torch.testing.assert_close(theta, nn.utils.parameters_to_vector(module.parameters()).detach())
    first, again, other = (
        from_model(hierarchical_regression((1, 4, 1), center="learned", seed=s), _data()).prior["theta"]
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (prod((4, 1)) + 4 + 4 + 1,)


def test_ensemble_recovers_noise_and_curve() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 60, dtype=F64)
    data = {"x": x, "y": torch.sin(x) + 0.2 * torch.randn(60, dtype=F64, generator=generator)}
    density = from_model(hierarchical_regression((1, 10, 1), activation=torch.tanh), data)
    inference = map_estimate(num_particles=3, preconditioner="adaptive", step_size=0.02)
    state = inference.init({"particles": density.initial_particles(3, data)})
    for _ in range(600):
        state = inference.update(state, lambda z: density.log_joint(z, {}, data))
    likelihood = torch.func.vmap(lambda z: density.log_likelihood(z, {}, data)["obs"].mean())(state.particles)
    # The truth scores -0.5 log(2 pi 0.04) - 0.5 = 0.19 a point, a flat line -1.1.
    assert likelihood.min() > 0.0
    noise = (-0.5 * state.particles[:, density.sites["gamma"].slice]).exp()
    torch.testing.assert_close(noise, torch.full_like(noise, 0.2), rtol=0.35, atol=0)


@pytest.mark.parametrize("center", ["zero", "learned"])
@pytest.mark.parametrize("kind", ["sizes", "module"])
def test_meta_learns_without_warnings(center: Any, kind: str) -> None:
    x = torch.rand(6, 8) * 4 - 2
    tasks = bp.Tasks({"x": x, "y": torch.sin(x)}, outputs=("y",))
    network: Any = (
        (1, 6, 1)
        if kind == "sizes"
        else nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    )
    objective = chaser(sites=["weights"]) + query_nll()
    prior = bp.meta_learn(
        hierarchical_regression(network, center=center),
        tasks,
        num_support=4,
        num_steps=3,
        inference=svgd(num_particles=3, num_steps=2, init="free"),
        objective=objective,
        device="cpu",
        progress=False,
    )
    assert len(prior.history.loss) == 3
    assert prior.adapt(x=x[0], y=torch.sin(x[0])).predict(x=x[0])["obs"].shape == (1000, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": (1,)}, "at least two sizes"),
        ({"network": (1, 0, 1)}, "at least two sizes"),
        ({"network": nn.Tanh()}, "no parameters"),
        ({"network": nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))}, "running statistics"),
        ({"network": (1, 1), "center": "mean"}, "center='mean'"),
        ({"network": (1, 1), "precisions": "fixed"}, "precisions='fixed'"),
        ({"network": (1, 1), "initial_noise": 0.0}, "initial_noise"),
        ({"network": (1, 1), "initial_scale": -1.0}, "initial_scale"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hierarchical_regression(**options)


def test_wrong_shapes_are_refused() -> None:
    model = hierarchical_regression((2, 3, 1))
    with pytest.raises(ValueError, match=r"network takes \(N, 2\)"):
        from_model(model, _data())
    with pytest.raises(ValueError, match=r"y has shape \(4, 1\)"):
        from_model(model, {"x": torch.randn(4, 2), "y": torch.randn(4, 1)})
