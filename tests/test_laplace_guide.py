"""The Laplace guide: Pyro's own where that works, the closed form where there is one, and Pyro's inference on top."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

from bmaml_ppl.adaptation import Adapter, TaskData
from bmaml_ppl.density import from_model
from bmaml_ppl.diagnostics.curvature import NotConverged, RepairedCurvature
from bmaml_ppl.inference import laplace
from bmaml_ppl.laplace_guide import LaplaceGuide
from bmaml_ppl.models.schools import eight_schools, eight_schools_data
from bmaml_ppl.types import Model

Y = torch.tensor([0.8, 1.1, 0.3, 1.6], dtype=torch.float64)
NOISE = 0.5


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _conjugate(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.2, 1.5))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(level, NOISE), obs=y)


def _gamma_poisson(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.7))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Poisson(rate), obs=y)


def _logistic(x: Tensor, y: Tensor) -> None:
    bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
    coef = pyro.sample("coef", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    lapse = pyro.sample("lapse", dist.Beta(2.0, 30.0))
    with pyro.plate("data", len(x)):
        chance = torch.sigmoid(bias + x @ coef) * (1 - lapse) + lapse / 2
        pyro.sample("obs", dist.Bernoulli(chance), obs=y)


def _plated(y: Tensor, group: Tensor, num_groups: int, names: list[str] | None = None) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", num_groups):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([4.0, 3.0, 5.0])))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mean[..., group] + weights[..., group, 0], scale), obs=y)


def _nested(y: Tensor) -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", y.shape[0], dim=-2):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        with pyro.plate("columns", y.shape[1], dim=-1):
            cell = pyro.sample("cell", dist.Normal(top, 1.0))
            pyro.sample("obs", dist.Normal(cell, 0.5 + scale), obs=y)


def _hierarchy(y: Tensor, sigma: float) -> None:
    mean = pyro.param("mean", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(1.2), constraint=dist.constraints.positive)
    with pyro.plate("groups", len(y)):
        level = pyro.sample("level", dist.Normal(mean, scale))
        pyro.sample("obs", dist.Normal(level, sigma), obs=y)


GROUPED = (_random(7) + 1.0, torch.tensor([0, 0, 1, 1, 1, 2, 2]), 3)
X = _random(30, 3, seed=1)
CASES: dict[str, tuple[Model, tuple[Any, ...]]] = {
    "conjugate": (_conjugate, (Y,)),
    "gamma-poisson": (_gamma_poisson, (torch.tensor([3.0, 1.0, 4.0, 2.0]),)),
    "logistic": (_logistic, (X.double(), (X.sum(1) + _random(30, seed=2) > 0).double())),
    "eight schools": (eight_schools(), tuple(v.double() for v in eight_schools_data().values())),
    "plated": (_plated, (GROUPED[0].double(), *GROUPED[1:])),
    "nested plates": (_nested, (_random(2, 3, seed=5).double() + 1,)),
}


def _pyro_laplace(model: Model, args: tuple[Any, ...]) -> Any:
    """Pyro's guide around a mode found by L-BFGS to rounding error."""
    guide = AutoLaplaceApproximation(model)
    guide(*args)
    search = torch.optim.LBFGS(
        guide.parameters(), max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value: Tensor = Trace_ELBO().differentiable_loss(model, guide, *args)
        value.backward()
        return value

    search.step(loss)
    return guide.laplace_approximation(*args)


@pytest.mark.parametrize("case", CASES)
def test_equals_pyros(case: str) -> None:
    model, args = CASES[case]
    guide, theirs = LaplaceGuide(model), _pyro_laplace(model, args)
    ours, reference = guide.get_posterior(*args), theirs.get_posterior(*args)
    assert torch.allclose(ours.loc, reference.loc, rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours.covariance_matrix, reference.covariance_matrix, rtol=1e-4, atol=1e-6)
    z = _random(3, len(ours.loc)).double()
    assert torch.allclose(ours.log_prob(z), reference.log_prob(z), rtol=1e-4)
    quantiles, expected = guide.quantiles([0.1, 0.5, 0.9], *args), theirs.quantiles([0.1, 0.5, 0.9])
    for name, value in guide.median(*args).items():
        assert torch.allclose(value, quantiles[name][1])
        assert torch.allclose(quantiles[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["plated", "nested plates"])
def test_its_trace_is_pyros_trace(case: str) -> None:
    model, args = CASES[case]
    theirs: Any = pyro.poutine.trace(_pyro_laplace(model, args)).get_trace(*args)
    z = theirs.nodes["_AutoMultivariateNormal_latent"]["value"]
    replayed = pyro.poutine.condition(LaplaceGuide(model), data={"_z": z})
    ours: Any = pyro.poutine.trace(replayed).get_trace(*args)
    for trace in (ours, theirs):
        trace.compute_log_prob()
    for name in {"plated": ("scale", "mean", "weights"), "nested plates": ("top", "scale", "cell")}[case]:
        assert ours.nodes[name]["value"].shape == theirs.nodes[name]["value"].shape
        assert torch.allclose(ours.nodes[name]["value"], theirs.nodes[name]["value"], rtol=1e-6)
        assert torch.allclose(ours.nodes[name]["log_prob"], theirs.nodes[name]["log_prob"], rtol=1e-6)
        assert ours.nodes[name]["fn"].event_dim == theirs.nodes[name]["fn"].event_dim


def test_many_tasks_at_once_are_a_loop_over_the_guide() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        center = pyro.param("center", torch.zeros(2))
        coef = pyro.sample("coef", dist.Normal(center, 1.0).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.StudentT(4.0, coef[0] + coef[1] * x, noise), obs=y)

    x = _random(6, 8)
    y = 1 + x + 0.3 * _random(6, 8, seed=1)
    density = from_model(model, {"x": x[0], "y": y[0]})
    adapter = Adapter(density, laplace(num_steps=30, sites=density.sites), "free")
    prior = {**density.prior, "particles": torch.zeros(1, 3)}
    with torch.no_grad():
        batch = adapter.adapt(prior, TaskData({"x": x, "y": y}, None))
    guide = LaplaceGuide(model)
    for i in range(6):
        one = guide.get_posterior(x[i], y=y[i])
        assert torch.allclose(one.loc, batch.particles[i, 0], atol=1e-8)
        factor = batch.precision.factor[i, 0]
        assert torch.allclose(one.covariance_matrix, torch.cholesky_inverse(factor), rtol=1e-6, atol=1e-9)
        assert torch.allclose(guide.diagnostics(x[i], y=y[i])["log_evidence"], batch.log_evidence[i, 0])


def _slopes(value: Any, names: tuple[str, ...], step: float = 1e-4) -> dict[str, Tensor]:
    """Central differences of a function of the parameter store in each unconstrained parameter."""
    found = {}
    for name in names:
        leaf = pyro.get_param_store()._params[name].data
        slope = torch.zeros(leaf.numel())
        for i in range(leaf.numel()):
            ends = []
            for sign in (1, -1):
                leaf.view(-1)[i] += sign * step
                ends.append(value().item())
                leaf.view(-1)[i] -= sign * step
            slope[i] = (ends[0] - ends[1]) / (2 * step)
        found[name] = slope.reshape(leaf.shape)
    return found


def _counts(x: Tensor, y: Tensor, network: nn.Module) -> None:
    pyro.module("network", network)
    mean = pyro.param("mean", torch.tensor(0.4))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
    level = pyro.sample("level", dist.Normal(mean, scale))
    rate = pyro.sample("rate", dist.Gamma(3.0, 1 / scale))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Poisson(rate * torch.exp(level + network(x.unsqueeze(1)).squeeze(1))), obs=y)


@pytest.mark.parametrize("quantity", ["draw", "log density", "elbo"])
@pytest.mark.parametrize("settings", [{}, {"curvature": "fisher", "form": "dual"}], ids=["exact", "dual"])
def test_gradients_reach_the_models_parameters(quantity: str, settings: dict[str, Any]) -> None:
    network = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
    arguments = (torch.linspace(-1, 1, 5), torch.tensor([1.0, 0.0, 2.0, 3.0, 2.0]), network)
    guide = LaplaceGuide(_counts, **settings)

    def value() -> Tensor:
        torch.manual_seed(3)
        if quantity == "elbo":
            loss: Tensor = Trace_ELBO().differentiable_loss(_counts, guide, *arguments)
            return loss
        posterior = guide.get_posterior(*arguments)
        if quantity == "draw":
            return (posterior.rsample() * torch.tensor([1.0, -2.0])).sum()
        return posterior.log_prob(torch.tensor([0.3, 0.2]))

    value().backward()
    names = ("mean", "scale", "network$$$0.weight", "network$$$2.bias")
    expected = _slopes(value, names)
    for name in names:
        got = pyro.get_param_store()._params[name].grad
        assert got is not None
        assert got.abs().sum() > 1e-3
        assert torch.allclose(got, expected[name], rtol=1e-5, atol=1e-7)


class _Network(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        linear: Any = PyroModule[nn.Linear]
        self.features = linear(1, 2)
        self.last: Any = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        self.noise: Any = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = torch.tanh(self.features(x.unsqueeze(-1))) @ self.last
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, self.noise), obs=y)


