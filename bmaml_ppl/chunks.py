"""A batch's meta-gradient a few tasks at a time: the memory of a chunk, the gradient of the whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmaml_ppl.adaptation import take_tasks
from bmaml_ppl.checks import check_count
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
        count = -(-len(weights) // chunk_size)
        size = -(-len(weights) // count)
        found = None
        for first in range(0, len(weights), size):
            part = _part(views, weights, first, size)
            if first + size < len(weights):
                with _rewound(weights):
                    one = gradient(params, *part)
            else:
                one = gradient(params, *part)
            found = one if found is None else _add(found, one)
        assert found is not None
        return found

    return chunked


def _rewound(like: Tensor) -> Any:
    """Puts torch's generators back after the block: the next chunk makes the same draws."""
    return torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else [])


def _part(views: Views, weights: Tensor, first: int, size: int) -> tuple[Views, Tensor]:
    """So many tasks from the first on, the last of them repeated with weight 0 where there are fewer."""
    index = torch.arange(first, first + size, device=weights.device)
    there = index < len(weights)
    index = index.clamp_max(len(weights) - 1)

    support, query, everything = (take_tasks(view, index) for view in views)
    return (support, query, everything), torch.where(there, weights[index], 0.0)


def _add(one: MetaGradient, other: MetaGradient) -> MetaGradient:
    gradients = {name: value + other.gradients[name] for name, value in one.gradients.items()}
    return MetaGradient(
        gradients,
        one.loss + other.loss,
        one.num_repaired + other.num_repaired,
        one.num_unconverged + other.num_unconverged,
    )
