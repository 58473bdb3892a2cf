"""A batch's meta-gradient a few tasks at a time: the memory of a chunk, the gradient of the whole."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from bmaml_ppl.adaptation import even_parts, take_tasks
from bmaml_ppl.checks import check_count
from bmaml_ppl.generators import rewound
from bmaml_ppl.outer import MetaGradient, Views, equal_weights
from bmaml_ppl.types import Tensors

__all__ = ["in_chunks"]

Gradient = Callable[..., MetaGradient]


def in_chunks(gradient: Gradient, chunk_size: int | None) -> Gradient:
    r"""The same gradient, differentiated for at most so many tasks at a time and added up.

    .. math:: \nabla_\theta \sum_t w_t L_t = \sum_c \nabla_\theta \sum_{t \in c} w_t L_t

    Chunks are of one size, the last filled up by tasks of weight 0, so that all share one recording; all make the
    same draws, which tasks share. The sum is the whole batch's to rounding error.

    Args:
        gradient: `meta_gradient` of parameters, views of tasks and their weights.
        chunk_size: Tasks differentiated together, None for all.

    Raises:
        TypeError: If chunk_size is not a whole number.
        ValueError: If it is below 1.
    """
    if chunk_size is None:
        return gradient
    check_count("chunk_size", chunk_size, least=1)

    def chunked(params: Tensors, views: Views, weights: Tensor | None = None) -> MetaGradient:
        weights = equal_weights(views) if weights is None else weights
        parts, found = even_parts(len(weights), chunk_size), None
        for i, rows in enumerate(parts):
            part = _take(views, weights, rows.to(weights.device), i * len(rows))
            with nullcontext() if i + 1 == len(parts) else rewound(weights.device):
                one = gradient(params, *part)
            found = one if found is None else _add(found, one)
        assert found is not None
        return found

    return chunked


def _take(views: Views, weights: Tensor, rows: Tensor, first: int) -> tuple[Views, Tensor]:
    """Tasks at these positions, with weight 0 for those that only fill the part up, which starts at `first`."""
    real = torch.arange(first, first + len(rows), device=weights.device) < len(weights)
    support, query, everything = (take_tasks(view, rows) for view in views)
    return (support, query, everything), torch.where(real, weights[rows], 0.0)


def _add(one: MetaGradient, other: MetaGradient) -> MetaGradient:
    gradients = {name: value + other.gradients[name] for name, value in one.gradients.items()}
    return MetaGradient(
        gradients,
        one.loss + other.loss,
        one.num_repaired + other.num_repaired,
        one.num_unconverged + other.num_unconverged,
    )
