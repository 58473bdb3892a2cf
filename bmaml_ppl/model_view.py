"""A user's model with learned meta-parameters in place: for Pyro's own tools, and to tell it from other models."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmaml_ppl.density import Density
from bmaml_ppl.generators import seeded
from bmaml_ppl.handlers import Sites, ambient, execute, learned_params
from bmaml_ppl.template import Template
from bmaml_ppl.types import Tensors

__all__ = ["fingerprint", "learned_model"]

_ROWS = 7


def learned_model(density: Density, params: Tensors) -> Callable[..., Any]:
    """The user's model under learned values of its meta-parameters, networks included.

    Args:
        density: Log density of a task.
        params: Meta-parameters by name, constrained.

    Returns:
        A Pyro model of the same arguments, in the model's units. Its sample statements are seen by outer
        handlers; its param statements are constants, so that neither Pyro's parameter store nor the
        networks' own weights are read or written.
    """

    def model(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with ambient(tensors), learned_params(params, networks=bool(density.networks)):
            return density.model(*args, **kwargs)

    return model


def fingerprint(density: Density, params: Tensors, template: Template) -> dict[str, dict[str, Any]]:
    """What a model says of fixed latents and made-up data: a model that says the same is taken for the same.

    Args:
        density: Log density of a task.
        params: Meta-parameters by name, constrained.
        template: Shape of one task's data.

    Returns:
        Site -> the name of its `distribution` and its total `log_prob`, None where it is not finite. Empty where the
        model cannot be evaluated at made-up data.
    """
    like = next(iter(params.values()))
    data = template.varied_example(_ROWS, like)
    z = 0.6 * torch.cos(torch.arange(density.dim, device=like.device) + 0.5).to(like)
    try:
        with torch.no_grad(), seeded(0, like.device):
            values = density.constrain(z, params, data)
            sites = Sites(lambda name, fn: values[name], log_prob=True)
            execute(density.model, params, data, sites, networks=bool(density.networks))
    except Exception:  # a user's model may refuse made-up values in any way
        return {}
    return {
        name: {"distribution": _family(record.fn), "log_prob": _finite_total(record.log_prob)}
        for name, record in sites.records.items()
    }


def _family(fn: Any) -> str:
    while type(fn).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__


def _finite_total(log_prob: Tensor | None) -> float | None:
    total = float("nan") if log_prob is None else log_prob.double().sum().item()
    return total if math.isfinite(total) else None
