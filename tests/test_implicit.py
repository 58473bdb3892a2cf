"""Gradients of an optimum, and the solver they take, on systems whose answers are known."""

import pytest
import torch
from torch import Tensor

from bmaml_ppl.implicit import conjugate_gradients, implicit_optimum

F64 = torch.float64


def _systems(*batch: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(*batch, size, size, dtype=F64, generator=generator)
    return root @ root.mT + 0.1 * torch.eye(size, dtype=F64), torch.randn(*batch, size, dtype=F64, generator=generator)


def _multiply(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def test_conjugate_gradients_solve_a_batch() -> None:
    matrix, target = _systems(3, 2)
    wanted = torch.linalg.solve(matrix, target)
    found = conjugate_gradients(lambda v: _multiply(matrix, v), target, lambda v: v)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    scale = matrix.diagonal(dim1=-2, dim2=-1)
    again = conjugate_gradients(lambda v: _multiply(matrix, v), target, lambda v: v / scale)
    torch.testing.assert_close(again, wanted, rtol=1e-9, atol=1e-9)


def test_a_perfect_preconditioner_takes_one_step_and_no_error_takes_none() -> None:
    matrix, target = _systems(3)
    products = 0

    def multiply(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return _multiply(matrix, v)

    found = conjugate_gradients(multiply, target, lambda v: torch.linalg.solve(matrix, v))
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-9, atol=1e-9)
    assert products <= 2
    nothing = conjugate_gradients(multiply, torch.zeros_like(target), lambda v: v)
    assert torch.equal(nothing, torch.zeros_like(target))
    assert products <= 2


def test_systems_that_are_done_wait_for_the_others() -> None:
    # The first is solved in one step, the last takes six; none of them is disturbed.
    matrix, target = _systems(1)
    matrix, target = torch.cat([torch.eye(6, dtype=F64)[None], matrix]), torch.cat([torch.ones(1, 6).to(F64), target])
    found = conjugate_gradients(lambda v: _multiply(matrix, v), target, lambda v: v)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-9, atol=1e-9)


def test_an_optimum_has_the_gradient_of_its_closed_form() -> None:
    # log p(z; t, s) = -s z^T A z / 2 + z . sin(t), with its optimum at A^-1 sin(t) / s.
    matrix, target = _systems(size=4)

    def closed(t: Tensor, s: Tensor) -> Tensor:
        return torch.linalg.solve(matrix, t.sin()) / s

    def implicit(t: Tensor, s: Tensor) -> Tensor:
        z = closed(t, s).detach()
        score = t.sin() - s * (matrix @ z)
        return implicit_optimum(z, score, lambda v: torch.linalg.solve(s.detach() * matrix, v))

    given = target.requires_grad_(), torch.tensor(1.7, dtype=F64, requires_grad=True)
    torch.testing.assert_close(implicit(*given), closed(*given))
    assert torch.autograd.gradcheck(implicit, given)
    weights = torch.arange(4, dtype=F64)
    for left, right in zip(*(torch.autograd.grad(f(*given) @ weights, given) for f in (implicit, closed)), strict=True):
        torch.testing.assert_close(left, right)


def test_no_gradient_reaches_the_optimum_by_itself() -> None:
    z = torch.ones(3, dtype=F64, requires_grad=True)
    theta = torch.zeros(3, dtype=F64, requires_grad=True)
    result = implicit_optimum(z, theta - z.detach(), lambda v: v)
    grads = torch.autograd.grad(result.sum(), (z, theta), allow_unused=True)
    assert grads[0] is None
    assert torch.equal(grads[1], torch.ones_like(theta))


@pytest.mark.parametrize("num_steps", [0, 1])
def test_steps_are_limited(num_steps: int) -> None:
    matrix, target = _systems()
    found = conjugate_gradients(lambda v: _multiply(matrix, v), target, lambda v: v, num_steps)
    size = (target @ target) / (target @ matrix @ target)
    torch.testing.assert_close(found, num_steps * size * target)