def test_a_pyro_module_is_learned() -> None:
    model, x = _Network(), torch.linspace(-1, 1, 6)
    guide = LaplaceGuide(model)

    def loss() -> Tensor:
        value: Tensor = Trace_ELBO().differentiable_loss(model, guide, x, y=x**2)
        return value

    loss().backward()
    expected = _slopes(loss, ("features.weight", "noise"))
    for name, slope in expected.items():
        got = pyro.get_param_store()._params[name].grad
        assert got is not None
        assert torch.allclose(got, slope, rtol=1e-5, atol=1e-7)


def test_elbo_is_the_evidence_where_the_posterior_is_gaussian_and_svi_learns_the_prior() -> None:
    guide = LaplaceGuide(_hierarchy)
    loss = Trace_ELBO().differentiable_loss(_hierarchy, guide, Y, NOISE)
    mean, scale = pyro.param("mean"), pyro.param("scale")
    exact = -dist.Normal(mean, (scale**2 + NOISE**2).sqrt()).log_prob(Y).sum()
    assert torch.allclose(loss, exact, rtol=1e-10)
    leaves = [pyro.get_param_store()._params[name] for name in ("mean", "scale")]
    for got, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, leaves), strict=True):
        assert torch.allclose(got, expected, rtol=1e-8)

    y = torch.tensor([1.2, -0.4, 0.9, -1.1, 2.0])
    svi = SVI(_hierarchy, guide, pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.93, "betas": (0.7, 0.9)}), Trace_ELBO())
    for _ in range(40):
        svi.step(y, NOISE)
    assert abs(pyro.param("mean") - y.mean()) < 1e-2
    assert abs(pyro.param("scale") - (y.var(correction=0) - NOISE**2).sqrt()) < 1e-2
    assert set(pyro.get_param_store()) == {"mean", "scale"}


