"""Memory modes: the gradient of the full unroll, or of what they say; and what the schedule costs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.adaptation import Adapter
from bmaml_ppl.chunks import in_chunks
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import map_estimate, mean_field, platipus, svgd
from bmaml_ppl.memory import Kept, Memory, checkpointed, full, split_segments, truncated
from bmaml_ppl.objectives import Objective, chaser, elbo, platipus_loss, query_nll
from bmaml_ppl.outer import MetaGradient, Views, meta_gradient
from bmaml_ppl.types import Inference, Start, Tensors
from tests.toys import bind, finite_differences, level, level_tasks, line, line_tasks, views_of

KNOWN = {"sd": constraints.positive, "noise": constraints.positive}
LEVEL = {"mean": torch.tensor(0.2), "sd": torch.tensor(-0.3), "noise": torch.tensor(-0.5)}
STEPS = 5
CASES: dict[str, tuple[Callable[[], Inference], Start, Objective]] = {
    "svgd free": (
        lambda: svgd(num_particles=4, num_steps=STEPS, preconditioner="adaptive", init="free"),
        "free",
        query_nll() + chaser(2),
    ),
    "svgd prior": (
        lambda: svgd(num_particles=4, num_steps=STEPS, preconditioner="curvature", init="prior"),
        "prior",
        query_nll(),
    ),
    "map_estimate": (
        lambda: map_estimate(num_steps=STEPS, gradient="unrolled", preconditioner="none", init="free"),
        "free",
        query_nll(),
    ),
    "mean_field": (
        lambda: mean_field(num_particles=4, num_steps=STEPS, noise="fresh", preconditioner="natural", init="prior"),
        "prior",
        elbo(),
    ),
    "platipus": (
        lambda: platipus(num_particles=3, num_steps=STEPS, preconditioner="none"),
        "prior",
        platipus_loss(),
    ),
}


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


def prepare(case: str, recorded: bool = False) -> tuple[Adapter, Objective, dict[str, Tensor], Views]:
    """The adapter of a case, its objective, unconstrained meta-parameters and the views of three tasks."""
    make, start, objective = CASES[case]
    model, tasks = (level, level_tasks(3, 6)) if start == "prior" else (line, line_tasks(3, 6))
    adapter = bind(model, tasks, make(), start, recorded=recorded)
    params = {k: v.double() for k, v in LEVEL.items()} if start == "prior" else {}
    params |= adapter.inference.parameters(adapter.density.dim)
    if start == "free":
        generator = torch.Generator().manual_seed(0)
        shape = adapter.inference.num_particles, adapter.density.dim
        params["particles"] = torch.randn(shape, generator=generator)
    return adapter, objective, params, views_of(tasks, 3)


def gradient(adapter: Adapter, objective: Objective, params: Tensors, views: Views) -> MetaGradient:
    with seeded(3, torch.device("cpu")):
        return meta_gradient(adapter, objective, KNOWN, params, views)


def with_memory(adapter: Adapter, memory: Memory) -> Adapter:
    """The same adapter, recordings included, in another memory mode."""
    return replace(adapter, memory=memory)


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("case", CASES)
def test_checkpointed_and_long_truncated_gradients_are_the_full_ones(case: str, recorded: bool) -> None:
    adapter, objective, params, views = prepare(case, recorded)
    wanted = gradient(adapter, objective, params, views)
    assert max(g.abs().max() for g in wanted.gradients.values()) > 1e-3
    modes = [checkpointed(), checkpointed(2), truncated(STEPS)]
    modes += [] if recorded else [checkpointed(max_states=1), checkpointed(max_states=None), checkpointed(99)]
    for memory in modes:
        got = gradient(with_memory(adapter, memory), objective, params, views)
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", ["svgd prior", "mean_field", "platipus"])
def test_checkpointed_gradients_are_finite_differences(case: str) -> None:
    adapter, objective, params, views = prepare(case)
    adapter = with_memory(adapter, checkpointed(2, max_states=1))
    got = gradient(adapter, objective, params, views).gradients
    for name, value in params.items():

        def loss(moved: Tensor, name: str = name) -> Tensor:
            return gradient(adapter, objective, {**params, name: moved}, views).loss

        torch.testing.assert_close(got[name], finite_differences(loss, value), rtol=2e-5, atol=2e-6)


def test_generators_end_where_the_full_unroll_leaves_them() -> None:
    adapter, objective, params, views = prepare("mean_field")
    after = []
    for memory in (full(), checkpointed(), truncated(2)):
        with seeded(3, torch.device("cpu")):
            meta_gradient(with_memory(adapter, memory), objective, KNOWN, params, views)
            after.append(torch.rand(()).item())
    assert after[0] == after[1] == after[2]


@pytest.mark.parametrize("last", range(STEPS))
@pytest.mark.parametrize("case", ["svgd free", "mean_field"])
def test_truncated_gradients_are_those_of_a_naive_loop(case: str, last: int) -> None:
    adapter, objective, params, views = prepare(case)
    got = gradient(with_memory(adapter, truncated(last)), objective, params, views)
    naive = gradient(with_memory(adapter, _Naive(last)), objective, params, views)
    whole = gradient(adapter, objective, params, views)
    torch.testing.assert_close(got, naive, rtol=1e-11, atol=1e-12)
    assert got.loss == whole.loss
    name = "particles" if case == "svgd free" else "mean"
    assert not torch.allclose(got.gradients[name], whole.gradients[name], rtol=1e-6)


class _Naive(Memory):
    """Truncation by a term whose value is zero and whose slope is one, leaf by leaf."""

    def __init__(self, last: int) -> None:
        object.__setattr__(self, "last", last)

    def run(self, step: Callable[..., Any], state: Any, prior: Mapping[str, Tensor], num_steps: int) -> Any:
        cut = num_steps - self.last  # type: ignore[attr-defined]
        start = state
        for i in range(num_steps):
            if i == cut:
                pairs = zip(start, state, strict=True)
                state = type(state)(*(now.detach() + first - first.detach() for first, now in pairs))
            state = step(state, prior)
        if cut == num_steps:
            pairs = zip(start, state, strict=True)
            state = type(state)(*(now.detach() + first - first.detach() for first, now in pairs))
        return state


def test_nothing_but_the_identity_is_first_order_maml() -> None:
    adapter, objective, params, views = prepare("map_estimate")
    none = gradient(with_memory(adapter, truncated(0)), objective, params, views)
    first = gradient(replace(adapter, first_order=True), objective, params, views)
    torch.testing.assert_close(none, first, rtol=1e-11, atol=1e-12)


@cache
def _fewest(num: int, slots: int) -> int:
    """Steps run again by the best schedule, by dynamic programming."""
    if num <= 1 or slots == 0:
        return num * (num - 1) // 2
    return min(m + _fewest(num - m, slots - 1) + _fewest(m, slots) for m in range(1, num))


@cache
def _ours(num: int, slots: int) -> int:
    if num <= 1 or slots == 0:
        return num * (num - 1) // 2
    middle = split_segments(num, slots)
    return middle + _ours(num - middle, slots - 1) + _ours(middle, slots)


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 20])
def test_the_schedule_recomputes_least(slots: int) -> None:
    assert [_ours(num, slots) for num in range(1, 41)] == [_fewest(num, slots) for num in range(1, 41)]


@pytest.mark.parametrize(("num_steps", "every", "slots"), [(7, 1, 2), (12, 1, 3), (13, 3, 2), (30, 1, 4), (9, 2, 9)])
def test_no_more_is_kept_than_promised(num_steps: int, every: int, slots: int) -> None:
    """Live states and steps with a graph, counted in a run of a step that says when it comes and goes."""
    calls: list[bool] = []

    def step(state: tuple[Tensor], prior: Mapping[str, Tensor]) -> tuple[Tensor]:
        calls.append(torch.is_grad_enabled())
        return (torch.sin(state[0] * prior["a"]),)

    a, start = torch.tensor(1.1, requires_grad=True), (torch.ones(3, requires_grad=True),)
    memory = checkpointed(every, max_states=slots)
    (end,) = memory.run(step, start, {"a": a}, num_steps)
    got = torch.autograd.grad(end.sum(), [a, start[0]])
    segments = -(-num_steps // every)
    assert calls.count(True) == num_steps
    assert calls.count(False) <= num_steps + every * _fewest(segments, slots)
    (whole,) = full().run(step, start, {"a": a}, num_steps)
    torch.testing.assert_close(got, torch.autograd.grad(whole.sum(), [a, start[0]]), rtol=1e-12, atol=0)
    assert memory.keeps(num_steps) == Kept(every, min(slots, segments - 1) + 1)


def test_a_second_backward_pass_is_refused() -> None:
    a = torch.tensor(1.1, requires_grad=True)
    (end,) = checkpointed().run(lambda s, p: (s[0] * p["a"],), (torch.ones(()),), {"a": a}, 3)
    torch.autograd.grad(end, a, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"write full\(\)"):
        torch.autograd.grad(end, a)


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        (end,) = checkpointed().run(lambda s, p: (2 * s[0],), (torch.ones(2),), {}, 3)
    assert end.grad_fn is None
    assert end.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: checkpointed(0), "every=0 must be at least 1"),
        (lambda: checkpointed(max_states=0), "max_states=0 must be at least 1"),
        (lambda: truncated(-1), "num_steps=-1 must be at least 0"),
    ],
)
def test_wrong_counts_are_refused(make: Callable[[], Memory], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("case", ["svgd free", "mean_field", "platipus"])
def test_chunks_add_up_to_the_whole_batch(case: str, size: int) -> None:
    """Random draws included, which every task shares, and where the generator ends."""
    adapter, objective, params, views = prepare(case)
    results = []
    for chunk_size in (None, size):
        sizes: list[int] = []

        def watched(params: Tensors, views: Views, *weights: Tensor, sizes: list[int] = sizes) -> MetaGradient:
            sizes.append(len(views[0].data["y"]))
            return meta_gradient(adapter, objective, KNOWN, params, views, *weights)

        with seeded(3, torch.device("cpu")):
            results.append((in_chunks(watched, chunk_size)(params, views), torch.rand(())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-13)
    assert set(sizes) == {-(-3 // -(-3 // size))}


def test_a_chunk_has_at_least_one_task() -> None:
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        in_chunks(meta_gradient, 0)
