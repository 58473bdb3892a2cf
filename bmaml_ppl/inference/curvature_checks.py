"""What a curvature asks of a model, checked once on one task before anything is batched."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp

from bmaml_ppl.inference.curvature import (
    Curvature,
    Form,
    arrow_prior,
    few_coordinates,
    observation_slopes,
    observed_blocks,
    resolve_curvature,
)
from bmaml_ppl.types import LogDensity, SiteLayout, TaskLogDensity

__all__ = ["check_curvature"]


def check_curvature(
    log_density: LogDensity,
    z: Tensor,
    curvature: Curvature,
    form: Form = "auto",
    sites: Mapping[str, SiteLayout] | None = None,
) -> None:
    """Refuses a curvature that would be silently wrong for a model. Not under vmap: it looks at values.

    Args:
        log_density: Of one task.
        z: (D,), away from points of symmetry, where a dependence could vanish.
        curvature: As in `measure_curvature`.
        form: As in `measure_curvature`.
        sites: Layout of z; None is one site.

    Raises:
        ValueError: If the Fisher information of a parameter that depends on a latent is not known, or the prior of a
            large site is not independent in each coordinate where the curvature's form takes it to be.
    """
    few = few_coordinates(sites)
    curvature, form = resolve_curvature(log_density, len(z), curvature, form, len(few))
    if not hasattr(log_density, "observations"):
        return
    structured: Any = log_density
    if curvature in ("exact", "ggn"):
        _check_second_derivative(structured, z, curvature)
    if curvature == "exact":
        return
    if curvature in ("fisher", "diagonal", "kronecker"):
        _check_information(structured, z)
    if curvature in ("diagonal", "kronecker") or form == "dual":
        _check_independence(structured, z, few, sites, curvature)


def _check_second_derivative(log_density: TaskLogDensity, z: Tensor, curvature: Curvature) -> None:
    try:
        sites, slopes = log_density.observations(z), observation_slopes(log_density, z)
    except ValueError:  # a family that does not show its parameters has an exact Hessian all the same
        if curvature == "exact":
            return
        raise
    for name, site in sites.items():
        rows = site.weight > 0
        varies = (slopes[name] != 0).any(-1)[rows].any(0)
        moves = grad(lambda eta: site.log_prob(eta).sum())(site.eta)[rows][:, varies]  # noqa: B023
        if bool((moves != 0).any()) and not bool(observed_blocks(site)[rows][:, varies][:, :, varies].any()):
            raise ValueError(
                f"the log-likelihood of observed site {name!r} has no second derivative in its parameters, so that "
                f'curvature={curvature!r} would leave its data out; write curvature="fisher"'
            )


def _check_information(log_density: TaskLogDensity, z: Tensor) -> None:
    slopes = observation_slopes(log_density, z)
    for name, site in log_density.observations(z).items():
        site.information_root(site.eta)
        varies = (slopes[name] != 0).any(-1)[site.weight > 0].any(0).tolist()
        latent = [parameter for column, parameter in site.unknown_columns.items() if varies[column]]
        if latent:
            raise ValueError(
                f"the Fisher information of {latent[0]!r} at observed site {name!r} is not known, and {latent[0]!r} "
                'depends on a latent; write curvature="ggn" or "exact", or learn it with pyro.param'
            )


def _check_independence(
    log_density: TaskLogDensity,
    z: Tensor,
    few: list[int],
    sites: Mapping[str, SiteLayout] | None,
    curvature: Curvature,
) -> None:
    along = arrow_prior(log_density.log_prior, z, few).diagonal
    pull = vjp(grad(log_density.log_prior), z)[1]
    many = torch.ones_like(z)
    many[few] = 0
    generator = torch.Generator().manual_seed(0)
    direction = many * torch.randn(len(z), generator=generator, dtype=z.dtype).to(z.device)
    places = {name: slice(site.start, site.stop) for name, site in sites.items()} if sites else {"": slice(0, len(z))}
    for name, place in places.items():
        alone = torch.zeros_like(z)
        alone[place] = direction[place]
        product = -many * pull(alone)[0]
        excess = (product - along * alone).abs()
        if bool(excess.amax() > torch.finfo(z.dtype).eps ** 0.5 * torch.maximum(product, along * alone).abs().amax()):
            raise _dependent(name, curvature)


def _dependent(site: str, curvature: Curvature) -> ValueError:
    what = f"latent site {site!r}" if site else "the latent vector"
    if curvature in ("diagonal", "kronecker"):
        kept, instead = f"curvature={curvature!r}", 'curvature="fisher" with form="dense"'
    else:
        kept, instead = 'form="dual"', 'form="dense"'
    return ValueError(
        f"{kept} keeps one number a coordinate of the prior of large sites, and the coordinates of {what} depend on "
        f"each other or on another large site; write {instead}, or give the site independent coordinates and mix "
        "them in the model: pyro.deterministic(name, scale_tril @ z)"
    )