@pytest.mark.parametrize("vectorize", [False, True])
def test_several_elbo_particles(vectorize: bool) -> None:
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize)
    svi = SVI(_hierarchy, LaplaceGuide(_hierarchy), pyro.optim.ClippedAdam({"lr": 1e-8}), elbo)
    exact = -dist.Normal(0.3, math.hypot(1.2, NOISE)).log_prob(Y).sum()
    assert math.isclose(svi.step(Y, NOISE), exact, rel_tol=1e-6)


def test_importance_weights_are_the_evidence() -> None:
    sampler = Importance(_conjugate, LaplaceGuide(_conjugate), num_samples=20).run(Y)
    exact = dist.MultivariateNormal(0.2 * torch.ones(4), NOISE**2 * torch.eye(4) + 1.5**2).log_prob(Y)
    assert torch.allclose(torch.as_tensor(sampler.log_weights), exact.expand(20), rtol=1e-10)


def test_importance_corrects_what_is_not_gaussian() -> None:
    model, (y,) = CASES["gamma-poisson"]
    num_samples = 400
    sampler = Importance(model, LaplaceGuide(model), num_samples=num_samples).run(y)
    a, b, total = 2 + y.sum(), 0.7 + len(y), torch.lgamma(y + 1).sum()
    exact = 2 * math.log(0.7) - math.lgamma(2) + torch.lgamma(a) - a * math.log(b) - total
    relative = (torch.as_tensor(sampler.log_weights) - exact).exp()
    error = relative.std() / math.sqrt(num_samples)
    assert error < 0.05
    assert abs(relative.mean() - 1) < 4.5 * error  # false-alarm rate 7e-6


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_the_gaussian(parallel: bool) -> None:
    model, args = CASES["plated"]
    guide = LaplaceGuide(model)
    drawn = Predictive(model, guide=guide, num_samples=20, parallel=parallel)(*args)
    assert drawn["mean"].reshape(20, -1).shape == (20, 3)
    assert drawn["weights"].reshape(20, -1).shape == (20, 9)
    num_samples = 300
    held = guide.laplace_approximation(*args)
    latents = Predictive(held, num_samples=num_samples, parallel=parallel)()
    posterior = guide.get_posterior(*args)
    z = latents["_z"].reshape(num_samples, -1)
    # Ten means and ten variances at 4.5 standard errors: 1.4e-4.
    assert ((z.mean(0) - posterior.loc).abs() < 4.5 * posterior.stddev / math.sqrt(num_samples)).all()
    assert ((z.var(0) / posterior.variance).log().abs() < 4.5 * math.sqrt(2 / num_samples)).all()
    assert torch.allclose(latents["scale"].reshape(num_samples), z[:, 0].exp())
    assert torch.allclose(latents["mean"].reshape(num_samples, 3), z[:, 1:4])


