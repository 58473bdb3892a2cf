"""The meta-gradient as machine code: of a short adaptation as a whole, of a long one step by step."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils._pytree import tree_flatten

from bmaml_ppl.adaptation import Adapter, take_tasks
from bmaml_ppl.compile import (
    CompileFailed,
    Mode,
    describe_layout,
    difference,
    lower,
    record_graph,
    refill,
    tolerance,
    warn_of_failure,
)
from bmaml_ppl.cuda_graphs import CapturedGradient
from bmaml_ppl.generators import rewound
from bmaml_ppl.memory import Memory
from bmaml_ppl.objectives import Objective, Rollout
from bmaml_ppl.outer import Constraints, MetaGradient, Views, constrain, count, equal_weights, meta_gradient, weigh
from bmaml_ppl.types import Tensors

__all__ = ["CompiledGradient", "make_gradient"]

_MOST_NODES, _FEW_NODES = 12_000, 5000
"""Operations of an unrolled adaptation with its gradient up to which it is compiled as a whole, in about a minute, and
up to which also where the run is short: in half a minute."""

_OF_ROUNDING, _MOST_OF_ROUNDING = 3, 0.5
"""How many times as far from the recorded gradient as the eager one a gradient through compiled steps may be, and how
far at most: long adaptations magnify what rounding leaves between two right ones."""

_COMPARED: tuple[Mode, Mode] = ("eager", "recorded")
_MOST_DIFFERENT = 1e-2
"""Relative difference from which a recorded density is taken to have another gradient than the model."""

Gradient = Callable[..., MetaGradient]


class CompiledGradient:
    """`meta_gradient` of an adapter whose mode is "compiled", for each layout of a batch.

    An adaptation of few operations is unrolled with its gradient and compiled as one program. Of others one step is
    compiled and looped, so that their number may change. What was compiled must give the gradient that the
    recorded steps give on the first batch; if not, it is put aside with a warning.

    Args:
        adapter: Inference bound to a density, compiled.
        objective: Losses of tasks.
        known: Constraints of the meta-parameters.
        num_calls: How often it will be called, None for often: only a long run earns back to compile a long whole.

    Attributes:
        how: What the last call ran: "compiled", "compiled as a whole" or "recorded".
    """

    def __init__(
        self, adapter: Adapter, objective: Objective, known: Constraints, num_calls: int | None = None
    ) -> None:
        self.adapter, self.objective, self.known = adapter, objective, known
        self.most_nodes = _MOST_NODES if num_calls is None else min(max(num_calls, _FEW_NODES), _MOST_NODES)
        self.how = "not compiled yet"
        self._chosen: dict[Any, tuple[str, Gradient]] = {}

    def __call__(self, params: Tensors, views: Views, weights: Tensor | None = None) -> MetaGradient:
        """See `meta_gradient`."""
        weights = equal_weights(views) if weights is None else weights
        leaves, layout = tree_flatten((dict(params), views, weights))
        key = describe_layout(leaves, layout)
        if key not in self._chosen:
            self._chosen[key] = self._choose(params, views, weights)
        self.how, gradient = self._chosen[key]
        return gradient(params, views, weights)

    def _choose(self, params: Tensors, views: Views, weights: Tensor) -> tuple[str, Gradient]:
        """The fastest program that gives the gradient of the recorded steps on this batch."""
        recorded = replace(self.adapter, mode="recorded")
        run = self._step_by_step(recorded)
        with rewound(weights.device):
            wanted = run(params, views, weights)
        size = sum(step.num_nodes for step in recorded.steps().values())
        candidates: list[tuple[str, Callable[[], Gradient]]] = []
        if size <= self.most_nodes and self.adapter.memory == Memory():
            candidates.append(("compiled as a whole", lambda: _compile_whole(self, recorded, params, views, weights)))
        candidates.append(("compiled", lambda: self._step_by_step(_with_graphs(self.adapter, recorded))))

        @cache
        def rounding() -> float:
            """How far the eager gradient is from the recorded one: both are right, but for rounding."""
            with rewound(weights.device):
                return _compare(self._step_by_step(replace(self.adapter, mode="eager"))(params, views, weights), wanted)

        for how, make in candidates:
            try:
                with rewound(weights.device), warnings.catch_warnings():
                    warnings.simplefilter("error", CompileFailed)
                    program = make()
                    found = program(params, views, weights)
                apart, allowed = _compare(found, wanted), tolerance([wanted.loss])
                if how == "compiled" and apart > allowed:  # each of its steps was found to be right by itself
                    allowed = min(_OF_ROUNDING * rounding(), _MOST_OF_ROUNDING)
            except Exception as error:
                # A loop that ends where its numbers say so cannot be unrolled; its steps can be compiled.
                if how == "compiled":
                    warn_of_failure(error)
                continue
            if apart <= allowed:
                return self._capture(how, program, params, views, weights, found)
            warn_of_failure(f"the gradient of what was {how} differs by {apart:.1e}")
        return "recorded", run

    def _capture(
        self, how: str, program: Gradient, params: Tensors, views: Views, weights: Tensor, wanted: MetaGradient
    ) -> tuple[str, Gradient]:
        """The program as a CUDA graph, where it is on a GPU, can be captured and gives the same."""
        if weights.device.type != "cuda":
            return how, program
        captured = CapturedGradient(program)
        try:
            with rewound(weights.device):
                found = captured(params, views, weights)
        except Exception as error:  # the program is as good, but for launching its kernels one by one
            warn_of_failure(error)
            return how, program
        if _compare(found, wanted) <= tolerance([wanted.loss]):
            return f"{how}, in a CUDA graph", captured
        return how, program

    def _step_by_step(self, adapter: Adapter) -> Gradient:
        return partial(meta_gradient, adapter, self.objective, self.known)


def _with_graphs(adapter: Adapter, recorded: Adapter) -> Adapter:
    """The same adapter with the graphs that another has recorded."""
    copied, steps = replace(adapter), recorded.steps()
    for name, step in copied.steps().items():
        step.graphs = steps[name].graphs
    return copied


def _compile_whole(of: CompiledGradient, recorded: Adapter, params: Tensors, views: Views, weights: Tensor) -> Gradient:
    """The whole meta-gradient as one compiled program for one layout of a batch."""
    tracing = _with_graphs(recorded, recorded)
    for step in tracing.steps().values():
        step.interpreted = False  # the interpreter hides its operations

    def loss(params: dict[str, Tensor], views: Views, weights: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rollout = Rollout(tracing, constrain(params, of.known), *views)
        return weigh(of.objective(rollout), weights), count(rollout, weights)

    leaves, layout = tree_flatten((dict(params), views, weights))
    names = list(params)

    def flat(*values: Tensor) -> list[Tensor]:
        gradients, (value, counts) = grad_and_value(loss, has_aux=True)(*refill(values, leaves, layout))
        return [*(gradients[name] for name in names), value, *counts]

    given = [x.detach().clone() for x in leaves if x is not None]
    with torch.no_grad():
        program = lower(record_graph(flat, given), given)

    def run(params: Tensors, views: Views, weights: Tensor) -> MetaGradient:
        with torch.no_grad():
            values = [x.contiguous() for x in tree_flatten((dict(params), views, weights))[0] if x is not None]
            *gradients, value, repaired, unconverged = program(*values)
        return MetaGradient(dict(zip(names, gradients, strict=True)), value, repaired, unconverged)

    return run


def _compare(found: MetaGradient, wanted: MetaGradient) -> float:
    """Relative difference of two gradients, and of their losses; 0 where the wanted one is not finite."""
    if not torch.isfinite(wanted.loss):
        return 0.0
    loss = ((found.loss - wanted.loss).abs() / wanted.loss.abs().clamp_min(1.0)).item()
    names = list(wanted.gradients)
    if not torch.isfinite(found.loss):
        return inf
    return max(loss, difference([found.gradients[k] for k in names], [wanted.gradients[k] for k in names]))


class _Verified:
    """`meta_gradient` in a mode other than eager, once the recorded density is found to have the model's gradients.

    A recording holds what is computed, not how it is to be differentiated: a model with `torch.no_grad()` or a custom
    `torch.autograd.Function` would silently get the gradient of what it computes.
    """

    def __init__(self, adapter: Adapter, objective: Objective, known: Constraints, num_calls: int | None) -> None:
        self.adapter, self.objective, self.known, self.num_calls = adapter, objective, known, num_calls
        self._gradient: Gradient | None = None

    def __call__(self, params: Tensors, views: Views, weights: Tensor | None = None) -> MetaGradient:
        """See `meta_gradient`."""
        if self._gradient is None:
            self._gradient = self._choose(params, views)
        return self._gradient(params, views, weights)

    def _choose(self, params: Tensors, views: Views) -> Gradient:
        eager, recorded = (replace(self.adapter, mode=mode) for mode in _COMPARED)
        prior = constrain(params, self.known)
        apart = difference(*(_density_gradient(adapter, prior, views) for adapter in (recorded, eager)))
        if not apart <= _MOST_DIFFERENT:
            warnings.warn(
                "the model has gradients that cannot be recorded, by torch.no_grad() or a torch.autograd.Function of "
                "its own, so that the run is eager, several times slower; write .detach() in place of "
                "torch.no_grad(), or compile=False to silence this",
                stacklevel=2,
            )
            return partial(meta_gradient, eager, self.objective, self.known)
        if self.adapter.mode == "compiled":
            return CompiledGradient(self.adapter, self.objective, self.known, self.num_calls)
        return partial(meta_gradient, self.adapter, self.objective, self.known)


def _density_gradient(adapter: Adapter, prior: Tensors, views: Views) -> list[Tensor]:
    """Gradient of the log joint density of one task where adaptation starts, by particles and meta-parameters."""
    task = take_tasks(views[2], slice(0, 1))
    with torch.no_grad(), rewound(equal_weights(views).device):
        start = replace(adapter, mode="eager").begin(prior, task).particles
    sources = {name: value.detach().requires_grad_() for name, value in prior.items()}
    particles = start.detach().requires_grad_()
    with torch.enable_grad():
        total = adapter.log_joint(particles, sources, task).sum()
        found = torch.autograd.grad(total, [particles, *sources.values()], materialize_grads=True, allow_unused=True)
    return list(found)


def make_gradient(adapter: Adapter, objective: Objective, known: Constraints, num_calls: int | None = None) -> Gradient:
    """`meta_gradient` of an adapter in its mode, as a function of parameters, views and weights alone, for so many
    calls; see `CompiledGradient`."""
    if adapter.mode == "eager":
        return partial(meta_gradient, adapter, objective, known)
    return _Verified(adapter, objective, known, num_calls)
