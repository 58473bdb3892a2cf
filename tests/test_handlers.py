"""The handlers that run a model once as a pure function."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bmaml_ppl.density import from_model
from bmaml_ppl.handlers import Sites, ambient, execute, is_factor, isolated_store


def model(y: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.zeros(()))
    a = pyro.sample("a", dist.Normal(loc, 1.0))
    pyro.deterministic("double", 2 * a)
    pyro.factor("soft", -(a**2))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("data", 3, dim=-1):
        pyro.sample("obs", dist.Normal(a, 1.0).expand([2, 3]), obs=y)


Y = torch.ones(2, 3)


def run(*, log_prob: bool = True, resample: bool = False) -> Sites:
    def assign(name: str, fn: Any) -> Tensor:
        return torch.full(fn.batch_shape, 0.5)

    return execute(
        model, {"loc": torch.tensor(0.1)}, {"y": Y}, Sites(assign, log_prob=log_prob, resample=resample), networks=False
    )


def test_records_say_what_each_site_did() -> None:
    records = run().records
    assert list(records) == ["a", "soft", "obs"]
    assert [record.is_observed for record in records.values()] == [False, True, True]
    assert [is_factor(record.fn) for record in records.values()] == [False, True, False]
    assert records["a"].plates == ()
    assert sorted(records["obs"].plates) == [(-2, "outer"), (-1, "data")]
    torch.testing.assert_close(records["a"].log_prob, dist.Normal(0.1, 1.0).log_prob(torch.tensor(0.5)))
    torch.testing.assert_close(records["soft"].log_prob, torch.tensor(-0.25))
    torch.testing.assert_close(records["obs"].log_prob, dist.Normal(0.5, 1.0).log_prob(Y))


def test_deterministic_sites_are_kept_apart() -> None:
    assert {k: float(v) for k, v in run().deterministic.items()} == {"double": 1.0}


def test_resampling_assigns_observed_sites_but_not_factors() -> None:
    records = run(log_prob=False, resample=True).records
    assert records["obs"].value.tolist() == [[0.5] * 3] * 2
    assert not records["obs"].is_observed
    assert records["soft"].is_observed
    assert records["a"].log_prob is None


def test_the_store_is_swapped_object_for_object() -> None:
    mine = pyro.param("loc", torch.tensor(3.0))
    store = pyro.get_param_store()
    inner = store._params
    with isolated_store() as scoped:
        assert len(scoped) == 0
        pyro.param("loc", torch.tensor(4.0))
        pyro.clear_param_store()
    assert store._params is inner
    assert store["loc"] is mine
    with pytest.raises(RuntimeError, match="fault"), isolated_store():
        raise RuntimeError("fault")
    assert store._params is inner


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.int64], torch.float32),
        ([torch.float16], torch.float32),
        ([], torch.float32),
    ],
)
def test_ambient_is_the_widest_floating_dtype_and_ends(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    with ambient([None, *(torch.zeros(1, dtype=d) for d in dtypes)]):
        assert torch.zeros(1).dtype == expected
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(RuntimeError, match="fault"), ambient([torch.zeros(1, dtype=torch.float64)]):
        raise RuntimeError("fault")
    assert torch.get_default_dtype() == torch.float32


def test_ambient_follows_the_device(device: torch.device) -> None:
    with ambient([torch.zeros(1, device=device)]):
        assert torch.zeros(1).device.type == device.type
    assert torch.zeros(1).device.type == "cpu"


class _Shared(nn.Module):
    """Takes its parameters positionally, by keyword and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.b = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.mixed = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.a, self.b]).sum() + torch.mul(input=self.a, other=self.b).sum()
        rows = x.reshape(1, -1, 1) * self.a
        return joined * self.mixed(rows, rows, rows, need_weights=False)[0].sum()


def _attention(y: Tensor | None = None) -> None:
    net = pyro.module("net", _NETWORK)
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("obs", dist.Normal(a + net(torch.ones(3)), 1.0), obs=y)


_NETWORK = _Shared()


def test_every_way_to_pass_a_parameter_is_swapped() -> None:
    data = {"y": torch.ones(3)}
    density = from_model(_attention, data)

    def log_joint(params: dict[str, Tensor]) -> Tensor:
        return density.log_joint(torch.ones(1), params, data)

    moved = {name: value + 0.1 for name, value in density.prior.items()}
    swapped = log_joint(moved)
    state = {name.split("$$$")[1]: value for name, value in moved.items()}
    expected = torch.func.functional_call(_NETWORK, state, (torch.ones(3),))
    by_hand = (
        dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)) + dist.Normal(1 + expected, 1.0).log_prob(data["y"]).sum()
    )
    torch.testing.assert_close(swapped, by_hand)
    grads = grad(log_joint)(density.prior)
    assert all(bool((g != 0).any()) for name, g in grads.items() if "in_proj_bias" not in name)


def _inside(y: Tensor | None = None) -> None:
    net = pyro.module("net", nn.Linear(1, 3))
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("obs", dist.Normal(net(a.reshape(1)), 1.0), obs=y)


@pytest.mark.parametrize("task", [model, _inside, _attention])
def test_a_recorded_graph_computes_the_same_without_pyro(task: Any) -> None:
    y = Y if task is model else torch.ones(3)
    density = from_model(task, {"y": y})
    names = list(density.prior)

    def step(z: Tensor, y: Tensor, *params: Tensor) -> Tensor:
        prior = dict(zip(names, params, strict=True))
        return vmap(grad(lambda z: density.log_joint(z, prior, {"y": y})))(z)

    z = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    graph = make_fx(step)(z, y, *density.prior.values())
    moved = [value + 0.3 for value in density.prior.values()]
    torch.testing.assert_close(graph(2 * z, y - 1, *moved), step(2 * z, y - 1, *moved))


def test_vmap_over_parameters_of_a_network() -> None:
    density = from_model(_inside, {"y": torch.ones(3)})
    stacked = {k: torch.stack([v, 2 * v]) for k, v in density.prior.items()}

    def log_joint(params: dict[str, Tensor]) -> Tensor:
        return density.log_joint(torch.ones(1), params, {"y": torch.ones(3)})

    looped = torch.stack([log_joint({k: v[i] for k, v in stacked.items()}) for i in range(2)])
    torch.testing.assert_close(vmap(log_joint)(stacked), looped)
