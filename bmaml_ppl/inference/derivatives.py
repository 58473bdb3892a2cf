"""Scores and curvature of a task's log density at every particle, exact or first-order."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from bmaml_ppl.types import LogDensity

__all__ = ["FirstOrder", "curvature_factor", "equilibrate", "exact_density", "hessians", "safe_fraction", "scores"]


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


def exact_density(log_density: LogDensity) -> LogDensity:
    """The log density without stop-gradients."""
    return log_density.exact if isinstance(log_density, FirstOrder) else log_density


def scores(log_density: LogDensity, particles: Tensor) -> Tensor:
    """Gradient of the log density at each particle: (M, D) -> (M, D)."""
    return vmap(grad(log_density))(particles)


def hessians(log_density: LogDensity, particles: Tensor) -> Tensor:
    """Hessian of the log density at each particle: (M, D) -> (M, D, D).

    Reverse over reverse: forward mode makes symbolic zeros, which crash torch when they are recorded.
    """
    if isinstance(log_density, FirstOrder):
        return vmap(jacrev(grad(log_density.exact)))(particles.detach()).detach()
    return vmap(jacrev(grad(log_density)))(particles)


def curvature_factor(negative_hessian: Tensor, floor: float = 1e-3) -> Tensor:
    """Cholesky factor of a negative Hessian, shifted to be positive definite where it is not.

    The shift is a multiple of I in coordinates of equal curvature, so that a latent known a thousand times
    better than another does not hide it. It turns the smallest eigenvalue there into its absolute value, and into
    at least `floor`: a step along a direction that curves upward is as long as its curvature says instead of
    unbounded. It is itself differentiable.

    Args:
        negative_hessian: (..., D, D).
        floor: Smallest eigenvalue, relative to the largest curvature of each coordinate.

    Returns:
        Lower factor L, (..., D, D), with L L^T = negative_hessian where that has no eigenvalue below the floor.

    References:
        Dauphin et al. (2014), Identifying and attacking the saddle point problem, for the absolute value; Ruiz
        (2001), A scaling algorithm to equilibrate both rows and columns norms in matrices.
    """
    scale = equilibrate(negative_hessian)
    scaled = scale.unsqueeze(-1) * negative_hessian * scale.unsqueeze(-2)
    # The eigenvalue routine raises at NaN, which is to reach the outer loop's own check instead.
    smallest = torch.linalg.eigvalsh(torch.nan_to_num(scaled))[..., 0]
    shift = torch.relu(floor - smallest) + torch.relu(-smallest)
    eye = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    return torch.linalg.cholesky_ex(scaled + shift[..., None, None] * eye).L / scale.unsqueeze(-1)


def equilibrate(matrix: Tensor, largest: float = 1e4, num_sweeps: int = 4) -> Tensor:
    """Scales s, (..., D), with which the largest entry of each row of s_i |A_ij| s_j is about 1.

    They differ by at most a factor `largest` from the one of the largest row, so that flat rows stay bounded.
    """
    size = matrix.abs()
    smallest = size.amax((-2, -1)).clamp_min(1e-12).rsqrt().unsqueeze(-1)
    scale = smallest.expand(matrix.shape[:-1])
    for _ in range(num_sweeps):
        rows = (scale.unsqueeze(-1) * size * scale.unsqueeze(-2)).amax(-1)
        scale = torch.minimum(scale * rows.clamp_min(1e-8).rsqrt(), largest * smallest)
    return scale


def safe_fraction(
    log_density: LogDensity, particles: Tensor, move: Tensor, slack: float, num_fractions: int = 4
) -> Tensor:
    """How much of a move each particle may take: the largest of 1, 1/4, 1/16, ..., 0 that loses at most `slack` nats.

    Newton's step is exact for a quadratic and can be absurdly long where the log density is not one.

    Args:
        log_density: Of one particle.
        particles: (M, D).
        move: (M, D).
        slack: Nats; a particle stays where it is in this step if every other fraction loses more, or leads to
            a log density that is not finite.
        num_fractions: How many before 0. A particle that takes none stays for ever where steps are deterministic.

    Returns:
        Fractions without gradient, (M, 1).
    """
    exact = exact_density(log_density)
    powers = torch.arange(num_fractions + 1, device=move.device)
    fractions = torch.where(powers < num_fractions, 0.25 ** powers.to(move), 0.0)
    values = vmap(vmap(exact))((particles + fractions[:, None, None] * move).detach())
    fine = values.isfinite() & (values >= values[-1] - slack)
    fine = torch.cat([fine[:-1], torch.ones_like(fine[-1:])])
    return fractions[fine.to(torch.uint8).argmax(0)].detach().unsqueeze(-1)
