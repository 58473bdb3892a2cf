"""How particles move through adaptation, step by step."""

from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.adaptation import TaskData
from bmaml_ppl.checks import check_count
from bmaml_ppl.generators import seeded
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.tasks import Tasks

__all__ = ["trace_adaptation"]


def trace_adaptation(
    prior: LearnedPrior,
    tasks: Tasks | None = None,
    /,
    *,
    num_steps: int | None = None,
    seed: int | None = None,
    **data: Any,
) -> dict[str, Tensor]:
    """Every latent site of every particle after 0, 1, ... n adaptation steps; `plot_particles` draws them.

    The last entry holds the particles that `prior.adapt` ends at for the same arguments. Of Markov chains, it traces
    where each chain is, the steps that tune it included.

    Args:
        prior: What adapts.
        tasks: Tasks to adapt to, in the user's units, or None.
        num_steps: Adaptation steps n; None takes the inference's own.
        seed: Seed of the particles' start; None takes the prior's.
        **data: One task's observations as keyword tensors, (N, ...), or a batch's, (T, N, ...).

    Returns:
        Latent sites on their supports, in the model's units: (n + 1, M, ...) for one task, (n + 1, T, M, ...) for a
        batch.

    Raises:
        TypeError: If something else than Tasks or numbers is given, or num_steps is not an integer.
        ValueError: If data is missing, unknown or of the wrong shape, or num_steps negative.
    """
    _, batch, single = prior.prepare_tasks(tasks, data)
    steps = prior.inference.num_steps if num_steps is None else num_steps
    check_count("num_steps", steps, least=0)
    path = _run(prior, batch, steps, prior.seed if seed is None else seed)
    sites = _constrain(prior, path, batch)
    return {name: value[:, 0] if single else value for name, value in sites.items()}


def _run(prior: LearnedPrior, batch: TaskData, num_steps: int, seed: int) -> Tensor:
    """Particles after every step, (n + 1, T, M, D)."""
    adapter = prior.bind()
    with torch.no_grad(), seeded(seed, prior.device):
        state = adapter.begin(prior.params, batch)
        path = [state.particles]
        for _ in range(num_steps):
            state = adapter.run(state, prior.params, batch, 1)
            path.append(state.particles)
    return torch.stack(path)


def _constrain(prior: LearnedPrior, path: Tensor, batch: TaskData) -> dict[str, Tensor]:
    def of_task(z: Tensor, task: dict[str, Tensor]) -> dict[str, Tensor]:
        return vmap(lambda particle: prior.density.constrain(particle, prior.params, task))(z)

    with torch.no_grad():
        steps = [vmap(of_task)(z, batch.data) for z in path]
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
