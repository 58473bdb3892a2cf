"""What makes a run of meta-learning this one and no other, in words and numbers that can be compared."""

import hashlib
import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.objectives import Objective
from bmaml_ppl.outer import constrain, unconstrain
from bmaml_ppl.storage import describe_prior
from bmaml_ppl.tasks import Tasks

__all__ = ["Settings", "compare_settings", "describe_optimizer", "describe_run"]

Settings = dict[str, Any]
"""Nested dicts of JSON values."""

_TOLERANCE = 1e-3
_ROUGHLY = ("log_prob", "standardised")
_SILENT = ("format_version", "package_version")
_NO_SETTINGS = ("params", "initial_lr")


def describe_run(
    learned: LearnedPrior, tasks: Tasks, objective: Objective, *, from_start: bool = False, **settings: Any
) -> Settings:
    """All that the result of a run depends on, but its optimiser.

    A network's initial weights are left out: they may be drawn anew in each process, and a run that goes on has its
    own.

    Args:
        learned: The prior before the first meta-step.
        tasks: In the user's units.
        objective: What is minimised.
        from_start: Whether the run begins at another prior's parameters.
        **settings: More, JSON values; checkpoints need `num_steps` and `cosine decay`, whether rates depend on it.

    Raises:
        ValueError: The inference has settings that JSON cannot hold.
    """
    learned = learned.to("cpu")
    described = describe_prior(replace(learned, params=_make_up_params(learned)))
    described["inference"] = {**described["inference"], "start": described.pop("start")}
    declared = learned.density.prior.keys() - learned.density.networks
    initial = {name: v for name, v in learned.params.items() if from_start or name in declared}
    run = {
        **{name: value for name, value in described.items() if name not in _SILENT},
        **settings,
        "objective": str(objective),
        "objective settings": [_describe_loss(loss) for _, _, loss in objective.terms],
        "objective weights": [weight for weight, _, _ in objective.terms],
        "dtype": str(learned.like.dtype).removeprefix("torch."),
        "tasks": _describe_tasks(tasks),
        "initial value": {name: _describe_tensor(value) for name, value in initial.items()},
    }
    try:
        compared: Settings = json.loads(json.dumps(run))
    except TypeError as error:
        raise ValueError(
            f"inference {learned.inference.name!r} has settings {learned.inference.config}, which JSON cannot hold: "
            f"{error}; its config must be numbers, strings, None and lists of them, or leave out checkpoint_dir"
        ) from error
    return compared


def _make_up_params(learned: LearnedPrior) -> dict[str, Tensor]:
    """Values that depend on the shapes of the meta-parameters alone."""
    free = unconstrain(learned.params, learned.constraints)
    waves = {k: 0.5 * torch.cos(torch.arange(v.numel()) + 0.5).reshape(v.shape).to(v) for k, v in free.items()}
    return constrain(waves, learned.constraints)


def _describe_loss(loss: Any) -> Settings:
    """What a loss was made with, as far as it is numbers, strings and lists of names; other lists may be logs."""
    found = inspect.getclosurevars(loss).nonlocals if inspect.isfunction(loss) else {}
    lists = {k: list(v) for k, v in found.items() if isinstance(v, list | tuple)}
    names = {k: v for k, v in lists.items() if v and all(isinstance(x, str) for x in v)}
    return {k: v for k, v in found.items() if isinstance(v, int | float | str | None)} | names


def _describe_tasks(tasks: Tasks) -> Settings:
    tensors = {**tasks.data, **tasks.constants} | ({} if tasks.mask is None else {"mask": tasks.mask})
    scaling = {} if tasks.scaling is None else tasks.scaling.state()
    return {
        "column": {name: _describe_tensor(value) for name, value in tensors.items()},
        "standardised": {name: value.double().mean().item() for name, value in scaling.items()},
    }


def _describe_tensor(value: Tensor) -> str:
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} {tuple(value.shape)} with SHA-256 {hashlib.sha256(content).hexdigest()[:16]}"


def describe_optimizer(optimizer: torch.optim.Optimizer) -> Settings:
    """An optimiser's class and the settings of its parameter groups, before its first step."""
    groups = {}
    for i, group in enumerate(optimizer.param_groups):
        values = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in group.items() if k not in _NO_SETTINGS}
        groups[f"group {i}"] = {**values, "parameters": len(group["params"])}
    described = {"optimizer": {"class": type(optimizer).__name__, **groups}}
    compared: Settings = json.loads(json.dumps(described, default=repr))
    return compared


def compare_settings(was: Settings, now: Settings) -> list[str]:
    """What differs between two runs, one line each: the setting, what it was and what it is."""
    before, after = dict(_flatten(was)), dict(_flatten(now))
    names = [*after, *(name for name in before if name not in after)]
    return [
        f"{name}: was {_show(before, name)}, is {_show(after, name)}"
        for name in names
        if not _same(name, before.get(name), after.get(name)) or (name in before) != (name in after)
    ]


def _flatten(settings: Settings, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _same(name: str, was: Any, now: Any) -> bool:
    if any(part in _ROUGHLY for part in name.split(".")):
        if was is None or now is None:  # a log-probability that is not finite tells nothing apart
            return True
        return math.isclose(was, now, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(was == now)


def _show(settings: Settings, name: str) -> str:
    return repr(settings[name]) if name in settings else "not there"
