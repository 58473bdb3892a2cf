r"""How much of the unrolled adaptation is kept for the outer gradient.

Ways to bound the memory of a meta-step, from the one that changes the result least:

| write | outer gradient | memory of n steps | take it when |
|---|---|---|---|
| `memory=full()` | exact | n steps' results | it fits |
| `chunk_size=c` | exact | that of c tasks | the batch is large |
| `memory=checkpointed()` | exact | one step's results, a few states | steps are many; costs a third more time |
| `batch_size=b` | noisier | that of b tasks | the noise does no harm |
| `map_estimate(gradient="implicit")`, `laplace()` | exact at the optimum | a Hessian | adaptation converges |
| `memory=truncated(k)` | of the last k steps and the start | k steps' results | late steps matter most |
| `first_order=True` | scores are constants | n steps' results without scores' | curvature matters little |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from bmaml_ppl.checks import check_count

__all__ = ["Kept", "Memory", "checkpointed", "full", "truncated"]

Step = Callable[[Any, Mapping[str, Tensor]], Any]
"""`step(state, prior) -> state`."""


class Kept(NamedTuple):
    """What is alive when the backward pass needs most.

    Attributes:
        graphs: Steps whose intermediate results are kept.
        states: States kept beside.
    """

    graphs: int
    states: int


@dataclass(frozen=True)
class Memory:
    """What an unrolled loop keeps for the backward pass: here, everything; see `full`."""

    def run(self, step: Step, state: Any, prior: Mapping[str, Tensor], num_steps: int) -> Any:
        """The state after so many steps.

        Args:
            step: One step; what it depends on and gradients reach is its two arguments.
            state: Nested tensors.
            prior: Meta-parameters.
            num_steps: n.
        """
        return _iterate(step, state, prior, num_steps)

    def keeps(self, num_steps: int) -> Kept:
        """What of a run of so many steps is alive at the backward pass' peak."""
        return Kept(num_steps, 0)

    def per_step(self) -> "Memory":
        """The mode with as few steps' results kept together as it can, from which `keeps` leads to this one."""
        return Memory()

    def __str__(self) -> str:
        return "full()"


def full() -> Memory:
    """Keeps every step's intermediate results: the fastest, with memory that grows by a graph a step."""
    return Memory()


def checkpointed(every: int = 1, max_states: int | None = 12) -> Memory:
    r"""Keeps some states alone, and computes the steps between them again in the backward pass.

    The gradient is that of `full()` to rounding error, random draws within steps included. Memory is that of `every`
    steps' intermediate results and of at most `max_states` states, however many steps there are: where more would
    be kept, the schedule is the one that recomputes least, with each step run again at most r times for n steps of
    :math:`n / every \le \binom{s + r}{r}`, s = max_states.

    Args:
        every: Steps between two states, whose intermediate results are kept together.
        max_states: States kept beside the first; None keeps all, so that each step runs again once.

    References:
        Griewank and Walther (2000), Algorithm 799: Revolve, for the schedule; Chen, Xu, Zhang and Guestrin (2016),
        Training Deep Nets with Sublinear Memory Cost.
    """
    check_count("every", every, least=1)
    if max_states is not None:
        check_count("max_states", max_states, least=1)
    return _Checkpointed(every, max_states)


def truncated(num_steps: int) -> Memory:
    r"""Outer gradients pass through the last k steps alone; those before are run without a graph.

    .. math:: \tilde z_{n-k} = \mathrm{stopgrad}(z_{n-k}) + z_0 - \mathrm{stopgrad}(z_0)

    The start keeps the identity part of the first n - k steps, as in first-order MAML: detached, a learned start would
    get no gradient at all. Meta-parameters get that of the last k steps and of the start. k = n is exact.

    Args:
        num_steps: k.

    Reference:
        Shaban, Cheng, Hatch and Boots (2019), Truncated Back-propagation for Bilevel Optimization, section 3.
    """
    check_count("num_steps", num_steps, least=0)
    return _Truncated(num_steps)


def _iterate(step: Step, state: Any, prior: Mapping[str, Tensor], num_steps: int) -> Any:
    for _ in range(num_steps):
        state = step(state, prior)
    return state


