"""Pyro guides made from adapted tasks: particles, Gaussians, or any distribution of unconstrained latents."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.bijections import bijection
from bmaml_ppl.density import Density
from bmaml_ppl.handlers import Sites, execute
from bmaml_ppl.inference.particles import silverman_width
from bmaml_ppl.types import Tensors

__all__ = ["particle_guide", "posterior_guide", "sample_sites"]

Guide = Callable[..., dict[str, Tensor]]


def particle_guide(density: Density, params: Tensors, particles: Tensor, data: Mapping[str, Tensor]) -> Guide:
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
    return posterior_guide(density, params, particles[0] if mixture is None else mixture, data)


def posterior_guide(density: Density, params: Tensors, posterior: Any, data: Mapping[str, Tensor]) -> Guide:
    """A guide for the user's model that draws from a distribution of its unconstrained latents.

    Args:
        density: Log density of the task.
        params: Meta-parameters.
        posterior: A Pyro distribution of z, of event shape (D,), or a point, (D,).
        data: The task's data in the model's units; supports may depend on it.

    Returns:
        A Pyro guide; it accepts and ignores the model's arguments and returns the latent values.
    """

    def guide(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return sample_sites(density, params, posterior, data)

    return guide


def sample_sites(density: Density, params: Tensors, posterior: Any, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sample statements of a guide: an auxiliary site "_z", and every latent site at its value, in its plates.

    Args:
        density: Log density of the task.
        params: Meta-parameters.
        posterior: A Pyro distribution of z, of event shape (D,), or a point, (D,).
        data: The task's data.

    Returns:
        Latent site -> its value.
    """
    is_point = isinstance(posterior, Tensor)
    z = posterior if is_point else pyro.sample("_z", posterior, infer={"is_auxiliary": True})
    values, log_dets, places = _constrain_batch(density, z, params, data)
    found: dict[str, Tensor] = {}
    plates: dict[str, Any] = {}
    for name, value in values.items():
        event_dim = len(density.sites[name].shape) - places[name].rank
        fn = dist.Delta(value, log_density=0.0 if is_point else -log_dets[name], event_dim=event_dim)
        with ExitStack() as stack:
            for frame in places[name].frames:
                if frame.name not in plates:
                    plates[frame.name] = pyro.plate(frame.name, frame.size, dim=frame.dim)
                stack.enter_context(plates[frame.name])
            found[name] = pyro.sample(name, fn)
    return found


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


class _Place(NamedTuple):
    """Where in the model a latent site stands.

    Attributes:
        frames: Vectorised plates around it.
        rank: Dimensions of its batch shape; 0 outside plates, where all of a value is one event.
    """

    frames: tuple[Any, ...]
    rank: int


class _Placed(Sites):
    """Assigns latent sites and keeps their places."""

    def __init__(self, assign: Callable[[str, Any], Tensor]) -> None:
        super().__init__(assign, log_prob=False)
        self.places: dict[str, _Place] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        super()._pyro_post_sample(msg)
        if msg["name"] not in self.records:  # a plate inside another
            return
        frames = tuple(frame for frame in msg["cond_indep_stack"] if frame.vectorized)
        self.places[msg["name"]] = _Place(frames, len(msg["fn"].batch_shape) if frames else 0)


_Constrained = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, _Place]]


def _constrain_batch(density: Density, z: Tensor, params: Tensors, data: Mapping[str, Tensor]) -> _Constrained:
    """`_constrain` of z, (..., D): each value gets the leading dimensions, as Pyro's vectorised plates give them."""
    if z.dim() == 1:
        return _constrain(density, z, params, data)
    places: dict[str, _Place] = {}

    def constrain(row: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values, log_dets, found = _constrain(density, row, params, data)
        places.update(found)
        return values, log_dets

    values, log_dets = vmap(constrain)(z.reshape(-1, z.shape[-1]))
    for name in values:
        outer = _outer_shape(z.shape[:-1], places[name].rank, name)
        for part in (values, log_dets):
            part[name] = part[name].reshape(outer + part[name].shape[1:])
    return values, log_dets, places


def _outer_shape(lead: torch.Size, rank: int, name: str) -> torch.Size:
    """The dimensions of `lead` that lie outside a site's own plates, which must not be in use within them."""
    outer = lead[: max(len(lead) - rank, 0)]
    if len(lead) < rank or lead[len(outer) :].numel() != 1:
        raise ValueError(
            f"latent site {name!r} has {rank} plate dimensions of its own, and the guide is called in plates of shape "
            f"{tuple(lead)}; give the plates around the guide dimensions to the left, such as dim={-rank - 1}"
        )
    return outer


def _constrain(density: Density, z: Tensor, params: Tensors, data: Mapping[str, Tensor]) -> _Constrained:
    """Every latent's value at z, (D,), the log-Jacobian of its transform, as this run's supports have it, and place."""
    values: dict[str, Tensor] = {}
    log_dets: dict[str, Tensor] = {}

    def assign(name: str, fn: Any) -> Tensor:
        site = density.sites[name]
        unconstrained = z[site.slice].reshape(site.unconstrained_shape)
        transform = bijection(fn.support)
        values[name] = transform(unconstrained)
        log_dets[name] = transform.log_abs_det_jacobian(unconstrained, values[name])
        return values[name]

    run = _Placed(assign)
    execute(density.model, params, data, run, networks=bool(density.networks))
    for name, log_det in log_dets.items():
        log_dets[name] = sum_rightmost(log_det, log_det.dim() - run.places[name].rank)
    return values, log_dets, {name: run.places[name] for name in values}
