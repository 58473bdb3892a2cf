"""Recording: the same numbers as the function, fresh draws, and a way out."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

from bmaml_ppl.compile import Recorded, choose_adapting, choose_mode


def test_a_recorded_function_returns_the_same_nested_result() -> None:
    def function(params: dict[str, Tensor], extra: tuple[Tensor, None]) -> tuple[dict[str, Tensor], Tensor]:
        gradient = grad(lambda p: (p["a"] ** 3).sum() * extra[0])(params)
        return gradient, params["a"].sum()

    recorded = Recorded(function)
    for a in (torch.arange(3.0), torch.ones(3), torch.ones(2)):
        torch.testing.assert_close(
            recorded({"a": a}, (torch.tensor(2.0), None)), function({"a": a}, (torch.tensor(2.0), None))
        )
    assert len(recorded.graphs) == 2


def test_random_draws_are_drawn_anew() -> None:
    recorded = Recorded(lambda x: x + torch.randn(4))
    torch.manual_seed(0)
    first, second = recorded(torch.zeros(4)), recorded(torch.zeros(4))
    assert not torch.equal(first, second)


def test_what_cannot_be_recorded_runs_eagerly_after_a_warning() -> None:
    def branching(x: Tensor) -> Tensor:
        return x + 1 if x.sum().item() > 0 else x - 1

    recorded = Recorded(branching)
    with pytest.warns(UserWarning, match="could not be recorded.*compile=False"):
        assert recorded(torch.ones(1)) == 2
    assert recorded(-torch.ones(1)) == -2


@pytest.mark.parametrize(
    ("compile", "steps", "inner", "wanted"),
    [
        ("auto", 10, 10, "eager"),
        ("auto", 100, 10, "recorded"),
        ("auto", 20_000, 0, "compiled"),
        ("auto", 2000, 10, "compiled"),
        ("auto", 1000, 10, "recorded"),
        (True, 1, 1, "compiled"),
        (False, 9999, 9, "eager"),
    ],
)
def test_auto_compiles_long_runs(compile: Any, steps: int, inner: int, wanted: str) -> None:
    assert choose_mode(compile, steps, inner) == wanted


@pytest.mark.parametrize(
    ("compile", "steps", "wanted"),
    [("auto", 1999, None), ("auto", 2000, "compiled"), (True, 1, "compiled"), (False, 9999, "eager")],
)
def test_auto_compiles_adaptations_of_many_parts(compile: Any, steps: int, wanted: str | None) -> None:
    assert choose_adapting(compile, steps) == wanted


def test_what_compile_may_be_is_said() -> None:
    with pytest.raises(ValueError, match="compile='always' is not known; choose \"auto\", True or False"):
        choose_adapting("always", 1)  # type: ignore[arg-type]


def test_interpreted_graphs_draw_and_compute_the_same() -> None:
    def step(x: Tensor, y: Tensor | None) -> list[Tensor]:
        return [x.sin() * torch.randn(3) + 1, x]

    plain, quick = Recorded(step), Recorded(step)
    plain.interpreted = False
    x = torch.arange(3.0, dtype=torch.float64)
    for _ in range(3):  # TorchScript optimises on its second run
        results = []
        for function in (plain, quick):
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(5)
                results.append(function(x, None))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not plain._programs
    (program,) = quick._programs.values()
    assert isinstance(program, torch.jit.ScriptModule)


def test_gradients_go_through_the_plain_graph() -> None:
    quick = Recorded(lambda x: [x.square()])
    x = torch.tensor(3.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(quick(x)[0], x)
    assert gradient == 6
    assert not quick._programs


def test_a_tensor_given_twice_is_two_arguments() -> None:
    recorded = Recorded(lambda a, b: a - 2 * b)
    zero = torch.zeros(())
    assert recorded(zero, zero) == 0
    assert recorded(torch.tensor(1.0), torch.tensor(3.0)) == -5
