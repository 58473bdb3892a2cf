"""A Pyro guide made from particles."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.bijections import bijection
from bmaml_ppl.density import Density
from bmaml_ppl.handlers import Sites, execute
from bmaml_ppl.inference.particles import silverman_width
from bmaml_ppl.types import Tensors

__all__ = ["particle_guide"]


def particle_guide(
    density: Density, params: Tensors, particles: Tensor, data: Mapping[str, Tensor]
) -> Callable[..., dict[str, Tensor]]:
    """A guide for the user's model that draws from a smooth mixture around equally weighted particles.

    Components are Gaussian in unconstrained coordinates and shrunk toward their mean so that the mixture
    keeps the particles' covariance: with more than D + 1 particles it is what `smooth_resample` draws from.
    One particle, or particles that all coincide, is a point mass.

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
        values, log_dets = _constrain_batch(density, z, params, data)
        for name, value in values.items():
            log_density = -log_dets[name] if mixture is not None else 0.0
            event_dim = value.dim() - (z.dim() - 1)
            values[name] = pyro.sample(name, dist.Delta(value, log_density=log_density, event_dim=event_dim))
        return values

    return guide


def _shrunk_mixture(particles: Tensor) -> Any:
    num, dim = particles.shape
    if num == 1:
        return None
    centred = particles - particles.mean(0)
    covariance = centred.T @ centred / (num - 1)
    variance = covariance.diagonal()
    if not bool(variance.any()):
        return None
    width = silverman_width(num, dim)
    loc = particles.mean(0) + ((1 - width**2) * num / (num - 1)) ** 0.5 * centred
    jitter = torch.diag(1e-6 * variance.maximum(1e-6 * variance.mean()))
    scale_tril = torch.linalg.cholesky(width**2 * (covariance + jitter))
    weights = dist.Categorical(logits=particles.new_zeros(num))
    return dist.MixtureSameFamily(weights, dist.MultivariateNormal(loc, scale_tril=scale_tril.expand(num, dim, dim)))


def _constrain_batch(
    density: Density, z: Tensor, params: Tensors, data: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`_constrain` of z, (..., D): each value gets the leading dimensions, as Pyro's vectorised plates give them."""
    if z.dim() == 1:
        return _constrain(density, z, params, data)
    lead = z.shape[:-1]
    rows = z.reshape(-1, z.shape[-1])
    values, log_dets = vmap(lambda row: _constrain(density, row, params, data))(rows)
    if plated := [name for name, rank in _plate_ranks(density, params, data).items() if rank]:
        raise NotImplementedError(
            f"latent site {plated[0]!r} is in a plate, where draws cannot be vectorised; write "
            "Predictive(..., parallel=False), or one vectorised site with .to_event(1) instead of the plate"
        )
    return (
        {name: value.reshape(lead + value.shape[1:]) for name, value in values.items()},
        {name: log_det.reshape(lead) for name, log_det in log_dets.items()},
    )


def _constrain(
    density: Density, z: Tensor, params: Tensors, data: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every latent's value at z, (D,), and the log-Jacobian of its transform, as this run's supports have it."""
    values, log_dets = {}, {}

    def assign(name: str, fn: Any) -> Tensor:
        site = density.sites[name]
        unconstrained = z[site.slice].reshape(site.unconstrained_shape)
        transform = bijection(fn.support)
        values[name] = transform(unconstrained)
        log_dets[name] = transform.log_abs_det_jacobian(unconstrained, values[name]).sum()
        return values[name]

    execute(density.model, params, data, Sites(assign, log_prob=False), networks=bool(density.networks))
    return values, log_dets


def _plate_ranks(density: Density, params: Tensors, data: Mapping[str, Tensor]) -> dict[str, int]:
    """How many plates each latent site is in."""
    run = density.observe(next(iter(params.values()), torch.zeros(())).new_zeros(density.dim), params, data)
    return {name: len(run[name].plates) for name in density.sites}
