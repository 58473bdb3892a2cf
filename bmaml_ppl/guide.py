"""A Pyro guide made from particles."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from bmaml_ppl.density import Density
from bmaml_ppl.types import Tensors

__all__ = ["particle_guide"]


def particle_guide(
    density: Density, params: Tensors, particles: Tensor, data: Mapping[str, Tensor]
) -> Callable[..., dict[str, Tensor]]:
    """A guide for the user's model that draws from a smooth mixture around equally weighted particles.

    Components are Gaussian in unconstrained coordinates and shrunk toward their mean so that the mixture
    keeps the particles' covariance. One particle, or particles that all coincide, is a point mass.

    Args:
        density: Log density of the task.
        params: Meta-parameters.
        particles: (M, D).
        data: The task's data in the model's units; supports may depend on it.

    Returns:
        A Pyro guide; it accepts and ignores the model's arguments and returns the latent values.

    Reference:
        Liu and West (2001), Combined parameter and state estimation in simulation-based filtering, section
        10.3.2, for the shrinkage.
    """
    mixture = _shrunk_mixture(particles.detach())

    def guide(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if mixture is None:
            z = particles[0]
        else:
            z = pyro.sample("_z", mixture, infer={"is_auxiliary": True})
        values = density.constrain(z, params, data)
        for name, site in density.sites.items():
            log_density = _log_det(site.support, z[site.slice].reshape(site.unconstrained_shape), values[name])
            point = dist.Delta(values[name], log_density=log_density if mixture else 0.0, event_dim=values[name].dim())
            values[name] = pyro.sample(name, point)
        return values

    return guide


def _shrunk_mixture(particles: Tensor) -> Any:
    num, dim = particles.shape
    if num == 1:
        return None
    centred = particles - particles.mean(0)
    covariance = centred.T @ centred / num
    jitter = 1e-6 * covariance.diagonal().mean()
    if jitter == 0:
        return None
    width = (4 / (num * (dim + 2))) ** (1 / (dim + 4))
    width = min(width, 0.9)
    loc = particles.mean(0) + (1 - width**2) ** 0.5 * centred
    eye = torch.eye(dim, dtype=particles.dtype, device=particles.device)
    scale_tril = torch.linalg.cholesky(width**2 * (covariance + jitter * eye))
    weights = dist.Categorical(logits=particles.new_zeros(num))
    return dist.MixtureSameFamily(weights, dist.MultivariateNormal(loc, scale_tril=scale_tril.expand(num, dim, dim)))


def _log_det(support: Any, unconstrained: Tensor, value: Tensor) -> Tensor:
    """Log density of a constrained value relative to its unconstrained one, a scalar."""
    return -biject_to(support).log_abs_det_jacobian(unconstrained, value).sum()
