"""A meta-gradient as one CUDA graph: hundreds of kernels launched at once instead of one by one.

Written for NVIDIA GPUs by torch's documentation of `torch.cuda.graph`; it has not run on one yet.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from bmaml_ppl.compile import describe_layout, refill
from bmaml_ppl.generators import rewound
from bmaml_ppl.outer import MetaGradient, Views, equal_weights
from bmaml_ppl.types import Tensors

__all__ = ["CapturedGradient"]

_WARM_UPS = 3
"""Runs before the capture, in which libraries choose their kernels and take their work space."""


class CapturedGradient:
    """A meta-gradient that is captured on its first call with each layout, and replayed after.

    Draws are drawn anew: a replay takes the state of torch's CUDA generator as it is then.

    Args:
        gradient: Of parameters, views and weights, all on one GPU, that never waits for a result.
    """

    def __init__(self, gradient: Callable[..., MetaGradient]) -> None:
        self.gradient = gradient
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], MetaGradient]] = {}

    def __call__(self, params: Tensors, views: Views, weights: Tensor | None = None) -> MetaGradient:
        """See `bmaml_ppl.outer.meta_gradient`."""
        weights = equal_weights(views) if weights is None else weights
        leaves, layout = tree_flatten((dict(params), views, weights))
        key = describe_layout(leaves, layout)
        if key not in self._captured:
            self._captured[key] = self._capture(leaves, layout)
        graph, inputs, result = self._captured[key]
        for kept, new in zip(inputs, (x for x in leaves if x is not None), strict=True):
            kept.copy_(new)
        graph.replay()
        # The next replay writes over what this one found.
        copied: MetaGradient = tree_map(torch.clone, result)
        return copied

    def _capture(self, leaves: list[Tensor | None], layout: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        inputs = [x.detach().clone() for x in leaves if x is not None]
        arguments = refill(inputs, leaves, layout)
        device = inputs[0].device
        with torch.cuda.device(device), rewound(device):
            side, here = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self.gradient(*arguments)
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.gradient(*arguments)
        return graph, inputs, result
