"""Scores, Hessians and repaired curvature against autograd, finite differences and hand-made spectra."""

import math

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from bmaml_ppl.density import from_model
from bmaml_ppl.inference.derivatives import FirstOrder, curvature_factor, hessians, safe_fraction, scores
from bmaml_ppl.models import hierarchical_regression

F64 = torch.float64


def _density(z: Tensor) -> Tensor:
    """A banana: not Gaussian, not concave."""
    return -0.5 * z[0] ** 2 - 0.5 * (z[1] - z[0] ** 2) ** 2 + 0.1 * torch.sin(z).sum() - 0.1 * z.square().sum()


def test_scores_and_hessians_are_each_particles_own() -> None:
    z = torch.randn(4, 3, dtype=F64)
    for i, particle in enumerate(z):
        torch.testing.assert_close(scores(_density, z)[i], torch.autograd.functional.jacobian(_density, particle))
        torch.testing.assert_close(hessians(_density, z)[i], torch.autograd.functional.hessian(_density, particle))


def test_hessians_can_be_differentiated_in_float32() -> None:
    # torch.func.hessian (forward over reverse) fails here: "expected scalar type Double but found Float".
    data = {"x": torch.randn(5), "y": torch.randn(5)}
    density = from_model(hierarchical_regression((1, 2, 1)), data)

    def loss(z: Tensor) -> Tensor:
        return hessians(lambda z: density.log_joint(z, {}, data), z).square().sum()

    gradient = grad(loss)(torch.randn(3, density.dim))
    assert gradient.dtype == torch.float32
    assert torch.isfinite(gradient).all()


def test_first_order_has_exact_values_and_constant_derivatives() -> None:
    z = torch.randn(4, 3, dtype=F64)
    first = FirstOrder(_density)
    torch.testing.assert_close(scores(first, z), scores(_density, z))
    torch.testing.assert_close(hessians(first, z), hessians(_density, z))
    for derivative in (scores, hessians):
        gradient = grad(lambda z, f=derivative: f(first, z).square().sum())(z)
        assert torch.equal(gradient, torch.zeros_like(z))
        assert grad(lambda z, f=derivative: f(_density, z).square().sum())(z).abs().min() > 0


def _with_spectrum(values: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64, generator=generator))
    return basis @ torch.diag(torch.tensor(values, dtype=F64)) @ basis.T


def test_a_positive_definite_curvature_is_left_alone() -> None:
    curvature = _with_spectrum([0.5, 1.0, 3.0])
    torch.testing.assert_close(curvature_factor(curvature), torch.linalg.cholesky(curvature))


@pytest.mark.parametrize(
    "values", [[-2.0, 1.0, 3.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 1.0], [1e-12, 1.0, 2.0], [0.0, 0.0, 0.0]]
)
def test_an_indefinite_curvature_becomes_positive_definite(values: list[float]) -> None:
    factor = curvature_factor(_with_spectrum(values))
    repaired = factor @ factor.T
    assert torch.isfinite(factor).all()
    assert torch.linalg.eigvalsh(repaired)[0] > 0
    shift = repaired - _with_spectrum(values)
    assert shift.diagonal().min() > 0
    torch.testing.assert_close(shift, torch.diag(shift.diagonal()))


def test_a_diagonal_curvature_takes_its_absolute_value() -> None:
    repaired = curvature_factor(torch.diag(torch.tensor([-2.0, 2.0, -2.0], dtype=F64))).square()
    torch.testing.assert_close(repaired.diagonal(), torch.tensor([2.0, 6.0, 2.0], dtype=F64), rtol=1.1e-3, atol=0)


@pytest.mark.parametrize("ratio", [1e-4, 1e-2, 1e2, 1e3])
def test_units_of_a_coordinate_do_not_hide_another(ratio: float) -> None:
    # A posterior sd 10,000 times smaller than another's is no reason to repair.
    units = torch.tensor([1.0, ratio, 1.0], dtype=F64)
    curvature = units[:, None] * _with_spectrum([0.5, 1.0, 3.0]) * units
    factor = curvature_factor(curvature)
    torch.testing.assert_close(factor @ factor.T, curvature, rtol=1e-9, atol=0)


def test_a_curvature_that_is_no_number_does_not_raise() -> None:
    assert not torch.isfinite(curvature_factor(torch.full((20, 20), torch.nan))).any()


def test_moves_are_cut_where_they_lose_too_much() -> None:
    def density(z: Tensor) -> Tensor:
        return -z.square().sum()

    particles = torch.ones(4, 1, dtype=F64)
    move = torch.tensor([[-1.0], [7.0], [100.0], [1e6]], dtype=F64)
    fraction = safe_fraction(density, particles, move, slack=7.0)
    assert fraction[:, 0].tolist() == [1.0, 0.25, 1 / 64, 0.0]
    assert torch.equal(safe_fraction(FirstOrder(density), particles, move, slack=7.0), fraction)


@pytest.mark.parametrize("values", [[0.5, 1.0, 3.0], [-2.0, 1.0, 3.0], [-3.0, -2.0, -1.0], [1e-5, 1.0, 2.0]])
def test_gradient_of_the_factor_is_finite_differences(values: list[float]) -> None:
    curvature = _with_spectrum(values)

    def factor(lower: Tensor) -> Tensor:
        return curvature_factor(lower + lower.T - torch.diag(lower.diagonal()))

    assert torch.autograd.gradcheck(factor, curvature.tril().requires_grad_())


def test_batched_curvatures_are_repaired_one_by_one() -> None:
    stack = torch.stack([_with_spectrum([0.5, 1.0, 3.0]), _with_spectrum([-2.0, 1.0, 3.0])])
    expected = torch.stack([curvature_factor(c) for c in stack])
    torch.testing.assert_close(curvature_factor(stack), expected)
    torch.testing.assert_close(vmap(curvature_factor)(stack), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_move_to_where_the_density_is_not_finite(bad: float) -> None:
    def density(z: Tensor) -> Tensor:
        return torch.where(z.abs() > 2, bad, -z.square()).sum()

    particles = torch.ones(2, 1, dtype=F64)
    fraction = safe_fraction(density, particles, torch.tensor([[7.0], [1e6]], dtype=F64), slack=10.0)
    assert fraction[:, 0].tolist() == [1 / 16, 0.0]
    assert safe_fraction(lambda z: (z * torch.nan).sum(), particles, particles, slack=1.0).tolist() == [[0.0], [0.0]]
