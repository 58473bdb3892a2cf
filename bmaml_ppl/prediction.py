"""Predictive draws for a batch of tasks, in the user's units."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.adaptation import TaskData
from bmaml_ppl.density import Density
from bmaml_ppl.generators import seeded
from bmaml_ppl.scaling import Scaling
from bmaml_ppl.types import Tensors

__all__ = ["PREDICTIVE_STREAM", "blank_padding", "in_user_units", "simulate"]

# Particles start at draws from the plain seed: the same stream here would tie the noise to the latents.
PREDICTIVE_STREAM = 1_000_003


def simulate(
    density: Density,
    params: Tensors,
    z: Tensor,
    tasks: TaskData,
    scaling: Scaling | None,
    seed: int,
) -> dict[str, Tensor]:
    """Draws observed sites and evaluates deterministic ones for every task and every draw of its latents.

    Args:
        density: Log density of a task.
        params: Meta-parameters.
        z: Draws of latents, (T, S, D).
        tasks: Inputs as the model sees them.
        scaling: Standardisation to undo at sites that observe a standardised column, or None.
        seed: Seed of the draws, whose stream is its own: not that of `z` from the same seed.

    Returns:
        Site -> (T, S, ...), NaN at padded rows of observed sites.
    """

    def of_task(z: Tensor, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return vmap(lambda particle: density.simulate(particle, params, data), randomness="different")(z)

    with torch.no_grad(), seeded(seed + PREDICTIVE_STREAM, z.device):
        draws = vmap(of_task, randomness="different")(z, tasks.data)
    return {name: in_user_units(name, value, density, scaling, tasks.mask) for name, value in draws.items()}


def in_user_units(site: str, value: Tensor, density: Density, scaling: Scaling | None, mask: Tensor | None) -> Tensor:
    """Undoes the standardisation of a site's draws, (T, S, ...), and blanks its padded rows."""
    if site not in density.observed:
        return value
    key = density.observed[site]
    if scaling is not None and key in scaling.loc:
        value = scaling.undo(key, value)
    return blank_padding(value, mask)


def blank_padding(value: Tensor, mask: Tensor | None) -> Tensor:
    """Writes NaN at padded rows of (T, S, N, ...); leaves values that do not run over observations."""
    if mask is None or value.ndim < 3 or value.shape[2] != mask.shape[1] or not value.is_floating_point():
        return value
    real = mask.unsqueeze(1).reshape(len(mask), 1, mask.shape[1], *(1,) * (value.ndim - 3))
    return torch.where(real, value, torch.nan)
