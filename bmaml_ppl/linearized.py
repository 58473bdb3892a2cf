r"""The linearised (GLM) predictive: a model's observation parameters to first order around the adapted point.

.. math:: \eta(z) \approx \eta(\hat z) + J (z - \hat z)

It is the predictive that a Gauss-Newton posterior belongs to; where the model is linear it is the sampled one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.adaptation import TaskData
from bmaml_ppl.density import Density
from bmaml_ppl.draws import reparameterised
from bmaml_ppl.families import Family
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference.curvature import observation_slopes
from bmaml_ppl.prediction import PREDICTIVE_STREAM, in_user_units
from bmaml_ppl.scaling import Scaling
from bmaml_ppl.task_density import TaskDensity
from bmaml_ppl.types import Tensors

__all__ = ["linearized_log_likelihood", "simulate_linearized"]


def simulate_linearized(
    density: Density,
    params: Tensors,
    modes: Tensor,
    z: Tensor,
    tasks: TaskData,
    scaling: Scaling | None,
    seed: int,
) -> dict[str, Tensor]:
    """Draws observed sites with parameters linearised around each task's mode.

    Args:
        density: Log density of a task.
        params: Meta-parameters.
        modes: Where to linearise, (T, D).
        z: Draws of latents, (T, S, D).
        tasks: Inputs as the model sees them.
        scaling: Standardisation to undo at sites that observe a standardised column, or None.
        seed: Seed of the draws.

    Returns:
        Observed site -> (T, S, ...), NaN at padded rows. Deterministic sites are left out.

    References:
        Khan et al. (2019), Approximate Inference Turns Deep Networks into Gaussian Processes; Immer, Korzepa and
        Bauer (2021), Improving predictions of Bayesian neural nets via local linearization, equation 8.
    """
    shapes: dict[str, torch.Size] = {}

    def of_task(data: Mapping[str, Tensor], mode: Tensor, z: Tensor) -> dict[str, Tensor]:
        bound = TaskDensity(density, params, density.without_outputs(data))
        families, moved = _linearize(bound, mode, z)
        shapes.update({k: r.value.shape for k, r in density.observe(mode, params, bound.data).items()})

        def draw(etas: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: reparameterised(family.rebuild(etas[name])) for name, family in families.items()}

        return vmap(draw, randomness="different")(moved)

    with torch.no_grad(), seeded(seed + PREDICTIVE_STREAM, z.device):
        draws = vmap(of_task, randomness="different")(tasks.data, modes, z)
    shaped = {name: value.reshape(*z.shape[:2], *shapes[name]) for name, value in draws.items()}
    return {name: in_user_units(name, value, density, scaling, tasks.mask) for name, value in shaped.items()}


def linearized_log_likelihood(
    density: Density, params: Tensors, modes: Tensor, z: Tensor, tasks: TaskData
) -> dict[str, Tensor]:
    """Log-likelihood of every observation with parameters linearised around each task's mode.

    Args:
        density: Log density of a task.
        params: Meta-parameters.
        modes: Where to linearise, (T, D).
        z: Draws of latents, (T, S, D).
        tasks: Data as the model sees them.

    Returns:
        Observed site -> (T, S, ...) of the site's batch shape, as `Density.log_likelihood` gives it.
    """
    shapes: dict[str, torch.Size] = {}

    def of_task(data: Mapping[str, Tensor], mode: Tensor, z: Tensor) -> dict[str, Tensor]:
        bound = TaskDensity(density, params, data)
        families, moved = _linearize(bound, mode, z)
        shapes.update({k: v.shape for k, v in density.log_likelihood(mode, params, data).items()})
        return {name: vmap(family.log_prob)(moved[name]) for name, family in families.items()}

    with torch.no_grad():
        values = vmap(of_task)(tasks.data, modes, z)
    # Rows of a site with to_event dimensions add up to the batch elements that they belong to.
    return {name: value.reshape(*z.shape[:2], *shapes[name], -1).sum(-1) for name, value in values.items()}


Linearized = tuple[dict[str, Family], dict[str, Tensor]]


def _linearize(bound: TaskDensity, mode: Tensor, z: Tensor) -> Linearized:
    """Each site's family at the mode, and its parameters at draws z, (S, D), to first order: (S, R, P)."""
    families = bound.observations(mode)
    slopes = observation_slopes(bound, mode)
    moved = {
        name: family.eta + torch.einsum("rpd,sd->srp", slopes[name], z - mode) for name, family in families.items()
    }
    return families, moved
