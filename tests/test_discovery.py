"""What the first run of a model refuses, and says to write instead; networks and their gradients."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import grad, vmap

from bmaml_ppl.density import from_model
from bmaml_ppl.discovery import Discovery, discover

DATA = {"x": torch.linspace(-1, 1, 4), "y": torch.tensor([0.3, -0.2, 1.1, 0.4])}


def observe(mean: Tensor, y: Tensor | None) -> None:
    with pyro.plate("data", 4):
        pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


def latent(name: str = "a") -> Tensor:
    return pyro.sample(name, dist.Normal(0.0, 1.0))


def _discrete(x: Tensor, y: Tensor) -> None:
    observe(pyro.sample("kind", dist.Bernoulli(0.5)) * x, y)


def _delta(x: Tensor, y: Tensor) -> None:
    observe(latent() + pyro.sample("point", dist.Delta(x)), y)


def _sphere(x: Tensor, y: Tensor) -> None:
    observe(pyro.sample("direction", dist.ProjectedNormal(torch.ones(2)))[0] * x, y)


def _open_interval(x: Tensor, y: Tensor) -> None:
    support = constraints.interval(torch.tensor(0.0), torch.tensor(math.inf))
    observe(pyro.sample("tail", dist.ImproperUniform(support, (), ())) * x, y)


def _no_density(x: Tensor, y: Tensor) -> None:
    base = dist.Normal(torch.zeros(2, 2), 1.0).to_event(2)
    chol = dist.TransformedDistribution(base, dist.transforms.LowerCholeskyTransform())
    observe(pyro.sample("chol", chol)[0, 0] * x, y)


def _unobserved(x: Tensor, y: Tensor) -> None:
    latent()


def _without_latent(x: Tensor, y: Tensor) -> None:
    observe(x * pyro.param("w", torch.ones(())), y)


def _branch(x: Tensor, y: Tensor) -> None:
    observe(latent("b") + (x if latent() > 0 else -x), y)


def _float(x: Tensor, y: Tensor) -> None:
    observe(latent("b") + math.exp(latent()) * x, y)


def _numpy(x: Tensor, y: Tensor) -> None:
    observe(latent("b") + torch.as_tensor(np.exp(latent().detach().numpy())) * x, y)


def _in_place(x: Tensor, y: Tensor) -> None:
    coef = torch.zeros(2)
    coef[0] = latent()
    observe(latent("b") + coef[0] * x, y)


def _branch_on_data(x: Tensor, y: Tensor) -> None:
    observe(latent() * (x if x.sum() > 0 else -x), y)


def _select_with_data(x: Tensor, y: Tensor) -> None:
    observe(latent() * x + x[x > 0].sum(), y)


def _subsample(x: Tensor, y: Tensor) -> None:
    a = latent()
    with pyro.plate("data", 4, subsample_size=2) as rows:
        pyro.sample("obs", dist.Normal(a * x[rows], 1.0), obs=y[rows])


def _given_subsample(x: Tensor, y: Tensor) -> None:
    a = latent()
    with pyro.plate("data", 4, subsample=torch.arange(2)):
        pyro.sample("obs", dist.Normal(a * x[:2], 1.0), obs=pyro.subsample(y, event_dim=0))


def _twice(x: Tensor, y: Tensor) -> None:
    observe(latent() + latent(), y)


def _shared_name(x: Tensor, y: Tensor) -> None:
    observe(latent() * pyro.param("a", torch.ones(())), y)


def _no_initial(x: Tensor, y: Tensor) -> None:
    observe(latent() * pyro.param("w"), y)


def _outside(x: Tensor, y: Tensor) -> None:
    observe(latent() * pyro.param("w", -torch.ones(()), constraint=constraints.positive), y)


def _dropout(x: Tensor, y: Tensor) -> None:
    observe(nn.functional.dropout(latent() * x), y)


def _random_start(x: Tensor, y: Tensor) -> None:
    observe(latent() * pyro.param("w", torch.randn(4)), y)


REFUSED: dict[str, tuple[Callable[..., None], str]] = {
    "discrete": (_discrete, r"'kind' is discrete \(Bernoulli\).*MixtureSameFamily"),
    "delta": (_delta, r"'point' is a Delta.*pyro\.deterministic\('point'"),
    "sphere": (_sphere, "'direction' .*lives on Sphere.*choose a distribution"),
    "interval without an end": (_open_interval, "'tail' lives on .*interval without an end.*Pareto"),
    "no density": (_no_density, "density of site 'chol' is not implemented.*choose another"),
    "no observation": (_unobserved, r"observes nothing.*\['a'\].*obs=y"),
    "no latent": (_without_latent, r"no latent site.*\['obs'\].*pyro\.sample\("),
    "branch": (_branch, r"site 'a': it branches.*torch\.where"),
    "math": (_float, r"site 'a': it branches.*torch\.where.*instead of math"),
    "numpy": (_numpy, "site 'a': it branches.*instead of math and numpy"),
    "in place": (_in_place, r"site 'a': it is written into a tensor in place.*torch\.stack"),
    "branch on data": (_branch_on_data, r"data 'x': it branches.*torch\.where"),
    "select with data": (_select_with_data, "data 'x': .*selects with it"),
    "subsample": (_subsample, r"plate 'data' at site 'obs' subsamples 2 of 4 rows.*pyro\.plate\('data'"),
    "given subsample": (_given_subsample, "plate 'data' at site 'obs' subsamples 2 of 4 rows"),
    "twice": (_twice, r"'a' is used twice.*expand"),
    "param and site": (_shared_name, "'a' names both a pyro.param and a site; rename"),
    "no initial value": (_no_initial, r"'w' has no initial value; write pyro\.param\('w', initial_tensor\)"),
    "outside the constraint": (_outside, "'w' starts at -1.0, outside its constraint GreaterThan"),
    "dropout": (_dropout, r"draws random numbers outside pyro\.sample.*\.eval\(\)"),
    "random initial value": (_random_start, r"pyro\.param\(name, lambda: torch\.randn"),
}


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def _recurrent(x: Tensor, y: Tensor) -> None:
    observe(latent() + pyro.module("net", _GRU)(x.unsqueeze(-1)).sum(-1), y)


def _unregistered_inside(x: Tensor, y: Tensor) -> None:
    net = pyro.module("net", nn.Linear(1, 4))
    observe(latent() + nn.Linear(4, 1)(net(x.unsqueeze(-1))).squeeze(-1), y)


def _registered_late(x: Tensor, y: Tensor) -> None:
    features = _LATE(x.unsqueeze(-1))
    pyro.module("net", _LATE)
    observe(latent() + features.squeeze(-1), y)


_LATE = nn.Linear(1, 1)
_GRU = _Recurrent()
REFUSED["recurrent"] = (_recurrent, "operation on data 'x' that torch cannot vectorise.*gru")
REFUSED["unregistered"] = (_unregistered_inside, r"shape \(1, 4\) that was not registered.*pyro\.module")
REFUSED["registered late"] = (_registered_late, r"shape \(1, 1\) that was not registered.*before its first use")


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_a_task_model_is_refused_by_name(name: str) -> None:
    model, message = REFUSED[name]
    pyro.param("w", torch.full((), 9.0))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_model(model, DATA)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(pyro.get_param_store().keys()) == ["w"]


def test_a_full_plate_with_subsample_statements_is_accepted() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        a = latent()
        with pyro.plate("data", 4) as rows:
            pyro.sample("obs", dist.Normal(a * x[rows], 1.0), obs=pyro.subsample(y, event_dim=0))

    assert from_model(model, DATA).plate_dims == {"obs": -1}


def test_branches_on_shapes_and_outputs_are_no_branches_on_values() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        a = latent()
        observe(a * x if y is None or len(x) > 2 else x, y)

    assert list(from_model(model, DATA).sites) == ["a"]


def test_sites_that_come_and_go_are_refused() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        names = ["a", "b"] if len(x) == 4 else ["a", "c"]
        slope = sum(latent(name) for name in names)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(slope * x, 1.0), obs=y)

    density = from_model(model, DATA)
    with pytest.raises(ValueError, match="'b' is missing from this run.*same sites"):
        density.log_joint(torch.zeros(2), {}, {"x": torch.ones(3), "y": torch.ones(3)})


def test_a_latent_value_for_each_observation_needs_equal_lengths() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(latent("row") * x, 1.0), obs=y)

    density = from_model(model, DATA)
    with pytest.raises(ValueError, match=r"'row' has shape \(3,\), and had \(4,\).*equal length"):
        density.log_joint(torch.zeros(4), {}, {"x": torch.ones(3), "y": torch.ones(3)})


def test_parameters_that_come_later_are_refused() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        observe(latent() * pyro.param("w" if y is not None else "late", torch.ones(())) * x, y)

    density = from_model(model, DATA)
    with pytest.raises(KeyError, match="late.*Declare the same parameters"):
        density.simulate(torch.zeros(1), density.prior, DATA)


def test_arguments_that_the_model_does_not_take_are_named() -> None:
    with pytest.raises(TypeError, match=r"\['x', 'y', 'z'\].*'z'.*Name the model's arguments"):
        discover(_branch, {**DATA, "z": torch.ones(4)})
    with pytest.raises(TypeError, match="Name the model's arguments"):
        discover(_Network(), {"time": DATA["x"]})


def test_a_fault_inside_the_model_is_shown_as_it_is() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        observe(torch.add(latent(), None), y)  # type: ignore[call-overload]

    with pytest.raises(TypeError, match="add"):
        discover(model, DATA)


def test_sources_of_observed_values() -> None:
    def model(x: Tensor, y: Tensor | None, count: Tensor) -> None:
        a = latent()
        with pyro.plate("data", 4):
            pyro.sample("same", dist.Normal(a, 1.0), obs=y)
            pyro.sample("log", dist.Normal(a, 1.0), obs=None if y is None else y.exp())
            pyro.sample("cast", dist.Poisson(a.exp()), obs=count.double())
        with pyro.plate("rows", 4, dim=-2):
            pyro.sample("column", dist.Normal(a, 1.0).expand([4, 1]), obs=None if y is None else y[:, None])

    found = discover(model, {**DATA, "count": torch.tensor([0, 2, 1, 3])})
    assert found.observed == {"same": "y", "log": None, "cast": "count", "column": "y"}
    assert found.derived == {"y"}
    assert found.plate_dims == {"same": -1, "log": -1, "cast": -1, "column": -2}


def _with_shapes(shapes: Any) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        infer: Any = {} if shapes is None else {"shapes": shapes}
        weights = pyro.sample("weights", dist.Normal(torch.zeros(10), 1.0).to_event(1), infer=infer)
        observe(latent() + weights.sum() * x, y)

    return model


def test_a_site_keeps_the_shapes_of_its_parameters() -> None:
    sites = discover(_with_shapes([torch.Size([3, 2]), (3,), ()]), DATA).sites
    assert sites["weights"].shapes == ((3, 2), (3,), ())
    assert sites["a"].shapes is None
    assert discover(_with_shapes(None), DATA).sites["weights"].shapes is None


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 2), (3,)], r"\[\(3, 2\), \(3,\)\] of site 'weights' hold 9 numbers, but it has 10 unconstrained"),
        ([], "hold 0 numbers, but it has 10"),
        ((5, 2), r"'weights' has infer=\{\"shapes\": \(5, 2\)\}; give a list of shapes"),
        (10, r"\"shapes\": 10\}; give a list of shapes"),
    ],
)
def test_shapes_that_do_not_fit_the_site_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discover(_with_shapes(shapes), DATA)


def test_integer_data_alone_make_a_density() -> None:
    def model(count: Tensor | None = None) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Poisson(rate), obs=count)

    density = from_model(model, {"count": torch.tensor([1, 0, 2])})
    mask = torch.tensor([True, True, False])
    assert density.log_joint(torch.zeros(1), {}, {"count": torch.tensor([1, 0, 0])}, mask).isfinite()


# Networks


class _Network(PyroModule):
    """Every way to hold a parameter in a PyroModule."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(1, 3)
        self.own = nn.Parameter(torch.full((3,), 0.5))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.scale: Any = PyroParam(torch.full((), 0.7), constraint=constraints.positive)
        self.inner: Any = PyroModule[nn.Linear](3, 1)  # type: ignore[call-arg, arg-type]
        self.inner.bias = PyroSample(lambda module: dist.Normal(0.0, module.spread).expand([1]).to_event(1))
        self.inner.spread = PyroParam(torch.tensor(1.5), constraint=constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        hidden = torch.tanh(self.child(x.unsqueeze(-1))) * self.own + self.frozen
        mean = self.inner(hidden).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, self.scale), obs=y)


