"""Bijections between unconstrained coordinates and supports, with their log-Jacobians."""

import math
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import ComposeTransform, ExpTransform, IndependentTransform, SoftplusTransform

from bmaml_ppl.bounded import Interval, StickBreaking

__all__ = ["bijection"]


def bijection(support: Any) -> Transform:
    """The bijection from unconstrained coordinates onto a support: `biject_to`, intervals and simplices with
    exact tails, and the triangular and positive definite matrices for which torch and Pyro have none.

    Args:
        support: A constraint.

    Raises:
        NotImplementedError: If there is none, for example onto a sphere or a discrete set.
    """
    if isinstance(support, constraints.independent):
        return IndependentTransform(bijection(support.base_constraint), support.reinterpreted_batch_ndims)
    if isinstance(support, _MIXTURE) and not _has_bounds(support.base_constraint):
        return bijection(support.base_constraint)
    if type(support) in _INTERVALS:
        return Interval(support.lower_bound, support.upper_bound)
    return _TRANSFORMS[type(support)] if type(support) in _TRANSFORMS else biject_to(support)


_MIXTURE = getattr(torch.distributions.constraints, "MixtureSameFamilyConstraint", ())


def _has_bounds(support: Any) -> bool:
    """Whether each component of a mixture may have a support of its own."""
    base = getattr(support, "base_constraint", support)
    return any(isinstance(value, Tensor) and value.ndim > 0 for value in vars(base).values())


class _LowerTriangular(Transform):
    """Vector of first the diagonal, then the rows below it -> lower triangular matrix.

    Args:
        diagonal: Bijection of the diagonal; None for a diagonal of ones, which takes no coordinates.
    """

    domain = constraints.independent(constraints.real, 1)
    codomain = constraints.lower_cholesky
    bijective = True

    def __init__(self, diagonal: Transform | None) -> None:
        super().__init__()
        self.diagonal = diagonal

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LowerTriangular) and self.diagonal == other.diagonal

    def _call(self, x: Tensor) -> Tensor:
        size = self._size(x.shape[-1])
        if self.diagonal is None:
            diagonal, below = x.new_ones(*x.shape[:-1], size), x
        else:
            diagonal, below = self.diagonal(x[..., :size]), x[..., size:]
        flat = x.new_zeros(*x.shape[:-1], size * size).index_add(-1, _places_below(size, x), below)
        return flat.unflatten(-1, (size, size)) + torch.diag_embed(diagonal)

    def _inverse(self, y: Tensor) -> Tensor:
        below = y.flatten(-2).index_select(-1, _places_below(y.shape[-1], y))
        if self.diagonal is None:
            return below
        return torch.cat([self.diagonal.inv(y.diagonal(dim1=-2, dim2=-1)), below], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-Jacobian of the n(n + 1)/2 free entries, of the batch shape."""
        if self.diagonal is None:
            return x.new_zeros(x.shape[:-1])
        log_dets: Tensor = self.diagonal.log_abs_det_jacobian(x[..., : y.shape[-1]], y.diagonal(dim1=-2, dim2=-1))
        return log_dets.sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        """(..., d) -> (..., n, n)."""
        size = self._size(shape[-1])
        return torch.Size([*shape[:-1], size, size])

    def inverse_shape(self, shape: Any) -> torch.Size:
        """(..., n, n) -> (..., d)."""
        size = shape[-1]
        return torch.Size([*shape[:-2], size * (size - 1) // 2 + (0 if self.diagonal is None else size)])

    def _size(self, dim: int) -> int:
        root = math.isqrt(1 + 8 * dim)
        return (root + 1) // 2 if self.diagonal is None else (root - 1) // 2


def _places_below(size: int, like: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(size, size, -1, device=like.device)
    return rows * size + columns


class _Gram(Transform):
    """Lower triangular matrix L with a positive diagonal -> positive definite L Lᵀ."""

    domain = constraints.lower_cholesky
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Gram)

    def _call(self, x: Tensor) -> Tensor:
        return x @ x.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.cholesky(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log of 2^n Π L_ii^(n + 1 - i), i = 1, ..., n, of the batch shape (Muirhead 1982, theorem 2.1.9)."""
        size = x.shape[-1]
        powers = torch.arange(size, 0, -1, dtype=x.dtype, device=x.device)
        return size * math.log(2) + (powers * x.diagonal(dim1=-2, dim2=-1).log()).sum(-1)


_CHOLESKY = _LowerTriangular(ExpTransform())
_POSITIVE_DEFINITE = ComposeTransform([_CHOLESKY, _Gram()])
_INTERVALS = {type(constraints.unit_interval), constraints.interval, constraints.half_open_interval}
_TRANSFORMS: dict[type, Transform] = {
    type(constraints.simplex): StickBreaking(),
    type(constraints.lower_cholesky): _CHOLESKY,
    type(constraints.softplus_lower_cholesky): _LowerTriangular(SoftplusTransform()),
    type(constraints.unit_lower_cholesky): _LowerTriangular(None),
    type(constraints.positive_definite): _POSITIVE_DEFINITE,
    type(constraints.positive_semidefinite): _POSITIVE_DEFINITE,
}
