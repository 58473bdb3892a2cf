"""Where observed values come from: which data, in which rows, and whether each counts once."""

from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from bmaml_ppl.handlers import is_factor

__all__ = ["derived_keys", "plate_dim", "refuse_repeated", "source_of"]

_Run = Callable[[Mapping[str, Tensor | None]], Mapping[str, Mapping[str, Any]]]


def refuse_repeated(name: str, msg: Mapping[str, Any]) -> None:
    """Refuses an observation that a distribution of another shape would count more than once."""
    fn, value = msg["fn"], msg["value"]
    given = value.shape[: value.ndim - fn.event_dim]
    shape = torch.broadcast_shapes(fn.batch_shape, given)
    if prod(given) == prod(shape) or value.ndim == 0 or is_factor(fn):
        return
    plates = {frame.name: frame.size for frame in msg["cond_indep_stack"]}
    raise ValueError(
        f"observed site {name!r} has {tuple(shape)} log-probabilities for observations of shape {tuple(value.shape)} "
        f"in plates {plates}, so that each would count {prod(shape) // max(prod(given), 1)} times; make the "
        f"distribution's shape {tuple(given)}, for example with mean[..., 0] or mean.squeeze(-1)"
    )


def derived_keys(run: _Run, sites: Collection[str], data: Mapping[str, Tensor | None]) -> frozenset[str]:
    """The data keys from which observed values at these sites are computed, which prediction has to do without.

    Args:
        run: Runs the model on data and returns its messages by site.
        sites: Observed sites whose value is no data key's.
        data: One task's keyword arguments.

    Raises:
        ValueError: If the model cannot run with None in their place.
    """
    floats = {
        k: v.detach().clone().requires_grad_() for k, v in data.items() if v is not None and v.is_floating_point()
    }
    keys: dict[str, list[str]] = {}
    if sites and floats:
        for name, msg in run({**data, **floats}).items():
            if name in sites and not is_factor(msg["fn"]) and msg["value"].requires_grad:
                grads = torch.autograd.grad(msg["value"].sum(), list(floats.values()), allow_unused=True)
                keys[name] = [key for key, slope in zip(floats, grads, strict=True) if slope is not None]
    derived = frozenset(key for of_site in keys.values() for key in of_site)
    if not derived:
        return derived
    try:
        run({**data, **dict.fromkeys(derived)})
    except (TypeError, AttributeError) as error:
        name, used = next(iter(keys.items()))
        key = used[0]
        raise ValueError(
            f"observed site {name!r} observes something computed from data {used}, and the model does not run without "
            f"it, so that nothing could be predicted ({error}). Put the computed column into the data and observe "
            f"that, or write obs=None if {key} is None else ..."
        ) from error
    return derived


def source_of(name: str, value: Tensor, data: Mapping[str, Tensor | None]) -> str | None:
    """The data key an observed value came from: the same tensor, or the only one equal to it."""
    tensors = {key: tensor for key, tensor in data.items() if tensor is not None and tensor.numel() == value.numel()}
    for key, tensor in tensors.items():
        if value is tensor:
            return key
    equal = []
    for key, tensor in tensors.items():
        dtype = torch.promote_types(value.dtype, tensor.dtype)
        if value.numel() and torch.equal(value.reshape(-1).to(dtype), tensor.reshape(-1).to(dtype)):
            equal.append(key)
    if len(equal) > 1:
        raise ValueError(
            f"observed site {name!r} observes a copy of data {equal[0]!r} or of {equal[1]!r}, which are equal in the "
            "first task; pass the argument itself as obs=..., and cast the column in the data instead of in the model"
        )
    return equal[0] if equal else None


def plate_dim(
    msg: Mapping[str, Any], source: str | None, data: Mapping[str, Tensor | None], constants: Collection[str]
) -> int | None:
    """The batch dimension (from the right) that runs over observations; None for one value a task."""
    if source in constants:
        return None
    key = data[source] if source is not None else None
    if key is not None and key.shape == msg["value"].shape:
        return -(key.ndim - msg["fn"].event_dim) or None
    lengths = {v.shape[0] for k, v in data.items() if v is not None and v.ndim and k not in constants}
    frames = [f.dim for f in msg["cond_indep_stack"] if f.dim is not None and f.size in lengths]
    if frames:
        return min(frames)
    batch_shape = msg["fn"].batch_shape
    return -len(batch_shape) if batch_shape and batch_shape[0] in lengths else None