def _registered(net: nn.Module, update: bool = False) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        features = pyro.module("net", net, update_module_params=update)(x.unsqueeze(-1))
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        observe(features @ weights, y)

    return model


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2))


def _made_inside(x: Tensor, y: Tensor | None = None) -> None:
    _registered(_perceptron())(x, y)


def _pyro_module_made_inside(x: Tensor, y: Tensor | None = None) -> None:
    _Network()(x, y)


_NET = {f"net$$${n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias")}
_MODULE = {"child$$$weight", "child$$$bias", "own", "scale", "inner.weight", "inner.spread"}
NETWORKS: dict[str, tuple[Callable[[], Callable[..., None]], set[str]]] = {
    "pyro.module": (lambda: _registered(_perceptron()), _NET),
    "pyro.module that updates": (lambda: _registered(_perceptron(), update=True), _NET),
    "pyro.module made inside": (lambda: _made_inside, _NET),
    "PyroModule": (_Network, _MODULE),
    "PyroModule made inside": (lambda: _pyro_module_made_inside, _MODULE),
}


def _modules(model: Any) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    return [c.cell_contents for c in (model.__closure__ or ()) if isinstance(c.cell_contents, nn.Module)]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_true_gradients_and_keep_their_own_tensors(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    build, names = NETWORKS[name]
    model, data = build(), {key: value.double() for key, value in DATA.items()}
    own = [(p, p.detach().clone(), p.requires_grad) for m in _modules(model) for p in m.parameters()]
    states = [copy.deepcopy(m.state_dict()) for m in _modules(model)]
    before = torch.get_rng_state()
    density = from_model(model, data)
    assert set(density.prior) == names
    z = torch.linspace(0.2, 0.9, density.dim)

    def log_joint(*values: Tensor) -> Tensor:
        return density.log_joint(z, dict(zip(density.prior, values, strict=True)), data)

    values = [value.clone().requires_grad_() for value in density.prior.values()]
    gradcheck(log_joint, values, rtol=1e-5, atol=1e-7)
    grads = grad(log_joint, tuple(range(len(values))))(*density.prior.values())
    assert all(bool((g != 0).any()) for g in grads)
    batch = [torch.stack([v, v + 0.1]) for v in density.prior.values()]
    looped = torch.stack([log_joint(*(v[i] for v in batch)) for i in range(2)])
    torch.testing.assert_close(vmap(log_joint)(*batch), looped)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [p for m in _modules(model) for p in m.parameters()]
    for parameter, (same, value, requires_grad) in zip(tensors, own, strict=True):
        assert parameter is same
        assert parameter.grad is None
        assert parameter.requires_grad == requires_grad
        assert torch.equal(parameter, value)
    for module, state in zip(_modules(model), states, strict=True):
        torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)


