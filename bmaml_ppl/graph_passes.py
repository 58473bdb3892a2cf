"""Rewrites of recorded graphs that keep their values, and cost less to differentiate or to run."""

from operator import getitem

import torch
from torch.fx import Graph, Node

__all__ = ["share_gram_gradients", "spare_eigenvectors"]

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default)
_LAYOUTS = (_aten.view.default, _aten.expand.default, _aten._unsafe_view.default, _aten.alias.default)
_SWAPS = (_aten.permute.default, _aten.transpose.int, _aten.t.default)


def share_gram_gradients(graph: Graph) -> int:
    r"""Rewrites every product of a matrix with its own transpose so that its gradient is one product instead of two.

    .. math:: X X^T = A + A^T - \operatorname{stopgrad}(A), \quad A = X \operatorname{stopgrad}(X)^T

    The first derivative is exact, (G + G^T) X for an incoming G; the second is not, so that the graph must be
    differentiated once only. Of particles, (M, D), that is two passes over M D numbers less a step.

    Args:
        graph: Of aten operations, changed in place.

    Returns:
        The number of products rewritten.
    """
    found = [node for node in graph.nodes if node.target in _PRODUCTS and _is_gram(*node.args)]
    for node in found:
        left, right = node.args
        with graph.inserting_before(node):
            half = graph.call_function(node.target, (left, graph.call_function(_aten.detach.default, (right,))))
            other = graph.call_function(_aten.transpose.int, (half, -2, -1))
            fixed = graph.call_function(_aten.detach.default, (half,))
            total = graph.call_function(_aten.add.Tensor, (half, other))
            result = graph.call_function(_aten.sub.Tensor, (total, fixed))
        for new in (half, other, fixed, total, result):
            new.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return len(found)


def spare_eigenvectors(graph: Graph) -> int:
    """Leaves out eigenvectors that nothing but a gradient would need, which are more than half of the work.

    Args:
        graph: Of aten operations, changed in place; it can no longer be differentiated.

    Returns:
        The number of decompositions rewritten.
    """
    found = [node for node in graph.nodes if node.target is _aten._linalg_eigh.default and _is_of_values(node)]
    for node in found:
        node.args = (node.args[0], node.args[1] if len(node.args) > 1 else "L", False)
        node.kwargs = {}
    return len(found)


def _is_of_values(node: Node) -> bool:
    """Whether all that is taken of a decomposition is its first result."""
    return all(user.target is getitem and user.args[1] == 0 for user in node.users)


def _is_gram(left: Node, right: Node) -> bool:
    """Whether the second factor is the transpose of the first."""
    left, right = _strip(left), _strip(right)
    if right.target not in _SWAPS or not _swaps_last(right):
        return False
    source = right.args[0]
    return isinstance(source, Node) and _strip(source) is left


def _strip(node: Node) -> Node:
    """The node that this one is, but for operations that leave its shape as it is."""
    while node.target in _LAYOUTS and _shape(node) == _shape(node.args[0]):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _swaps_last(node: Node) -> bool:
    rank = len(_shape(node))
    order = list(range(rank))
    order[-2:] = order[-1], order[-2]
    if node.target is _aten.t.default:
        return rank == 2
    if node.target is _aten.permute.default:
        given = node.args[1]
        return isinstance(given, list | tuple) and [dim % rank for dim in given if isinstance(dim, int)] == order
    dims = [dim % rank for dim in node.args[1:] if isinstance(dim, int)]
    return sorted(dims) == [rank - 2, rank - 1]


def _shape(node: object) -> tuple[int, ...]:
    """Shape of a node's value; of what has none, one that is like no other."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else (-id(node),)