@dataclass(frozen=True)
class _Truncated(Memory):
    last: int

    def run(self, step: Step, state: Any, prior: Mapping[str, Tensor], num_steps: int) -> Any:
        before = num_steps - self.last
        if before <= 0 or not torch.is_grad_enabled():
            return _iterate(step, state, prior, num_steps)
        with torch.no_grad():
            moved = _iterate(step, state, prior, before)
        return _iterate(step, tree_map(_keep_identity, state, moved), prior, self.last)

    def keeps(self, num_steps: int) -> Kept:
        return Kept(min(num_steps, self.last), 1)

    def __str__(self) -> str:
        return f"truncated({self.last})"


def _keep_identity(start: Tensor, moved: Tensor) -> Tensor:
    """The moved tensor, with the start's gradient."""
    if not start.requires_grad:
        return moved
    return moved + (start - start.detach())


@dataclass(frozen=True)
class _Checkpointed(Memory):
    every: int
    max_states: int | None

    def run(self, step: Step, state: Any, prior: Mapping[str, Tensor], num_steps: int) -> Any:
        leaves, layout = tree_flatten((state, dict(prior)))
        if num_steps <= self.every or not torch.is_grad_enabled() or not any(_needs(leaf) for leaf in leaves):
            return _iterate(step, state, prior, num_steps)
        lengths = [min(self.every, num_steps - i) for i in range(0, num_steps, self.every)]
        slots = len(lengths) if self.max_states is None else self.max_states
        flat, state_layout = tree_flatten(state)
        found = _Recomputed.apply(_Segments(step, layout, len(flat), lengths, slots), *leaves)
        return tree_unflatten(list(found), state_layout)

    def keeps(self, num_steps: int) -> Kept:
        segments = -(-num_steps // self.every)
        slots = segments if self.max_states is None else self.max_states
        return Kept(min(self.every, num_steps), min(slots, max(segments - 1, 0)) + 1)

    def per_step(self) -> Memory:
        return _Checkpointed(1, self.max_states)

    def __str__(self) -> str:
        return f"checkpointed({self.every}, max_states={self.max_states})"


def _needs(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


@cache
def split_segments(num: int, slots: int) -> int:
    """How far to go before the next state is kept, with `num` segments to reverse and so many states to keep.

    Reference:
        Griewank and Walther (2000), Algorithm 799: Revolve, section 2, for the numbers of steps that s states and r
        repetitions reach, binomial(s + r, s).
    """
    s = slots + 1  # the paper counts the state that is there already
    repeats = next(r for r in range(1, num + 1) if comb(s + r, s) >= num)
    return max(1, min(comb(s + repeats - 1, s), num - comb(s - 1 + repeats - 1, s - 1)))


class _Snapshot(NamedTuple):
    """A state, flat, the generators' states from which its next step draws, and the room that it takes."""

    leaves: tuple[Any, ...]
    generators: tuple[Tensor, ...]
    room: list[Tensor | None] | None


class _Segments:
    """Runs of consecutive steps, each a function of a flat state and flat meta-parameters."""

    def __init__(self, step: Step, layout: TreeSpec, num_state: int, lengths: list[int], slots: int) -> None:
        self.step, self.layout, self.num_state = step, layout, num_state
        self.lengths, self.slots = lengths, slots
        self.cuda: list[torch.device] = []
        self.rooms: list[list[Tensor | None]] = []

    def reserve(self, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
        """Makes room, side by side, for the states to keep: scattered, they hold the allocator's memory apart.

        What a segment leaves as it is needs none.
        """
        num = min(self.slots, len(self.lengths) - 1) + 1  # with the one that comes and goes
        rooms = [None if x is y else y.new_empty((num, *y.shape)) for x, y in zip(before, after, strict=True)]
        self.rooms = [[None if room is None else room[i] for room in rooms] for i in range(num)]

    def keep(self, leaves: tuple[Any, ...]) -> _Snapshot:
        """The state in a room of its own."""
        room = self.rooms.pop()
        kept = tuple(x if place is None else place.copy_(x) for place, x in zip(room, leaves, strict=True))
        return self.snapshot(kept, room)

    def snapshot(self, leaves: tuple[Any, ...], room: list[Tensor | None] | None = None) -> _Snapshot:
        generators = (torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.cuda))
        return _Snapshot(leaves, generators, room)

    def free(self, snapshot: _Snapshot) -> None:
        if snapshot.room is not None:
            self.rooms.append(snapshot.room)

    def rewind(self, snapshot: _Snapshot) -> None:
        torch.set_rng_state(snapshot.generators[0])
        for device, state in zip(self.cuda, snapshot.generators[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def advance(self, leaves: tuple[Any, ...], prior: tuple[Any, ...], begin: int, end: int) -> tuple[Any, ...]:
        """The flat state after the segments from `begin` to before `end`; draws go on from the generators."""
        state, params = tree_unflatten([*leaves, *prior], self.layout)
        state = _iterate(self.step, state, params, sum(self.lengths[begin:end]))
        return tuple(tree_flatten(state)[0])

    def kept(self) -> list[int]:
        """Segments before which the forward pass keeps a state."""
        positions, num, slots = [0], len(self.lengths), self.slots
        while num > 1 and slots > 0:
            positions.append(positions[-1] + split_segments(num, slots))
            num, slots = len(self.lengths) - positions[-1], slots - 1
        return positions


class _Recomputed(torch.autograd.Function):
    """The state after all segments, from whose graph only some states are kept."""

    @staticmethod
    def forward(ctx: Any, segments: _Segments, *leaves: Any) -> Any:
        state, prior = leaves[: segments.num_state], leaves[segments.num_state :]
        segments.cuda = list({x.device for x in leaves if isinstance(x, Tensor) and x.device.type == "cuda"})
        positions = segments.kept()
        # Not saved by autograd, which would hold all of them to the end of the backward pass.
        ctx.segments, ctx.prior, ctx.snapshots = segments, prior, [(0, segments.snapshot(state))]
        for begin, end in zip(positions, [*positions[1:], len(segments.lengths)], strict=True):
            if begin:
                ctx.snapshots.append((begin, segments.keep(state)))
            before, state = state, segments.advance(state, prior, begin, end)
            if not begin:
                segments.reserve(before, state)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in state if not x.is_floating_point()))
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        segments, end = ctx.segments, len(ctx.segments.lengths)
        if not ctx.snapshots:
            raise RuntimeError("memory=checkpointed() frees its states as it goes back; write full() to go back twice")
        wanted = ctx.needs_input_grad[1 + segments.num_state :]
        reverse = _Reverse(segments, ctx.prior, wanted, gradients)
        with torch.random.fork_rng(devices=segments.cuda):
            while ctx.snapshots:
                begin, snapshot = ctx.snapshots.pop()
                reverse.run(snapshot, begin, end, segments.slots - len(ctx.snapshots))
                segments.free(snapshot)
                end = begin
        return None, *reverse.of_state, *reverse.of_prior


class _Reverse:
    """The backward pass through segments, last first.

    Attributes:
        of_state: Gradient with respect to each tensor of the state so far, None where there is none.
        of_prior: With respect to each meta-parameter.
    """

    def __init__(
        self, segments: _Segments, prior: tuple[Any, ...], wanted: tuple[bool, ...], gradients: tuple[Any, ...]
    ) -> None:
        self.segments, self.prior, self.wanted = segments, prior, wanted
        self.of_state: list[Tensor | None] = list(gradients)
        self.of_prior: list[Tensor | None] = [None] * len(prior)

    def run(self, snapshot: _Snapshot, begin: int, end: int, slots: int) -> None:
        """Goes back from `end` to the snapshot before `begin`, with so many states more to keep on the way."""
        while end - begin > 1:
            middle = begin + (split_segments(end - begin, slots) if slots > 0 else end - begin - 1)
            self.segments.rewind(snapshot)
            reached = self.segments.keep(self.segments.advance(snapshot.leaves, self.prior, begin, middle))
            self.run(reached, middle, end, max(slots - 1, 0))
            self.segments.free(reached)
            end = middle
        self._reverse_one(snapshot, begin)

    def _reverse_one(self, snapshot: _Snapshot, index: int) -> None:
        """Goes back through one segment, with its graph."""
        self.segments.rewind(snapshot)
        state = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in snapshot.leaves)
        prior = tuple(x.detach().requires_grad_(w) for x, w in zip(self.prior, self.wanted, strict=True))
        with torch.enable_grad():
            reached = self.segments.advance(state, prior, index, index + 1)
        pairs = [(x, g) for x, g in zip(reached, self.of_state, strict=True) if g is not None and x.requires_grad]
        inputs = [x for x in (*state, *prior) if x.requires_grad]
        if not pairs:
            self.of_state = [None] * len(state)
            return
        outputs, weights = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))
        self.of_state = [next(found) if x.requires_grad else None for x in state]
        for i, x in enumerate(prior):
            gradient = next(found) if x.requires_grad else None
            if gradient is not None:
                before = self.of_prior[i]
                self.of_prior[i] = gradient if before is None else before + gradient
