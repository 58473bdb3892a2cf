"""Compiled meta-gradients: those of the eager loop and of finite differences, compiled once, and never a wrong one."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl import compiled_gradient
from bmaml_ppl.adaptation import Adapter
from bmaml_ppl.compile import CompileFailed, Mode, Recorded, lower
from bmaml_ppl.compiled_gradient import CompiledGradient, make_gradient
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import laplace, map_estimate, mean_field, platipus, svgd
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.objectives import Objective, chaser, elbo, evidence, marginal_nll, platipus_loss, query_nll
from bmaml_ppl.outer import MetaGradient, Views, equal_weights, meta_gradient
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, Start
from tests.test_outer import KNOWN
from tests.toys import bind, finite_differences, level, level_tasks, line, line_tasks, views_of

TASKS = {"level": level_tasks(3, 5), "line": line_tasks(3, 5)}
MODELS: dict[str, Any] = {"level": level, "line": line}
MAML = map_estimate(num_particles=2, num_steps=2, step_size=0.05, preconditioner="none", gradient="unrolled")

Case = tuple[str, Inference, Start, Objective, int, str]
# Model, inference, start, objective, the most operations that are compiled as a whole, what is to run.
CASES: dict[str, Case] = {
    "maml": ("line", MAML, "free", query_nll("mean"), 5000, "compiled as a whole"),
    "chaser": (
        "line",
        svgd(num_particles=3, num_steps=2, preconditioner="none", structure="joint", bandwidth=2.0),
        "free",
        chaser(2),
        0,
        "compiled",
    ),
    "whitened": ("level", svgd(num_particles=4, num_steps=1), "prior", query_nll(), 5000, "compiled as a whole"),
    "marginal": ("level", svgd(num_particles=4, num_steps=1), "prior", marginal_nll(), 0, "compiled"),
    "laplace": ("level", laplace(num_steps=1, gradient="unrolled"), "prior", evidence(), 9000, "compiled as a whole"),
    "mean field": (
        "level",
        mean_field(num_particles=2, num_steps=1, noise="fresh"),
        "prior",
        elbo(),
        5000,
        "compiled as a whole",
    ),
    "platipus": (
        "level",
        platipus(num_particles=2, num_steps=1),
        "prior",
        platipus_loss(),
        5000,
        "compiled as a whole",
    ),
}


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


def prepare(case: str) -> tuple[Adapter, Objective, dict[str, Tensor], Views]:
    name, inference, start, objective, _, _ = CASES[case]
    tasks = TASKS[name]
    tasks = tasks.to(dtype=torch.float64)
    adapter = bind(MODELS[name], tasks, inference, start)
    generator = torch.Generator().manual_seed(0)
    params = {k: v.double() for k, v in {**adapter.density.prior, **inference.parameters(adapter.density.dim)}.items()}
    if start == "free":
        shape = (inference.num_particles, adapter.density.dim)
        params["particles"] = torch.randn(shape, generator=generator)
    return replace(adapter, mode="compiled"), objective, params, views_of(tasks, 3)


def draw(gradient: Callable[..., MetaGradient], params: dict[str, Tensor], views: Views) -> MetaGradient:
    with seeded(3, torch.device("cpu")):
        return gradient(params, views)


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_eager_and_finite_differences(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    most, how = CASES[case][4:]
    monkeypatch.setattr(compiled_gradient, "_MOST_NODES", most)
    adapter, objective, params, views = prepare(case)
    compiled = CompiledGradient(adapter, objective, KNOWN)
    eager = make_gradient(replace(adapter, mode="eager"), objective, KNOWN)
    found, wanted = draw(compiled, params, views), draw(eager, params, views)
    assert compiled.how == how
    torch.testing.assert_close(found._asdict(), wanted._asdict(), rtol=1e-8, atol=1e-10)
    if case in ("marginal", "chaser"):  # Fisher's identity, and a leader that is held fixed: no gradient of the value
        return
    for name, value in params.items():

        def loss(moved: Tensor, name: str = name) -> Tensor:
            return draw(eager, {**params, name: moved}, views).loss

        torch.testing.assert_close(found.gradients[name], finite_differences(loss, value), rtol=2e-5, atol=2e-6)


def test_neither_more_steps_nor_other_numbers_compile_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def spy(graph: Any, given: list[Tensor]) -> Any:
        calls.append(len(given))
        return lower(graph, given)

    monkeypatch.setattr("bmaml_ppl.compile.lower", spy)
    adapter, _, params, views = prepare("chaser")
    with torch.no_grad():
        for steps in (2, 3, 7):
            moved = {name: value + steps for name, value in params.items()}
            found = adapter.adapt(moved, views[0], steps).particles
            eager = replace(adapter, mode="eager").adapt(moved, views[0], steps).particles
            torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-9)
    assert len(calls) == 2  # the first step, whose start tasks share, and every other


def broken(graph: Any, given: list[Tensor]) -> Any:
    raise RuntimeError("no C++ compiler\nand more")


def test_what_cannot_be_compiled_runs_as_recorded_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmaml_ppl.compile.lower", broken)
    monkeypatch.setattr(compiled_gradient, "lower", broken)
    adapter, objective, params, views = prepare("chaser")
    compiled = CompiledGradient(adapter, objective, KNOWN)
    with pytest.warns(CompileFailed, match="runs slower, as it was recorded.*no C\\+\\+ compiler") as caught:
        found = draw(compiled, params, views)
    assert len(caught) == 1
    assert compiled.how == "recorded"
    wanted = draw(make_gradient(replace(adapter, mode="eager"), objective, KNOWN), params, views)
    torch.testing.assert_close(found._asdict(), wanted._asdict())


@pytest.mark.parametrize("factor", [1.01, math.nan])
@pytest.mark.parametrize("most", [0, 5000], ids=["by steps", "whole"])
def test_a_wrong_gradient_is_never_used(most: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(graph: Any, given: list[Tensor]) -> Any:
        return lambda *values: [factor * x if x.is_floating_point() else x for x in graph(*values)]

    monkeypatch.setattr("bmaml_ppl.compile.lower", off)
    monkeypatch.setattr(compiled_gradient, "lower", off)
    monkeypatch.setattr(compiled_gradient, "_MOST_NODES", most)
    adapter, objective, params, views = prepare("maml")
    compiled = CompiledGradient(adapter, objective, KNOWN)
    with pytest.warns(CompileFailed, match="what was compiled.* differs by ([0-9.]+e-0[23]|inf)"):
        found = draw(compiled, params, views)
    assert compiled.how == "recorded"
    wanted = meta_gradient(replace(adapter, mode="eager"), objective, KNOWN, params, views)
    torch.testing.assert_close(found._asdict(), wanted._asdict())


def test_a_wrong_slope_of_a_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(graph: Any, given: list[Tensor]) -> Any:
        return lambda *values: [
            x + 0.1 * (x - x.detach()) if x.is_floating_point() else x for x in graph(*values)
        ]  # the same values

    monkeypatch.setattr("bmaml_ppl.compile.lower", off)
    monkeypatch.setattr(compiled_gradient, "_MOST_NODES", 0)
    adapter, objective, params, views = prepare("maml")
    compiled = CompiledGradient(adapter, objective, KNOWN)
    with pytest.warns(CompileFailed, match="what was compiled differs by [0-9.]+e-02"):
        draw(compiled, params, views)
    assert compiled.how == "recorded"


@pytest.mark.parametrize(
    ("compiled_by", "eager_by", "how"), [(0.3, 0.2, "compiled"), (0.3, 0.05, "recorded"), (0.9, 0.8, "recorded")]
)
@pytest.mark.filterwarnings("ignore::bmaml_ppl.compile.CompileFailed")
def test_a_long_adaptation_may_differ_as_eager_and_recorded_do(
    compiled_by: float, eager_by: float, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = iter([compiled_by, eager_by])
    monkeypatch.setattr(compiled_gradient, "_compare", lambda found, wanted: next(apart))
    monkeypatch.setattr(compiled_gradient, "_MOST_NODES", 0)
    adapter, objective, params, views = prepare("maml")
    compiled = CompiledGradient(adapter, objective, KNOWN)
    draw(compiled, params, views)
    assert compiled.how == how


def test_short_runs_compile_short_programs_as_a_whole() -> None:
    adapter, objective, *_ = prepare("maml")
    limits = [CompiledGradient(adapter, objective, KNOWN, calls).most_nodes for calls in (10, 8000, 10**6, None)]
    assert limits == [5000, 8000, 12_000, 12_000]


def test_compiled_draws_are_those_of_the_recording() -> None:
    def step(x: Tensor) -> list[Tensor]:
        return [x + torch.randn(3), torch.rand(2) * x[:2]]

    x = torch.arange(3.0)
    results = []
    modes: tuple[Mode, ...] = ("recorded", "compiled")
    for mode in modes:
        function = Recorded(step, mode)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            results.append([*function(x), *function(x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[1][0], results[1][2])


def test_meta_learning_compiled_is_meta_learning(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = level_tasks(8, 6)
    inference = svgd(num_particles=3, num_steps=2, bandwidth=1.0)
    priors = [
        meta_learn(level, tasks, num_support=3, inference=inference, num_steps=4, compile=compile, progress=compile)
        for compile in (True, False)
    ]
    for name, value in priors[0].params.items():
        torch.testing.assert_close(value, priors[1].params[name], rtol=1e-6, atol=1e-6)
    assert "compiling, once" in capsys.readouterr().err


def frozen(x: Tensor, y: Tensor | None = None) -> None:
    """A model whose noise scale is to be learned through the prior alone."""
    scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
    with torch.no_grad():
        fixed = 1.0 * scale
    level = pyro.sample("level", dist.Normal(0.0, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(level, fixed), obs=y)


def test_a_model_whose_gradient_cannot_be_recorded_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmaml_ppl.compile._WORTH_RECORDING", 3)
    run = partial(meta_learn, frozen, level_tasks(8, 6), num_support=3, inference=svgd(num_particles=3, num_steps=1))
    eager = run(num_steps=3, compile=False, progress=False)
    with pytest.warns(UserWarning, match=r"torch.no_grad\(\).*write .detach\(\)"):
        other = run(num_steps=3, compile="auto", progress=False)
    assert torch.equal(eager.params["scale"], other.params["scale"])


def test_tasks_of_whole_numbers_alone_have_weights() -> None:
    tasks = Tasks({"y": torch.tensor([[1, 2, 3, 0], [0, 1, 0, 2]])}, outputs=("y",))
    torch.testing.assert_close(equal_weights(views_of(tasks, 2)), torch.tensor([0.5, 0.5]))


def test_models_that_can_be_recorded_are() -> None:
    for case in CASES:
        adapter, objective, params, views = prepare(case)
        recorded = make_gradient(replace(adapter, mode="recorded"), objective, KNOWN)
        eager = make_gradient(replace(adapter, mode="eager"), objective, KNOWN)
        found, wanted = draw(recorded, params, views), draw(eager, params, views)  # a warning would be an error
        torch.testing.assert_close(found._asdict(), wanted._asdict(), rtol=1e-8, atol=1e-10)
