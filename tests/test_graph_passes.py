"""Rewritten graphs have the values and the gradients of those they were made from."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bmaml_ppl.graph_passes import share_gram_gradients, spare_eigenvectors

F64 = torch.float64

GRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda x: (x @ x.T).exp(),
    "batched": lambda x: vmap(lambda z: (z @ z.T).sin() @ z)(x.reshape(2, 2, 3)),
    "scaled": lambda x: (lambda y: y @ y.T)(2 * x),
    "permuted": lambda x: x @ x.permute(1, 0),
    "twice": lambda x: (x @ x.T) @ (x @ x.T).T,
}

OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "square without a swap": lambda x: x[:, :3] @ x[:3, :3],
    "other factor": lambda x: x @ (x + 1).T,
    "reversed": lambda x: x @ x.flip(0).T,
}


@pytest.mark.parametrize("name", [*GRAMS, *OTHERS])
def test_values_and_gradients_stay(name: str) -> None:
    function = (GRAMS | OTHERS)[name]
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    graph = make_fx(function)(x)
    count = share_gram_gradients(graph.graph)
    graph.recompile()
    assert (count > 0) == (name in GRAMS)
    expected, found = function(x), graph(x)
    torch.testing.assert_close(found, expected)
    # Weights that are not symmetric: both halves of the gradient count.
    weights = torch.randn(expected.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((weights * value).sum(), x)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_gradient_takes_fewer_products() -> None:
    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(((x @ x.T) * torch.arange(16.0).reshape(4, 4)).sum(), x)[0]

    def count(graph: torch.fx.Graph) -> int:
        return sum(node.target is torch.ops.aten.mm.default for node in graph.nodes)

    x = torch.randn(4, 3, requires_grad=True)
    graph = make_fx(lambda x: x @ x.T)(x)
    share_gram_gradients(graph.graph)
    graph.recompile()

    def gradient_of_graph(x: Tensor) -> Tensor:
        return torch.autograd.grad((graph(x) * torch.arange(16.0).reshape(4, 4)).sum(), x)[0]

    before, after = make_fx(gradient)(x), make_fx(gradient_of_graph)(x)
    before.graph.eliminate_dead_code()
    after.graph.eliminate_dead_code()
    assert count(after.graph) < count(before.graph)


EIGEN: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "values": (lambda x: torch.linalg.eigvalsh(x @ x.mT)[..., 0], 1),
    "values, twice": (lambda x: torch.linalg.eigvalsh(x @ x.mT) + torch.linalg.eigvalsh(x @ x.mT + 1), 2),
    "vectors": (lambda x: torch.linalg.eigh(x @ x.mT).eigenvectors.abs(), 0),
    "both": (lambda x: torch.linalg.eigh(x @ x.mT).eigenvectors.abs() * torch.linalg.eigvalsh(x @ x.mT), 1),
}


@pytest.mark.parametrize("name", EIGEN)
def test_eigenvectors_are_left_out_where_nobody_asks_for_them(name: str) -> None:
    function, count = EIGEN[name]
    x = torch.randn(3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    graph = make_fx(vmap(function))(x)  # under vmap torch cannot tell that no gradient will be taken
    graph.graph.eliminate_dead_code()
    assert spare_eigenvectors(graph.graph) == count
    graph.recompile()
    torch.testing.assert_close(graph(x), vmap(function)(x))
    found = [node.args[1:] for node in graph.graph.nodes if node.target is torch.ops.aten._linalg_eigh.default]
    assert found.count(("L", False)) == count