def test_a_held_posterior_predicts_at_new_inputs() -> None:
    def line(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(slope * x, 0.1), obs=y)

    x = torch.tensor([-1.0, 1.0, 2.0])
    held = LaplaceGuide(line).laplace_approximation(x, y=2 * x)
    drawn = Predictive(line, guide=held, num_samples=300, parallel=True)(torch.tensor([10.0, 0.0]))["obs"]
    exact_sd = math.sqrt(1 / (1 / 9 + 6 / 0.01))
    assert abs(drawn[:, 0].mean() - 20) < 4.5 * 10 * exact_sd / math.sqrt(300) + 1e-2  # false-alarm rate 7e-6
    assert drawn.shape == (300, 2)


def test_arguments_of_any_kind_and_models_that_change_with_them() -> None:
    guide = LaplaceGuide(_plated)
    y, group = GROUPED[0].double(), GROUPED[1]
    assert guide(y, group, num_groups=3, names=["a", "b"])["mean"].shape == (3,)
    assert guide(y=y, group=group, num_groups=5, names=None)["mean"].shape == (5,)
    assert guide.get_posterior(y[:4], group[:4], 2).loc.shape == (7,)

    def counted(y: Tensor, group: np.ndarray) -> None:
        size = int(group.max()) + 1
        level = pyro.sample("level", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        if y.sum() > 0:
            pyro.sample("obs", dist.Normal(level[group], 1.0).to_event(1), obs=y)
        else:
            pyro.factor("penalty", -(level**2).sum())

    guide = LaplaceGuide(counted)
    assert torch.allclose(guide.median(y[:2], np.array([0, 1]))["level"], y[:2] / 2)
    assert torch.allclose(guide.median(y[:2], np.array([0, 2]))["level"], torch.stack([y[0] / 2, 0 * y[0], y[1] / 2]))
    assert torch.allclose(guide.median(-y[:2].abs(), np.array([0, 1]))["level"], torch.zeros(2))
    assert torch.allclose(guide.get_posterior(-y[:2].abs(), np.array([0, 1])).variance, torch.full((2,), 1 / 3))


def test_what_changes_outside_the_arguments_is_seen() -> None:
    class Model:
        center = 1.0

        def __call__(self) -> None:
            level = pyro.sample("level", dist.Normal(self.center, 1.0))
            pyro.sample("obs", dist.Normal(level, 1.0), obs=torch.tensor(0.0))

    model = Model()
    guide = LaplaceGuide(model)
    assert torch.allclose(guide.median()["level"], torch.tensor(0.5))
    model.center = 3.0
    assert torch.allclose(guide.median()["level"], torch.tensor(1.5))
    assert "LaplaceGuide(Model, curvature='auto'" in repr(guide)


def test_parameters_come_from_the_store() -> None:
    pyro.param("given", torch.tensor(4.0))

    def model(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(pyro.param("given"), pyro.param("drawn", lambda: torch.rand(()) + 1)))
        pyro.sample("obs", dist.Normal(level, 1.0).expand([len(y)]).to_event(1), obs=y)

    generators = torch.get_rng_state()
    posterior = LaplaceGuide(model).get_posterior(Y)
    assert torch.equal(torch.get_rng_state(), generators)
    drawn = torch.rand(()) + 1
    assert torch.equal(pyro.param("drawn"), drawn)
    precision = 1 / drawn**2 + 4
    assert torch.allclose(posterior.loc, (4 / drawn**2 + Y.sum()) / precision)
    pyro.get_param_store()["given"] = torch.tensor(-1.0)
    assert torch.allclose(LaplaceGuide(model).get_posterior(Y).loc, (-1 / drawn**2 + Y.sum()) / precision)


def test_latents_have_the_precision_of_the_data() -> None:
    torch.set_default_dtype(torch.float32)
    assert LaplaceGuide(_conjugate).get_posterior(Y).loc.dtype == torch.float64
    assert LaplaceGuide(_conjugate).get_posterior(Y.float()).loc.dtype == torch.float32

    def closed() -> None:
        _conjugate(Y)

    exact = LaplaceGuide(_conjugate).get_posterior(Y)
    assert torch.equal(LaplaceGuide(closed).get_posterior().loc, exact.loc)


def test_dual_form_is_the_dense_one() -> None:
    model, args = CASES["logistic"]
    dense, dual = (LaplaceGuide(model, curvature="fisher", form=form) for form in ("dense", "dual"))
    one, other = dense.get_posterior(*args), dual.get_posterior(*args)
    assert torch.allclose(one.covariance_matrix, other.covariance_matrix, rtol=1e-8)
    z = _random(4, 5).double()
    full = dist.MultivariateNormal(one.loc, one.covariance_matrix)
    assert torch.allclose(other.log_prob(z), full.log_prob(z), rtol=1e-8)
    assert other.expand([2, 1]).rsample((3,)).shape == (3, 2, 1, 5)
    assert other.expand([2, 1]).log_prob(other.expand([2, 1]).sample()).shape == (2, 1)
    assert torch.allclose(other.expand([2]).variance, full.variance.expand(2, 5))


def test_start_chooses_the_mode() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.factor("wells", -8 * (z**2 - 1) ** 2)

    for start in (-1.5, 1.5):
        mode = LaplaceGuide(model, start={"z": torch.tensor(start)}).median()["z"]
        assert abs(mode - math.copysign(1, start)) < 0.01


def test_faults_are_named() -> None:
    def flat(y: Tensor) -> None:
        pyro.sample("loose", dist.ImproperUniform(dist.constraints.real, (), ()))
        _conjugate(y)

    guide = LaplaceGuide(flat)
    with pytest.raises(ValueError, match="flat along site 'loose'"):
        guide(Y)
    assert guide.diagnostics(Y)["flat_site"] == "loose"

    def saddle() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("well", 3 * z**2 - z**4)

    with pytest.warns(RepairedCurvature, match="'saddle'"):
        LaplaceGuide(saddle, start={"z": torch.zeros(())}).get_posterior()
    model, args = CASES["eight schools"]
    guide = LaplaceGuide(model, num_steps=1)
    with pytest.warns(NotConverged, match="stopped short"):
        guide(*args)
    assert not guide.diagnostics(*args)["converged"]

    def broken() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(z > 8, torch.nan, 0.0))

    with pytest.raises(ValueError, match="'broken' or its curvature is not finite"):
        LaplaceGuide(broken, start={"z": torch.tensor(9.0)})()
    with pytest.raises(ValueError, match="'k' is discrete"):
        LaplaceGuide(lambda: pyro.sample("k", dist.Poisson(2.0)))()
    with pytest.raises(ValueError, match="curvature='sharp' is not known"):
        LaplaceGuide(_conjugate, curvature="sharp")  # type: ignore[arg-type]
