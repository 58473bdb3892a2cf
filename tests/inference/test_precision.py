"""Every representation of a precision matrix against the matrix itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from bmaml_ppl.inference.curvature import Arrow, dual
from bmaml_ppl.inference.precision import Dense, Diagonal, Dual, Kronecker, mahalanobis

F64 = torch.float64
ROWS = 3


class Case(NamedTuple):
    """How a representation and its dense matrix are made from the same free numbers."""

    size: int
    build: Callable[[Tensor], tuple[Any, Tensor]]


def _dense(free: Tensor) -> tuple[Any, Tensor]:
    root = free.reshape(5, 5)
    matrix = root @ root.mT + torch.eye(5, dtype=F64)
    return Dense(torch.linalg.cholesky(matrix)), matrix


def _diagonal(free: Tensor) -> tuple[Any, Tensor]:
    return Diagonal(free.exp()), torch.diag(free.exp())


def _dual(free: Tensor) -> tuple[Any, Tensor]:
    diagonal, rows = free[:6].exp(), free[6:].reshape(ROWS, 6)
    return Dual.of(diagonal, rows), torch.diag(diagonal) + rows.mT @ rows


def _coupled(free: Tensor) -> tuple[Any, Tensor]:
    """Coordinates 1 and 4 of 6 couple to all others and to each other; rows see all of them."""
    few = [1, 4]
    many = torch.tensor([i not in few for i in range(6)])
    select = torch.eye(6, dtype=F64)[:, few]
    along = torch.where(many, free[:6].exp(), 0.0)
    couple = torch.where(many.unsqueeze(1), 0.3 * free[6:18].reshape(6, 2), 0.0)
    small = 4 * torch.eye(2, dtype=F64) + free[18] * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    rows = free[19:].reshape(ROWS, 6)
    matrix = torch.diag(along) + couple @ select.mT + select @ couple.mT + select @ small @ select.mT + rows.mT @ rows
    measured = dual(Arrow(along, select, couple, small), rows)
    assert measured.precision.schur.shape == (2, 2)
    return measured.precision, matrix


def _kronecker(free: Tensor) -> tuple[Any, Tensor]:
    parts = [part.reshape(n, n) for part, n in zip(free.split([4, 9, 4]), (2, 3, 2), strict=True)]
    a, b, c = (part @ part.mT + torch.eye(len(part), dtype=F64) for part in parts)
    one = torch.ones(1, 1, dtype=F64)
    factors = [torch.linalg.cholesky(m) for m in (a, b, c)]
    return Kronecker((factors[0], factors[2]), (factors[1], one)), torch.block_diag(torch.kron(a, b), c)


CASES = {
    "dense": Case(25, _dense),
    "diagonal": Case(5, _diagonal),
    "dual": Case(6 + ROWS * 6, _dual),
    "dual with coupled coordinates": Case(19 + ROWS * 6, _coupled),
    "kronecker": Case(17, _kronecker),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def _free(case: Case, *shape: int) -> Tensor:
    return torch.randn(*shape, case.size, dtype=F64, generator=torch.Generator().manual_seed(0))


def _colour_matrix(precision: Any) -> Tensor:
    """W with colour(noise) = W noise, (D, noise_dim)."""
    return jacrev(precision.colour)(torch.zeros(precision.noise_dim, dtype=F64))


def _close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)


@every_case
def test_multiply_solve_and_log_det_are_the_matrix(case: Case) -> None:
    precision, matrix = case.build(_free(case))
    v = torch.randn(len(matrix), dtype=F64)
    _close(precision.multiply(v), matrix @ v)
    _close(precision.solve(v), torch.linalg.solve(matrix, v))
    _close(precision.log_det(), torch.linalg.slogdet(matrix).logabsdet)
    _close(mahalanobis(precision, v), v @ matrix @ v)


@every_case
def test_coloured_noise_has_the_inverse_as_covariance(case: Case) -> None:
    precision, matrix = case.build(_free(case))
    noise = torch.randn(precision.noise_dim, dtype=F64)
    colour = _colour_matrix(precision)
    _close(precision.colour(noise), colour @ noise)
    _close(colour @ colour.mT, torch.linalg.inv(matrix))


@every_case
def test_batches_are_vmapped(case: Case) -> None:
    free = _free(case, 3)
    one, matrix = case.build(free[0])
    v, noise = torch.randn(3, len(matrix), dtype=F64), torch.randn(3, one.noise_dim, dtype=F64)

    def every(free: Tensor, v: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        precision, _ = case.build(free)
        return precision.multiply(v), precision.solve(v), precision.colour(noise), precision.log_det()

    together = vmap(every)(free, v, noise)
    for i in range(3):
        for batched, alone in zip(together, every(free[i], v[i], noise[i]), strict=True):
            _close(batched[i], alone)


@every_case
@pytest.mark.parametrize("what", ["multiply", "solve", "colour", "log_det"])
def test_gradients_are_finite_differences(case: Case, what: str) -> None:
    free = _free(case)
    one, matrix = case.build(free)
    v = torch.randn(one.noise_dim if what == "colour" else len(matrix), dtype=F64)

    def value(free: Tensor, v: Tensor) -> Tensor:
        method = getattr(case.build(free)[0], what)
        result: Tensor = method() if what == "log_det" else method(v)
        return result

    assert torch.autograd.gradcheck(value, (free.requires_grad_(), v.requires_grad_(what != "log_det")))


def test_no_rows_leave_the_diagonal() -> None:
    # A task with no observations, and the density of a site that none of them depends on.
    precision = Dual.of(torch.tensor([2.0, 3.0], dtype=F64), torch.zeros(0, 2, dtype=F64))
    v = torch.tensor([1.0, -1.0], dtype=F64)
    _close(precision.solve(v), v / torch.tensor([2.0, 3.0], dtype=F64))
    _close(precision.log_det(), torch.tensor(6.0, dtype=F64).log())
    colour = _colour_matrix(precision)
    _close(colour @ colour.mT, torch.diag(torch.tensor([0.5, 1 / 3], dtype=F64)))