def test_a_pyro_module_beside_a_full_store_reads_its_own_tensors() -> None:
    network = _Network()
    pyro.param("own", torch.full((3,), 9.0))
    pyro.param("scale", torch.full((), 9.0), constraint=constraints.positive)
    pyro.param("child$$$bias", torch.full((3,), 9.0))
    own = network.scale_unconstrained
    density = from_model(network, DATA)
    density.log_joint(torch.zeros(1), density.prior, DATA)
    assert density.prior["own"].tolist() == [0.5] * 3
    torch.testing.assert_close(density.prior["scale"], torch.tensor(0.7))
    torch.testing.assert_close(density.prior["child$$$bias"], network.child.bias.detach())
    assert network.scale_unconstrained is own
    assert pyro.param("own").tolist() == [9.0] * 3
    assert list(pyro.get_param_store().keys()) == ["own", "scale", "child$$$bias"]


def test_frozen_parameters_are_constants() -> None:
    network = nn.Linear(1, 2)
    network.bias.requires_grad_(False)
    density = from_model(_registered(network), DATA)
    assert list(density.prior) == ["net$$$weight"]
    assert not network.bias.requires_grad


# Batch normalisation


class _Normalised(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2, affine=False))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        observe(latent() + self.layers(x.unsqueeze(-1)).sum(-1), y)


def _normalised(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2, **options))


def _unregistered(net: nn.Module) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        observe(latent() + net(x.unsqueeze(-1)).sum(-1), y)

    return model


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (_registered(_normalised()), "'1' of Sequential"),
        (_registered(_normalised(affine=False)), "'1' of Sequential"),
        (_unregistered(_normalised()), "'1' of Sequential"),
        (_Normalised(), "'layers.1' of _Normalised"),
    ],
)
def test_running_statistics_are_refused_before_they_are_written(model: Any, layer: str) -> None:
    with pytest.raises(ValueError, match=rf"BatchNorm1d \({layer}\) keeps running.*track_running_stats=False"):
        from_model(model, DATA)
    layers = [m for root in _modules(model) for m in root.modules() if isinstance(m, nn.BatchNorm1d)]
    assert all(int(m.num_batches_tracked) == 0 for m in layers if m.num_batches_tracked is not None)
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("net", [_normalised(track_running_stats=False), _normalised().eval()])
def test_batch_normalisation_without_running_statistics_is_accepted(net: nn.Module) -> None:
    found: Discovery = discover(_registered(net), DATA)
    assert "net$$$0.weight" in found.networks
