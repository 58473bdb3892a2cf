"""Gaussians over unconstrained latents whose covariance is never needed whole, as Pyro distributions."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from bmaml_ppl.inference.laplace import log_mass
from bmaml_ppl.inference.precision import mahalanobis

__all__ = ["PrecisionNormal", "gaussian_mixture"]


class PrecisionNormal(dist.TorchDistribution):
    """N(loc, H^-1) with H in one of the forms of `bmaml_ppl.inference.precision`.

    Args:
        loc: Mean, (D,), or (M, D) for a batch of M.
        precision: H; with a leading M on every tensor for a batch.
        lead: Dimensions in front of the batch's, along which independent draws are wanted.
        validate_args: As for every Pyro distribution.
    """

    arg_constraints = {"loc": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, precision: Any, lead: torch.Size = torch.Size(), validate_args: bool | None = None
    ) -> None:
        self.loc, self.precision, self._lead = loc.expand(lead + loc.shape), precision, lead
        self._base = loc
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PrecisionNormal":
        """The same with more dimensions in front."""
        inner, batch_shape = self._base.shape[:-1], torch.Size(batch_shape)
        lead = batch_shape[: len(batch_shape) - len(inner)]
        if lead + inner != batch_shape:
            raise ValueError(f"a batch of shape {tuple(inner)} cannot be expanded to {tuple(batch_shape)}")
        return PrecisionNormal(self._base, self.precision, lead, validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws, differentiable in the mean and the precision."""
        shape = torch.Size(sample_shape) + self._batch_shape + (self.precision.noise_dim,)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self._base + self._map(lambda one, row: one.colour(row), noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, (...)."""
        dim = self.loc.shape[-1]
        squared = self._map(mahalanobis, value - self.loc)
        log_two_pi = torch.log(squared.new_tensor(2 * torch.pi))
        return 0.5 * (self._once(lambda one: one.log_det()).to(squared) - squared - dim * log_two_pi)

    @property
    def mean(self) -> Tensor:
        """(..., D)."""
        return self.loc

    @property
    def covariance_matrix(self) -> Tensor:
        """H^-1, (..., D, D); made when asked for."""
        eye = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        covariance = self._once(lambda one: vmap(one.solve)(eye))
        return covariance.expand(self._lead + covariance.shape)

    @property
    def variance(self) -> Tensor:
        """Diagonal of H^-1, (..., D)."""
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1)

    def _once(self, function: Callable[[Any], Tensor]) -> Tensor:
        """A function of one precision, for each of the batch."""
        result: Tensor = vmap(function)(self.precision) if self._base.dim() == 2 else function(self.precision)
        return result

    def _map(self, function: Callable[[Any, Tensor], Tensor], rows: Tensor) -> Tensor:
        """A function of one precision and one row, (D,), for rows of shape (..., D)."""
        inner = self._base.dim()
        lead = rows.shape[:-inner]
        if inner == 2:
            result = vmap(lambda row: vmap(function)(self.precision, row))(rows.reshape(-1, *rows.shape[-2:]))
        else:
            result = vmap(lambda row: function(self.precision, row))(rows.reshape(-1, rows.shape[-1]))
        return result.reshape(lead + result.shape[1:])


def gaussian_mixture(state: Any) -> Any:
    """The distribution that an adapted state with precisions stands for: a Gaussian, or a mixture of one a mode.

    Args:
        state: Of one task, as `bmaml_ppl.inference.laplace` leaves it.
    """
    modes = state.particles
    if len(modes) == 1:
        return PrecisionNormal(modes[0], tree_map(lambda value: value[0], state.precision))
    weights = dist.Categorical(logits=log_mass(state))
    return dist.MixtureSameFamily(weights, PrecisionNormal(modes, state.precision))
