"""Scores and curvature of a task's log density at every particle, exact or first-order."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

from bmaml_ppl.types import LogDensity

__all__ = ["FirstOrder", "curvature_factor", "hessians", "scores"]


@dataclass(frozen=True)
class FirstOrder:
    """A log density whose derivatives are constants to the outer gradient (first-order MAML).

    The stop-gradient lies on the score, never on the particles: an outer gradient still reaches the
    start through the identity part of every step.

    Attributes:
        exact: The log density itself.
    """

    exact: LogDensity

    def __call__(self, z: Tensor) -> Tensor:
        """A linear function of z, (D,), with the exact score as its constant slope."""
        return (grad(self.exact)(z.detach()).detach() * z).sum()


def scores(log_density: LogDensity, particles: Tensor) -> Tensor:
    """Gradient of the log density at each particle: (M, D) -> (M, D)."""
    return vmap(grad(log_density))(particles)


def hessians(log_density: LogDensity, particles: Tensor) -> Tensor:
    """Hessian of the log density at each particle: (M, D) -> (M, D, D)."""
    if isinstance(log_density, FirstOrder):
        return vmap(hessian(log_density.exact))(particles.detach()).detach()
    return vmap(hessian(log_density))(particles)


def curvature_factor(negative_hessian: Tensor, floor: float = 1e-3) -> Tensor:
    """Cholesky factor of a negative Hessian, shifted by a multiple of I where it is not positive definite.

    The shift makes the smallest eigenvalue at least `floor` times the mean absolute diagonal entry, and
    is itself differentiable.

    Args:
        negative_hessian: (..., D, D).
        floor: Smallest eigenvalue, relative to the mean absolute diagonal.

    Returns:
        Lower factor L with L L^T = negative_hessian + shift I, (..., D, D).
    """
    size = negative_hessian.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    smallest = torch.linalg.eigvalsh(negative_hessian)[..., 0]
    shift = torch.relu(floor * size + 1e-6 - smallest)
    eye = torch.eye(negative_hessian.shape[-1], dtype=negative_hessian.dtype, device=negative_hessian.device)
    return torch.linalg.cholesky_ex(negative_hessian + shift[..., None, None] * eye).L
