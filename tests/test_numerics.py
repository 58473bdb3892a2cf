"""Precision: what is computed in how many bits, by the recorded graph; and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bmaml_ppl import load_prior, meta_learn
from bmaml_ppl.adaptation import Adapter
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.inference import hmc, kernels, laplace, map_estimate, svgd
from bmaml_ppl.models.regression import hierarchical_regression
from bmaml_ppl.numerics import Precision, check_precision, reduce_matmuls, tensor_cores
from bmaml_ppl.objectives import query_nll
from bmaml_ppl.outer import episode_views, meta_gradient
from bmaml_ppl.types import Inference, Model
from tests.toys import level, level_tasks

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution"}
CASTS = {"_to_copy", "view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "clone"}
CASTS |= {"reshape", "alias", "detach", "select", "slice", "zeros", "new_zeros", "lift_fresh_copy"}
STEIN = svgd(num_particles=3, num_steps=2, step_size=1e-3, preconditioner="none", structure="joint", init="free")


def correlated(x: Tensor, y: Tensor | None = None) -> None:
    """A network's features with correlated normal weights, whose density multiplies matrices itself."""
    network = pyro.module("network", correlated.network)  # type: ignore[attr-defined]
    scale = torch.eye(4) + 0.3 * torch.ones(4, 4).tril()
    weights = pyro.sample("weights", dist.MultivariateNormal(torch.zeros(4), scale_tril=scale))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(network(x.unsqueeze(-1)) @ weights, 0.3), obs=y)


correlated.network = nn.Linear(1, 4)  # type: ignore[attr-defined]


def record(model: Model, precision: Precision, dtype: torch.dtype = torch.float32) -> GraphModule:
    """The graph of one step on the support set of two sinusoids."""
    tasks = sinusoid(2, 8, seed=0).tasks
    density = from_model(model, {k: v[0] for k, v in tasks.data.items()})
    view = episode_views(tasks.to(dtype=dtype).split_observations(4))[0]
    prior = {k: v.to(dtype) for k, v in density.prior.items()}
    torch.manual_seed(0)
    prior["particles"] = torch.randn(3, density.dim, dtype=dtype)
    adapter = Adapter(reduce_matmuls(density, precision), STEIN, "free", mode="recorded")
    adapter.run(adapter.begin(prior, view), prior, view, 1)
    ((graph, _),) = [found for found in adapter.steps()["_update"].graphs.values() if found is not None]
    return graph


def operations(graph: GraphModule) -> list[tuple[str, Node, torch.dtype]]:
    """Each operation that returns a floating tensor: its name, its node and its dtype."""
    found = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            found.append((node.target.__name__.split(".")[0], node, value.dtype))
    assert len(found) > 20
    return found


@pytest.mark.parametrize("model", [hierarchical_regression((1, 8, 8, 1)), correlated], ids=["network", "correlated"])
def test_only_products_within_the_model_are_bfloat16(model: Model) -> None:
    reduced = operations(record(model, "bf16"))
    exact = operations(record(model, "float32"))
    assert {name for name, _, dtype in reduced if dtype == torch.bfloat16} <= PRODUCTS | CASTS | {"add"}
    products = [dtype for name, _, dtype in reduced if name in PRODUCTS]
    assert products.count(torch.bfloat16) >= 3
    assert products.count(torch.float32) >= 2  # of the kernel, and of the distribution
    assert len(products) == len([name for name, _, _ in exact if name in PRODUCTS])
    assert all(dtype == torch.float32 for _, _, dtype in exact)
    solves = {name for name, _, dtype in reduced if "solve" in name and dtype == torch.float32}
    assert bool(solves) == (model is correlated)


def test_float64_is_everywhere() -> None:
    for model in (hierarchical_regression((1, 8, 8, 1)), correlated):
        found = operations(record(model, "float64", torch.float64))
        narrow = [str(node) for _, node, dtype in found if dtype.itemsize < 8]
        assert narrow == []


def gradient_of(density: Density, views: Any, particles: Tensor, inference: Inference) -> Tensor:
    adapter = Adapter(density, inference, "free")
    return meta_gradient(adapter, query_nll("mean"), {}, {"particles": particles}, views).gradients["particles"]


