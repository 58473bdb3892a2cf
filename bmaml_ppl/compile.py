"""Recording of a step: Pyro's handlers and `torch.func`'s interpreters run once, plain tensor code after."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Compile", "Recorded", "should_record"]

Compile = Literal["auto"] | bool

_WORTH_RECORDING = 20
"""Meta-steps from which recording (about as long as ten eager ones) earns its time back."""


def should_record(compile: Compile, num_steps: int) -> bool:
    """Whether a run of so many meta-steps is recorded."""
    if compile not in ("auto", True, False):
        raise ValueError(f'compile={compile!r} is not known; choose "auto", True or False')
    return num_steps >= _WORTH_RECORDING if compile == "auto" else compile


class Recorded:
    """A pure function of nested tensors that is recorded as a graph on its first call with each layout.

    The graph computes what the function does, operation by operation; random draws are recorded as draws.
    A function that cannot be recorded runs as it is, after one warning.

    Args:
        function: Takes and returns nested containers of tensors.

    Attributes:
        interpreted: Whether a graph, where no gradient is taken and all is on the CPU, runs in TorchScript's
            interpreter, which calls small operations about four times as fast as Python does.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.graphs: dict[Any, tuple[GraphModule, Any] | None] = {}
        self.interpreted = False
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns for these arguments."""
        leaves, layout = tree_flatten(arguments)
        key = (layout, tuple(None if x is None else (x.shape, x.dtype, x.device) for x in leaves))
        if key not in self.graphs:
            self.graphs[key] = self._record(leaves, layout)
        recorded = self.graphs[key]
        if recorded is None:
            return self.function(*arguments)
        graph, result_layout = recorded
        given = [x for x in leaves if x is not None]
        if self.interpreted and not torch.is_grad_enabled() and all(x.device.type == "cpu" for x in given):
            if key not in self._programs:
                self._programs[key] = _interpret(graph, given)
            return tree_unflatten(self._programs[key](*given), result_layout)
        return tree_unflatten(graph(*given), result_layout)

    def _record(self, leaves: list[Tensor | None], layout: Any) -> tuple[GraphModule, Any] | None:
        found: list[Any] = []

        def flat(*values: Tensor) -> list[Tensor]:
            given = iter(values)
            filled = [None if x is None else next(given) for x in leaves]
            results, result_layout = tree_flatten(self.function(*tree_unflatten(filled, layout)))
            found.append(result_layout)
            return results

        try:
            # The run that is recorded must not use up draws: the graph's first run is to draw what it drew.
            devices = {x.device for x in leaves if x is not None and x.device.type == "cuda"}
            with warnings.catch_warnings(), torch.random.fork_rng(devices=list(devices)):
                warnings.simplefilter("ignore")
                graph = make_fx(flat)(*_distinct(leaves))
        except Exception as error:  # any failure to record must leave the eager result standing
            warnings.warn(
                f"a step could not be recorded and runs eagerly ({type(error).__name__}: {error}); "
                "write compile=False to silence this",
                stacklevel=4,
            )
            return None
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph, found[0]


def _distinct(leaves: list[Tensor | None]) -> list[Tensor]:
    """The tensors, with a copy for each that is there twice: recording tells its inputs apart by identity alone."""
    seen: set[int] = set()
    found = []
    for leaf in leaves:
        if leaf is not None:
            found.append(leaf.clone() if id(leaf) in seen else leaf)
            seen.add(id(leaf))
    return found


def _interpret(graph: GraphModule, given: list[Tensor]) -> Callable[..., Any]:
    """The graph in TorchScript, or as it is where that fails or there is nothing to trace."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            program: Callable[..., Any] = torch.jit.trace(graph, tuple(given), check_trace=False)
    except Exception:  # an aid to speed alone: the graph is as good
        return graph
    return program
