"""Whether the data lie where the model says that they can lie."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.discovery import clean_room
from bmaml_ppl.handlers import is_factor

if TYPE_CHECKING:
    from bmaml_ppl.density import Density

__all__ = ["check_observations", "refuse_unsupported"]


def check_observations(
    density: "Density",
    prior: Mapping[str, Tensor],
    data: Mapping[str, Tensor | None],
    mask: Tensor | None,
    names: Sequence[str],
) -> None:
    """Refuses observed values outside the support of their distribution, in a batch of tasks.

    A support that depends on a latent is not checked.

    Args:
        density: Log density of a task.
        prior: Meta-parameters, shared by the tasks; others than the model's own are ignored.
        data: Tasks as the model sees them (standardised, if they are): (T, ...) each.
        mask: (T, N), True at real observations; None if all are.
        names: T task names.

    Raises:
        ValueError: Names the first offending task, its site, distribution, data key and value.
    """
    given = {key: value for key, value in data.items() if value is not None}
    missing = dict.fromkeys(set(data) - set(given))
    real = mask if mask is not None else torch.ones(len(names), 0)
    labels: dict[str, Any] = {}

    def of_task(task: Mapping[str, Tensor], rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        found = _outside(density, prior, {**task, **missing}, rows if mask is not None else None)
        labels.update({name: fn for name, (fn, _, _) in found.items()})
        return {name: (value, outside) for name, (_, value, outside) in found.items()}

    with clean_room(given):
        checked = vmap(of_task)(given, real)
    for site, (values, outside) in checked.items():
        wrong = outside.reshape(len(names), -1).any(-1)
        if bool(wrong.any()):
            task = int(wrong.to(torch.uint8).argmax())
            _refuse(density, site, labels[site], values[task], outside[task], f" of task {names[task]!r}")


def refuse_unsupported(density: "Density", data: Mapping[str, Tensor | None]) -> None:
    """`check_observations` for one task, whose data are (N, ...) each."""
    with clean_room(data):
        found = _outside(density, density.prior, data, None)
    for site, (fn, value, outside) in found.items():
        if bool(outside.any()):
            _refuse(density, site, fn, value, outside, "")


def _outside(
    density: "Density", prior: Mapping[str, Tensor], data: Mapping[str, Tensor | None], mask: Tensor | None
) -> dict[str, tuple[Any, Tensor, Tensor]]:
    """Distribution, value and where it is outside the support, at each observed site."""
    known = {name: prior[name] for name in density.prior}
    given = [value for value in (*data.values(), *known.values()) if value is not None and value.is_floating_point()]
    zero = given[0].new_zeros(density.dim) if given else torch.zeros(density.dim)
    runs = [density.observe(zero + at, known, data, mask) for at in (0.0, 0.5)]
    found = {}
    for name, record in runs[0].items():
        if name in density.sites or not record.is_observed or is_factor(record.fn):
            continue
        supports = record.fn.support, runs[1][name].fn.support
        try:
            outside = ~supports[0].check(record.value)
        except (NotImplementedError, RuntimeError, ValueError):  # a shape that only the distribution itself accepts
            continue
        for first, second in zip(*(_bounds(support) for support in supports), strict=True):
            outside = outside & (first == second).all()
        found[name] = record.fn, record.value, outside
    return found


def _bounds(support: Any) -> list[Tensor]:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return [value for value in vars(support).values() if isinstance(value, Tensor)]


def _refuse(density: "Density", site: str, fn: Any, value: Tensor, outside: Tensor, where: str) -> None:
    first = tuple(outside.nonzero()[0].tolist())
    key = density.observed.get(site)
    base = fn
    while hasattr(base, "base_dist") and type(base).__name__ in ("Independent", "MaskedDistribution"):
        base = base.base_dist
    column = f"data {key!r}" if key else "what it observes"
    raise ValueError(
        f"observed site {site!r} is {type(base).__name__}, which lives on {fn.support}, but {column}{where} holds "
        f"{value[first].tolist()}; leave counts and categories out of tasks.standardize(columns=[...]), which else "
        "standardises every floating column, or choose a distribution for such values"
    )