def test_bfloat16_gradients_are_near() -> None:
    """Within 10 %, in a direction within a cosine of 0.995; 5 steps of the network of BMAML are at 15 % and 0.989."""
    tasks = sinusoid(4, 20, seed=0).tasks
    views = episode_views(tasks.split_observations(10))
    density = from_model(hierarchical_regression((1, 40, 40, 1)), {k: v[0] for k, v in views[0].data.items()})
    torch.manual_seed(0)
    particles = density.initial_particles(4, {k: v[0] for k, v in views[0].data.items()})
    inference = svgd(num_particles=4, num_steps=2, step_size=1e-3, preconditioner="none", structure="joint")
    exact = gradient_of(density, views, particles, inference)
    reduced = gradient_of(reduce_matmuls(density, "bf16"), views, particles, inference)
    assert reduced.dtype == torch.float32
    error = (reduced - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1
    assert torch.cosine_similarity(reduced.flatten(), exact.flatten(), dim=0) > 0.995


quick = partial(meta_learn, num_support=3, num_steps=2, progress=False, compile=False)


def test_float64_priors_stay_float64(tmp_path: Path) -> None:
    tasks = level_tasks(12, 6)
    assert tasks.data["y"].dtype == torch.float32
    prior = quick(level, tasks.standardize(), precision="float64")
    assert {v.dtype for v in prior.params.values()} == {torch.float64}
    prior.save(tmp_path / "prior.safetensors")
    loaded = load_prior(tmp_path / "prior.safetensors", level)
    for each in (prior, loaded):
        assert {v.dtype for v in each.params.values()} == {torch.float64}
        posterior = each.adapt(x=tasks.data["x"][0, :3], y=tasks.data["y"][0, :3])
        assert posterior.particles.dtype == torch.float64
    assert torch.equal(loaded.params["mean"], prior.params["mean"])
    assert quick(level, tasks).params["mean"].dtype == torch.float32


def test_float64_runs_are_those_of_float64_tasks() -> None:
    tasks = level_tasks(12, 6)
    cast = quick(level, tasks, precision="float64")
    again = quick(level, tasks, precision="float64", start=cast, num_steps=0)
    assert torch.equal(again.params["sd"], cast.params["sd"])
    given = quick(level, tasks.to(dtype=torch.float64))
    assert all(torch.equal(cast.params[name], given.params[name]) for name in given.params)


def test_networks_are_cast_to_float64() -> None:
    prior = quick(correlated, sinusoid(6, 8, seed=0).tasks, inference=STEIN, precision="float64")
    assert {v.dtype for v in prior.params.values()} == {torch.float64}
    assert {p.dtype for p in correlated.network.parameters()} == {torch.float32}  # type: ignore[attr-defined]


def test_a_bfloat16_run_learns_a_float32_prior_that_adapts_exactly() -> None:
    tasks = sinusoid(6, 8, seed=0).tasks
    prior = quick(correlated, tasks, inference=STEIN, precision="bf16")
    other = quick(correlated, tasks, inference=STEIN)
    assert {v.dtype for v in prior.params.values()} == {torch.float32}
    name = next(name for name in prior.params if "weight" in name)
    assert not torch.equal(prior.params[name], other.params[name])
    assert prior.density.model is correlated


@pytest.mark.parametrize(
    ("precision", "inference", "dtype", "error"),
    [
        ("half", STEIN, torch.float32, "precision='half' is not known"),
        ("tf32", STEIN, torch.float32, "mode of NVIDIA GPUs"),
        ("bf16", STEIN, torch.float64, "is for float32 data, got torch.float64"),
        ("bf16", hmc(), torch.float32, "unsafe for hmc"),
        ("bf16", laplace(), torch.float32, "unsafe for laplace"),
        ("bf16", map_estimate(gradient="implicit"), torch.float32, 'or precision="float32"'),
    ],
)
def test_unsafe_precisions_are_refused(precision: Any, inference: Inference, dtype: torch.dtype, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check_precision(precision, inference, 20, torch.device("cpu"), dtype)


def test_newton_steps_need_float32() -> None:
    cpu = torch.device("cpu")
    check_precision("bf16", svgd(), 1000, cpu, torch.float32)
    with pytest.raises(ValueError, match='svgd: Newton.*write preconditioner="adaptive", or precision="float32"'):
        check_precision("bf16", svgd(), 100, cpu, torch.float32)
    check_precision("bf16", svgd(preconditioner="adaptive"), 100, cpu, torch.float32)
    check_precision("float64", svgd(), 100, cpu, torch.float64)


def test_torchs_own_setting_is_put_back_after_an_error() -> None:
    flags: Callable[[], tuple[bool, bool]] = lambda: (  # noqa: E731
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    before = flags()

    def fail() -> None:
        with tensor_cores("tf32", torch.device("cuda")):
            assert flags() == (True, True)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert flags() == before
    with tensor_cores("bf16", torch.device("cuda")):
        assert flags() == before


def test_an_error_in_the_model_leaves_products_as_they_were() -> None:
    def broken(x: Tensor, y: Tensor | None = None) -> None:
        raise KeyError("broken")

    density = from_model(level, {"x": torch.zeros(3), "y": torch.zeros(3)})
    reduced = reduce_matmuls(replace(density, model=broken), "bf16")
    with pytest.raises(KeyError):
        reduced.log_joint(torch.zeros(1), density.prior, {"x": torch.zeros(3), "y": torch.zeros(3)})
    assert (torch.ones(2, 2) @ torch.full((2, 2), 1.001))[0, 0] != 2.0
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_distances_are_exact_where_tf32_is_on() -> None:
    """The product for a GPU in TF32, computed here."""
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) + 100
    exact = (x.double() @ x.double().T).float()
    assert torch.equal(kernels._multiply_widely(x, x.T), exact)
    torch.testing.assert_close(kernels._multiply_exactly(x, x.T), exact, rtol=1e-5, atol=0)
