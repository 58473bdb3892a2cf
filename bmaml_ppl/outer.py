"""One meta-step: the gradient of an objective over a batch of tasks, and what is done with it."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from bmaml_ppl.adaptation import Adapter, TaskData, as_task_data
from bmaml_ppl.objectives import Objective, Rollout
from bmaml_ppl.tasks import Episode
from bmaml_ppl.types import Tensors

__all__ = [
    "Constraints",
    "Views",
    "count",
    "weigh",
    "MetaGradient",
    "clip",
    "constrain",
    "episode_views",
    "equal_weights",
    "meta_gradient",
    "parameter_groups",
    "unconstrain",
]

Constraints = Mapping[str, constraints.Constraint]


def constrain(params: Tensors, known: Constraints) -> dict[str, Tensor]:
    """Maps unconstrained meta-parameters to values that fulfil their constraints."""
    return {k: transform_to(known[k])(v) if k in known else v for k, v in params.items()}


def unconstrain(params: Tensors, known: Constraints) -> dict[str, Tensor]:
    """The inverse of `constrain`."""
    return {k: transform_to(known[k]).inv(v) if k in known else v for k, v in params.items()}


Views = tuple[TaskData, TaskData, TaskData]


def episode_views(episode: Episode, masked: bool = False) -> Views:
    """Support, query, and both together, as the model sees them.

    Args:
        episode: A batch of tasks.
        masked: Give every view a mask, so that all batches of ragged tasks have one layout.
    """
    support, query = (tasks.with_mask() if masked else tasks for tasks in episode)
    return as_task_data(support), as_task_data(query), as_task_data(support.join(query))


class MetaGradient(NamedTuple):
    """What one meta-step learns from a batch of tasks.

    Attributes:
        gradients: Of the loss, by meta-parameter.
        loss: The objective's mean over the tasks, a scalar.
        num_repaired: Tasks whose curvature had to be repaired, a scalar.
        num_unconverged: Tasks that stopped short of the optimum at which the gradient is taken, a scalar.
    """

    gradients: dict[str, Tensor]
    loss: Tensor
    num_repaired: Tensor
    num_unconverged: Tensor


def equal_weights(views: Views) -> Tensor:
    """Weights of tasks that make the loss their mean, (T,)."""
    values = list(views[0].data.values())
    like = next((value for value in values if value.is_floating_point()), torch.empty(0, device=values[0].device))
    return like.new_full((len(values[0]),), 1 / len(values[0]))


def meta_gradient(
    adapter: Adapter,
    objective: Objective,
    known: Constraints,
    params: Tensors,
    views: Views,
    weights: Tensor | None = None,
) -> MetaGradient:
    """Gradient of the objective's mean over a batch of tasks, and its value.

    Pure but for torch's generator, which starts at the prior draw from; all tasks share those draws.

    Args:
        adapter: Inference bound to a density.
        objective: Losses of tasks.
        known: Constraints of the meta-parameters.
        params: Unconstrained meta-parameters.
        views: Support, query and everything of a batch of tasks.
        weights: Of the tasks' losses, (T,), for a part of a larger batch; a task of weight 0 only fills the layout up.
            None is 1 / T each.

    Raises:
        ValueError: If the objective depends on no meta-parameter.
    """
    weights = equal_weights(views) if weights is None else weights
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        rollout = Rollout(adapter, constrain(leaves, known), *views)
        loss = weigh(objective(rollout), weights)
        if not loss.requires_grad:
            implicit = adapter.inference.implicit
            raise ValueError(
                f"{objective} depends on none of the meta-parameters {sorted(leaves)}; marginal_nll() and evidence() "
                "learn what the model declares with pyro.param, query_nll() and chaser() learn free particles too"
                + (', through the steps: write gradient="unrolled"' if implicit else "")
            )
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    found = dict(zip(leaves, gradients, strict=True))
    return MetaGradient(found, loss.detach(), *count(rollout, weights))


def weigh(losses: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum, (T,) -> a scalar; what is not finite in a task that only fills up is left out."""
    return torch.where(weights > 0, losses * weights, 0.0).sum()


def count(rollout: Rollout, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Tasks whose curvature was repaired, and that did not converge; those that only fill up are left out."""
    return (rollout.repaired & (weights > 0)).sum(), (rollout.unconverged & (weights > 0)).sum()


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
