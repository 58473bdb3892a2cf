"""One meta-step: the gradient of an objective over a batch of tasks, and what is done with it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.func import grad_and_value, vmap

from bmaml_ppl.adaptation import Adapter, TaskData, as_task_data
from bmaml_ppl.objectives import Objective, Rollout
from bmaml_ppl.tasks import Episode
from bmaml_ppl.types import Tensors

__all__ = ["clip", "constrain", "episode_views", "meta_gradient", "parameter_groups", "unconstrain"]

Constraints = Mapping[str, constraints.Constraint]


def constrain(params: Tensors, known: Constraints) -> dict[str, Tensor]:
    """Maps unconstrained meta-parameters to values that fulfil their constraints."""
    return {k: transform_to(known[k])(v) if k in known else v for k, v in params.items()}


def unconstrain(params: Tensors, known: Constraints) -> dict[str, Tensor]:
    """The inverse of `constrain`."""
    return {k: transform_to(known[k]).inv(v) if k in known else v for k, v in params.items()}


Views = tuple[TaskData, TaskData, TaskData]


def episode_views(episode: Episode) -> Views:
    """Support, query, and both together, as the model sees them."""
    return (
        as_task_data(episode.support),
        as_task_data(episode.query),
        as_task_data(episode.support.join(episode.query)),
    )


def meta_gradient(
    adapter: Adapter, objective: Objective, known: Constraints, params: Tensors, views: Views
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of the objective's mean over a batch of tasks, and its value.

    Pure but for torch's generator, which starts at the prior draw from; all tasks share those draws.

    Args:
        adapter: Inference bound to a density.
        objective: Loss of one task.
        known: Constraints of the meta-parameters.
        params: Unconstrained meta-parameters.
        views: Support, query and everything of a batch of tasks.

    Returns:
        Gradients by name and the loss.
    """
    # vmap refuses None, so that a view without a mask is one without that entry.
    arrays = [(view.data, {} if view.mask is None else {"mask": view.mask}) for view in views]

    def mean_loss(params: Tensors) -> Tensor:
        prior = constrain(params, known)

        def loss(*task: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
            parts = [TaskData(data, extra.get("mask")) for data, extra in task]
            return objective(Rollout(adapter, prior, *parts))

        return vmap(loss, randomness="same")(*arrays).mean()

    return grad_and_value(mean_loss)(dict(params))


def clip(gradients: Tensors, limit: float) -> tuple[dict[str, Tensor], Tensor]:
    """Shortens a gradient that is longer than the limit; returns it and its length before."""
    norm = torch.stack([g.detach().norm() for g in gradients.values()]).norm()
    factor = (limit / norm.clamp_min(1e-12)).clamp_max(1.0)
    return {name: g.detach() * factor for name, g in gradients.items()}, norm


def parameter_groups(params: Tensors, slow: Iterable[str]) -> list[dict[str, Any]]:
    """Groups for the default optimiser: many-dimensional parameters (`slow`) move at 0.003, others at 0.02."""
    names = set(slow)
    groups = [
        {"params": [v for k, v in params.items() if k not in names], "lr": 0.02},
        {"params": [v for k, v in params.items() if k in names], "lr": 0.003},
    ]
    return [group for group in groups if group["params"]]
