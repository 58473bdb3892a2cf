"""The log density against Pyro's own trace, loops and finite differences."""

import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import grad, hessian, jacrev, vmap

from bmaml_ppl.bijections import bijection
from bmaml_ppl.density import Density, from_model
from tests.scenarios import LATENTS, MATRIX_SUPPORTS

pytestmark = pytest.mark.filterwarnings(
    "ignore:An output with one or more elements was resized",  # torch's softplus under vmap(hessian)
    "ignore:.torch.jit.script. is deprecated",  # torch's own forward-mode derivatives
    "ignore:Singular sample detected",  # torch's Wishart sampler
)

DOUBLE = torch.float64
Y = torch.tensor([0.3, -0.2, 1.1, 0.4], dtype=DOUBLE)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(DOUBLE)  # conftest puts float32 back


def model_of(make: Callable[[], Any]) -> Callable[..., None]:
    """A model with one latent site, in a plate of its own if it has a batch shape, and four observations."""

    def model(y: Tensor | None = None) -> None:
        x = pyro.sample("x", make())
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Normal(x.sum(), 1.5), obs=y)

    return model


def trace_log_prob(density: Density, values: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    model = pyro.poutine.condition(density.model, values)
    return torch.as_tensor(pyro.poutine.trace(model).get_trace(**data).log_prob_sum())


def sum_jacobians(density: Density, z: Tensor, values: dict[str, Tensor], supports: dict[str, Any]) -> Tensor:
    """The log-determinants of the change of variables by autograd, in the free entries of each value."""
    total = torch.zeros(())
    for name, site in density.sites.items():
        transform = bijection(supports[name])

        def free(u: Tensor, transform: Any = transform, site: Any = site) -> Tensor:
            return free_entries(transform(u.reshape(site.unconstrained_shape)), site.support)

        total = total + torch.linalg.slogdet(jacrev(free)(z[site.slice])).logabsdet
    return total


def free_entries(value: Tensor, support: Any) -> Tensor:
    base = support
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    strict = type(base) in {type(constraints.corr_cholesky), type(constraints.corr_matrix)}
    strict = strict or type(base) is type(constraints.unit_lower_cholesky)
    if strict or type(base) in {type(constraint) for constraint, _ in MATRIX_SUPPORTS.values()}:
        rows, columns = torch.tril_indices(3, 3, -1 if strict else 0)
        value = value[..., rows, columns]
    elif type(base) is type(constraints.simplex):
        value = value[..., :-1]
    return value.reshape(-1)


@pytest.mark.parametrize("name", LATENTS)
def test_log_joint_is_the_trace_plus_the_jacobian_and_exact_under_transforms(name: str) -> None:
    density = from_model(model_of(LATENTS[name]), {"y": Y})
    z = torch.randn(3, density.dim, generator=torch.Generator().manual_seed(1)) * 0.5

    def log_joint(z: Tensor) -> Tensor:
        return density.log_joint(z, {}, {"y": Y})

    values = density.constrain(z[0], {}, {"y": Y})
    with pyro.validation_enabled(False):
        expected = trace_log_prob(density, values, {"y": Y})
    expected = expected + sum_jacobians(density, z[0], values, {"x": density.sites["x"].support})
    torch.testing.assert_close(log_joint(z[0]), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(density.unconstrain(values, {}, {"y": Y}), z[0], rtol=1e-6, atol=1e-6)
    assert bool(density.sites["x"].support.check(values["x"]).all())
    for transform in (lambda f: f, grad, _hessian):
        looped = torch.stack([transform(log_joint)(row) for row in z])
        torch.testing.assert_close(vmap(transform(log_joint))(z), looped, rtol=1e-9, atol=1e-9)
    gradcheck(log_joint, z[1].clone().requires_grad_(), rtol=1e-4, atol=1e-6)


def _hessian(log_joint: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return jacrev(grad(log_joint))


@pytest.mark.parametrize("name", sorted(set(LATENTS) - {"Wishart"}))
def test_forward_over_reverse_hessians_too(name: str) -> None:
    # Not for Wishart: torch 2.13 has a wrong batching rule for the forward derivative of slogdet.
    density = from_model(model_of(LATENTS[name]), {"y": Y})
    z = torch.randn(2, density.dim, generator=torch.Generator().manual_seed(5)) * 0.5

    def log_joint(z: Tensor) -> Tensor:
        return density.log_joint(z, {}, {"y": Y})

    torch.testing.assert_close(vmap(hessian(log_joint))(z), vmap(_hessian(log_joint))(z), rtol=1e-8, atol=1e-8)


def test_the_table_is_long_enough() -> None:
    assert len(LATENTS) >= 60


@pytest.mark.parametrize("name", MATRIX_SUPPORTS)
def test_constrained_matrices_satisfy_their_constraint(name: str) -> None:
    support, _ = MATRIX_SUPPORTS[name]
    transform = bijection(support)
    u = torch.randn(transform.inverse_shape((5, 3, 3)), generator=torch.Generator().manual_seed(0))
    assert bool(support.check(transform(u)).all())
    assert transform.forward_shape(u.shape) == (5, 3, 3)


MASK: Any = torch.tensor([True, False, True])


def nested(x: Tensor, group: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.param("mean", torch.tensor([0.3, -0.2]))
    high = pyro.param("high", torch.tensor(3.0), constraint=constraints.greater_than(1.0))
    tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
    sd = pyro.sample("sd", dist.Uniform(0.0, high))
    low = pyro.sample("low", dist.Uniform(-sd, sd))
    upper = pyro.sample("upper", dist.Uniform(low, high + 1))
    coef = pyro.sample("coef", dist.MultivariateNormal(mean, scale_tril=tril))
    with pyro.plate("groups", 3, dim=-1), pyro.poutine.scale(scale=0.5):
        offset = pyro.sample("offset", dist.Normal(0.0, sd))
        with pyro.plate("pairs", 2, dim=-2), pyro.poutine.mask(mask=MASK):
            pyro.sample("pair", dist.Gamma(2.0, 1.0))
    pyro.factor("soft", -(low**2))
    location = pyro.deterministic("location", coef[0] + coef[1] * x + offset[group] + upper)
    with pyro.plate("data", x.shape[0]):
        pyro.factor("weights", -(location**2) / 10)
        pyro.sample("obs", dist.StudentT(4.0, location, 0.5), obs=y)


NESTED = {"x": torch.linspace(-1, 1, 5, dtype=DOUBLE), "group": torch.tensor([0, 2, 1, 1, 0]), "y": torch.ones(5)}
NESTED["y"] = NESTED["y"].double()


def test_scale_mask_factor_plates_and_dependent_supports_against_the_trace() -> None:
    density = from_model(nested, NESTED)
    z = torch.randn(density.dim, generator=torch.Generator().manual_seed(2))
    values = density.constrain(z, density.prior, NESTED)
    supports = {
        "sd": constraints.interval(0.0, 3.0),
        "low": constraints.interval(-values["sd"], values["sd"]),
        "upper": constraints.interval(values["low"], 4.0),
        "coef": constraints.real_vector,
        "offset": constraints.real,
        "pair": constraints.positive,
    }
    expected = trace_log_prob(density, values, NESTED) + sum_jacobians(density, z, values, supports)
    torch.testing.assert_close(density.log_joint(z, density.prior, NESTED), expected)
    parts = density.log_likelihood(z, density.prior, NESTED)
    assert {name: part.shape for name, part in parts.items()} == {"soft": (), "weights": (5,), "obs": (5,)}
    total = density.log_prior(z, density.prior, NESTED) + sum(part.sum() for part in parts.values())
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(density.unconstrain(values, density.prior, NESTED), z)


def test_gradients_with_respect_to_latents_meta_parameters_and_data() -> None:
    density = from_model(nested, NESTED)
    z = torch.randn(density.dim, generator=torch.Generator().manual_seed(2))
    names = list(density.prior)

    def log_joint(z: Tensor, y: Tensor, *params: Tensor) -> Tensor:
        return density.log_joint(z, dict(zip(names, params, strict=True)), {**NESTED, "y": y})

    points = [z, NESTED["y"], *density.prior.values()]
    gradcheck(log_joint, [point.clone().requires_grad_() for point in points], rtol=1e-4, atol=1e-6)
    grads = grad(log_joint, tuple(range(len(points))))(*points)
    assert all(bool((g != 0).any()) for g in grads)


def test_nested_vmap_over_tasks_and_particles_is_a_loop() -> None:
    density = from_model(nested, NESTED)
    z = torch.randn(2, 3, density.dim, generator=torch.Generator().manual_seed(3))
    y = torch.randn(2, 5, generator=torch.Generator().manual_seed(4))

    def log_joint(z: Tensor, y: Tensor) -> Tensor:
        return density.log_joint(z, density.prior, {**NESTED, "y": y})

    both = vmap(vmap(hessian(log_joint), (0, None)))(z, y)
    looped = torch.stack([torch.stack([hessian(log_joint)(p, row) for p in ps]) for ps, row in zip(z, y, strict=True)])
    torch.testing.assert_close(both, looped)


def test_discovered_sites_observations_and_meta_parameters() -> None:
    density = from_model(nested, NESTED)
    assert {name: (site.shape, site.start, site.stop) for name, site in density.sites.items()} == {
        "sd": ((), 0, 1),
        "low": ((), 1, 2),
        "upper": ((), 2, 3),
        "coef": ((2,), 3, 5),
        "offset": ((3,), 5, 8),
        "pair": ((2, 3), 8, 14),
    }
    assert density.dim == 14
    assert density.observed == {"soft": None, "weights": None, "obs": "y"}
    assert density.plate_dims == {"soft": None, "weights": -1, "obs": -1}
    assert {k: v.tolist() for k, v in density.prior.items()} == {
        "mean": [0.3, -0.2],
        "high": 3.0,
        "tril": [[1.0, 0.0], [0.0, 1.0]],
    }
    high: Any = density.constraints["high"]
    assert high.lower_bound == 1.0
    assert density.constraints["tril"] is constraints.lower_cholesky


def growth(time: Tensor, weight: Tensor | None = None) -> None:
    mean = pyro.param("mean", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    coef = pyro.sample("coef", dist.Normal(mean, scale).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", time.shape[0]):
        pyro.sample("obs", dist.LogNormal(coef[0] + coef[1] * time.log(), noise), obs=weight)


GROWTH = {"time": torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE), "weight": torch.tensor([2.0, 3.0, 5.0], dtype=DOUBLE)}


@pytest.mark.parametrize("order", ["first", "last"])
def test_padded_zeros_outside_the_support_count_for_nothing(order: str) -> None:
    density = from_model(growth, GROWTH)
    pad = (0, 2) if order == "last" else (2, 0)
    padded = {key: nn.functional.pad(value, pad) for key, value in GROWTH.items()}
    mask = nn.functional.pad(torch.ones(3, dtype=torch.bool), pad)
    z = torch.tensor([0.1, 0.7, -0.5])

    def gradients(data: dict[str, Tensor], mask: Tensor | None) -> Any:
        return grad(lambda z, prior: density.log_joint(z, prior, data, mask), (0, 1))(z, density.prior)

    torch.testing.assert_close(gradients(padded, mask), gradients(GROWTH, None))
    scores = density.log_likelihood(z, density.prior, padded, mask)["obs"]
    assert scores[~mask].tolist() == [0.0, 0.0]
    torch.testing.assert_close(scores[mask], density.log_likelihood(z, density.prior, GROWTH)["obs"])


def test_a_task_with_only_padding_has_its_prior_as_joint_and_finite_gradients() -> None:
    density = from_model(growth, GROWTH)
    z, nothing = torch.tensor([0.1, 0.7, -0.5]), {key: torch.zeros(4) for key in GROWTH}
    mask = torch.zeros(4, dtype=torch.bool)
    joint = grad(lambda z: density.log_joint(z, density.prior, nothing, mask))(z)
    torch.testing.assert_close(joint, grad(lambda z: density.log_prior(z, density.prior, GROWTH))(z))


def test_a_constant_as_long_as_the_padded_task_is_left_alone() -> None:
    def model(level: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(level.sum(), 1.0))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(a, 1.0), obs=y)

    data = {"level": torch.tensor([1.0, 2.0, 3.0]), "y": torch.tensor([1.0, 0.0, 0.0])}
    density = from_model(model, data, constants=["level"])
    mask = torch.tensor([True, False, False])
    expected = dist.Normal(6.0, 1.0).log_prob(torch.tensor(0.5)) + dist.Normal(0.5, 1.0).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(density.log_joint(torch.tensor([0.5]), {}, data, mask), expected)


def test_two_dimensional_observations_are_masked_along_rows() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("columns", 3, dim=-1), pyro.plate("data", x.shape[0], dim=-2):
            pyro.sample("obs", dist.Normal(a * x.unsqueeze(-1), 1.0), obs=y)

    data = {"x": torch.arange(3.0), "y": torch.arange(9.0).reshape(3, 3)}
    density = from_model(model, data)
    scores = density.log_likelihood(torch.ones(3), {}, data, torch.tensor([True, True, False]))["obs"]
    assert density.plate_dims == {"obs": -2}
    assert bool((scores[:2] != 0).all())
    assert scores[2].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("derived", [False, True])
def test_observations_without_a_plate_cannot_be_masked(derived: bool) -> None:
    def model(y: Tensor | None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        obs = y if y is None or not derived else y.exp()
        pyro.sample("total", dist.Normal(a.expand(4), 1.0).to_event(1), obs=obs)

    density = from_model(model, {"y": Y})
    assert density.observed == {"total": None if derived else "y"}
    with pytest.raises(ValueError, match=r"'total' has no plate over observations.*pyro\.plate"):
        density.log_joint(torch.zeros(1), {}, {"y": Y}, torch.tensor([True, True, False, False]))


def test_one_value_a_task_is_never_masked() -> None:
    def model(size: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("size", dist.Normal(a, 1.0), obs=size)
        with pyro.plate("data", y.shape[0]):
            pyro.sample("obs", dist.Normal(a, 1.0), obs=y)

    data = {"size": torch.tensor(2.0), "y": Y}
    density = from_model(model, data, constants=["size"])
    scores = density.log_likelihood(torch.zeros(1), {}, data, torch.zeros(4, dtype=torch.bool))
    assert scores["obs"].tolist() == [0.0] * 4
    torch.testing.assert_close(scores["size"], dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0)))


def test_a_full_store_of_the_same_names_is_neither_read_nor_changed() -> None:
    other: Any = pyro.param("mean", torch.full((2,), 9.0))
    pyro.param("scale", torch.full((2,), 9.0), constraint=constraints.positive)
    store = pyro.get_param_store()
    before = {name: (value, value.detach().clone(), value._version) for name, value in store._params.items()}
    density = from_model(growth, GROWTH)
    assert density.prior["mean"].tolist() == [0.0, 0.0]
    z = torch.zeros(3)
    vmap(grad(lambda z: density.log_joint(z, density.prior, GROWTH)))(z.expand(2, 3))
    density.simulate(z, density.prior, GROWTH)
    assert list(store._params) == list(before)
    for name, (tensor, value, version) in before.items():
        assert store._params[name] is tensor
        assert tensor._version == version
        assert torch.equal(tensor, value)
    assert other.unconstrained() is store._params["mean"]
    assert store._constraints["scale"] is constraints.positive
    assert bool((pyro.param("mean") == 9.0).all())


def test_a_fault_in_the_model_leaves_the_store_and_the_settings_as_they_were() -> None:
    pyro.param("mean", torch.full((2,), 9.0))
    density = from_model(growth, GROWTH)
    pyro.enable_validation(True)
    with pytest.raises(RuntimeError):
        density.log_joint(torch.zeros(3), density.prior, {**GROWTH, "weight": torch.ones(7)})
    assert list(pyro.get_param_store().keys()) == ["mean"]
    assert pyro.poutine.util.is_validation_enabled()
    assert dist.is_validation_enabled()


@pytest.mark.parametrize("validate", [True, False])
def test_any_validation_setting_gives_the_same_and_stays(validate: bool) -> None:
    with pyro.validation_enabled(validate), pyro.settings.context(module_local_params=validate):
        density = from_model(growth, GROWTH)
        result = vmap(lambda z: density.log_joint(z, density.prior, GROWTH))(torch.zeros(2, 3))
        assert dist.is_validation_enabled() == validate
        assert pyro.infer.util.is_validation_enabled() == validate
        assert pyro.poutine.util.is_validation_enabled() == validate
        assert pyro.settings.get("module_local_params") == validate
    torch.testing.assert_close(result[0], density.log_joint(torch.zeros(3), density.prior, GROWTH))


def test_an_invisible_guest_under_other_handlers() -> None:
    density = from_model(growth, GROWTH)
    with pyro.poutine.trace() as recorder, pyro.poutine.scale(scale=7.0), pyro.poutine.mask(mask=False):
        inside = density.log_joint(torch.zeros(3), density.prior, GROWTH)
    assert not recorder.trace.nodes
    torch.testing.assert_close(inside, density.log_joint(torch.zeros(3), density.prior, GROWTH))


def test_no_generator_moves() -> None:
    def noisy_start(y: Tensor | None = None) -> None:
        pyro.param("w", lambda: torch.randn(3) + random.random() + np.random.rand())
        growth(GROWTH["time"], y)

    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    density = from_model(noisy_start, {"y": GROWTH["weight"]})
    z, data = torch.zeros(3), {"y": GROWTH["weight"]}
    density.log_joint(z, density.prior, data)
    density.log_prior(z, density.prior, {"y": None})
    density.unconstrain(density.constrain(z, density.prior, {"y": None}), density.prior, data)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert repr(np.random.get_state()) == before[2]


def test_latents_are_constrained_without_outputs_and_the_joint_needs_them() -> None:
    density = from_model(growth, GROWTH)
    z, new = torch.tensor([0.3, 0.1, -1.0]), {"time": torch.tensor([1.0, 2.0]), "weight": None}
    constrained = density.constrain(z, density.prior, new)
    torch.testing.assert_close(constrained["noise"], z[2].exp())
    torch.testing.assert_close(density.unconstrain(constrained, density.prior, new), z)
    with pytest.raises(ValueError, match="'obs' is not observed in this run.*give data 'weight'"):
        density.log_joint(z, density.prior, new)
    with pytest.raises(ValueError, match=r"no value for latent sites \['noise'\]"):
        density.unconstrain({"coef": torch.zeros(2)}, density.prior, new)


class _Callable:
    def __call__(self, time: Tensor, weight: Tensor | None = None) -> None:
        growth(time, weight)


@pytest.mark.parametrize("model", [functools.partial(growth), _Callable(), lambda **data: growth(**data)])
def test_any_callable_is_a_model(model: Any) -> None:
    z = torch.tensor([0.3, 0.1, -1.0])
    density, same = from_model(model, GROWTH), from_model(growth, GROWTH)
    assert torch.equal(density.log_joint(z, density.prior, GROWTH), same.log_joint(z, same.prior, GROWTH))


def test_float32_models_run_in_float64_when_moved() -> None:
    torch.set_default_dtype(torch.float32)
    single = {key: value.float() for key, value in NESTED.items() if key != "group"} | {"group": NESTED["group"]}
    density = from_model(nested, single)
    assert density.prior["mean"].dtype == torch.float32
    moved = density.to("cpu", DOUBLE)
    z = torch.zeros(density.dim, dtype=DOUBLE)
    assert moved.log_joint(z, moved.prior, NESTED).dtype == DOUBLE
    assert moved.draw_prior(moved.prior, NESTED).dtype == DOUBLE
    assert all(value.dtype == DOUBLE for value in moved.simulate(z, moved.prior, NESTED).values())
    assert torch.get_default_dtype() == torch.float32


def test_runs_where_the_data_is(device: torch.device) -> None:
    data = {key: value.to(device) for key, value in NESTED.items()}
    density = from_model(nested, data)
    assert all(value.device.type == device.type for value in density.prior.values())
    z = density.draw_prior(density.prior, data)
    assert density.log_joint(z, density.prior, data).device.type == device.type
    assert density.simulate(z, density.prior, data)["obs"].device.type == device.type


TAILS: dict[str, Callable[[], Any]] = {
    "Beta": lambda: dist.Beta(2.0, 0.5).expand([3]).to_event(1),
    "Dirichlet": lambda: dist.Dirichlet(torch.tensor([1.04, 1.3, 0.4, 2.0])),
    "Gamma below": lambda: dist.Gamma(2.0, 1.0).expand([3]).to_event(1),
    "LogNormal": lambda: dist.LogNormal(0.0, 3.0).expand([3]).to_event(1),
    "Uniform": lambda: dist.Uniform(999.0, 1000.0).expand([3]).to_event(1),
}


@pytest.mark.parametrize("far", [-90.0, -52.9, -20.0, 20.0, 52.9, 90.0])
@pytest.mark.parametrize("name", TAILS)
def test_tails_in_single_precision_are_those_in_double(name: str, far: float) -> None:
    if "below" in name and far > 0:
        pytest.skip("the density underflows there, also in double precision")
    results = []
    for dtype in (torch.float32, DOUBLE):
        torch.set_default_dtype(dtype)
        data = {"y": Y.to(dtype)}
        density = from_model(model_of(TAILS[name]), data)
        log_prior = functools.partial(density.log_prior, prior={}, data=data)
        z = torch.tensor([0.5, far, -0.3])
        results.append([f(z).double() for f in (log_prior, grad(log_prior), _hessian(log_prior))])
        third = grad(lambda z, f=log_prior: _hessian(f)(z).sum())(z)
        assert bool(third.isfinite().all())
    for single, double in zip(*results, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("low", [-1.0, 0.0, 999.0])
def test_values_stay_inside_the_interval_by_a_rounding(low: float, dtype: torch.dtype) -> None:
    transform = bijection(constraints.interval(low, low + 1))
    values = transform(torch.tensor([-200.0, -90.0, 90.0, 200.0], dtype=dtype))
    assert bool(((values > low) & (values < low + 1)).all())
    bounds = torch.tensor([low, low, low + 1, low + 1], dtype=dtype)
    assert bool(((values - bounds).abs() <= 2 * torch.finfo(dtype).eps * max(abs(low), 1.0)).all())
    simplex = bijection(constraints.simplex)(torch.tensor([-200.0, 90.0, 0.0], dtype=dtype))
    assert bool((simplex > 0).all())
    assert bool(constraints.simplex.check(simplex))


def test_a_learned_bound_has_its_gradient_where_values_round_to_it() -> None:
    def end(high: Tensor) -> Tensor:
        return bijection(constraints.interval(0.0, high))(torch.tensor(200.0))

    torch.testing.assert_close(grad(end)(torch.tensor(3.0)), torch.tensor(1.0))


def test_derivatives_of_categories_and_simplices_warn_of_nothing() -> None:
    def model(y: Tensor | None = None) -> None:
        probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Categorical(probs), obs=y)

    y = torch.tensor([[0, 1, 2, 2], [0, 1, 1, 1]])
    density = from_model(model, {"y": y[0]})

    def curvature(z: Tensor, y: Tensor) -> Tensor:
        return _hessian(lambda z: density.log_joint(z, {}, {"y": y}))(z)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bool(vmap(vmap(curvature, (0, None)))(torch.zeros(2, 5, 2), y).isfinite().all())


def test_values_computed_from_data_are_simulated_where_the_model_allows_it() -> None:
    def model(y: Tensor | None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Normal(a, 1.0), obs=None if y is None else y.exp())

    density = from_model(model, {"y": Y})
    assert density.derived == {"y"}
    assert density.simulate(torch.zeros(1), {}, {})["obs"].shape == (4,)
