"""What Laplace's method reports of itself: repaired curvature, flat directions, optimisers that did not converge."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.inference.laplace import log_mass
from bmaml_ppl.types import SiteLayout

__all__ = ["NotConverged", "RepairedCurvature", "check_measured", "describe_curvature"]

_TOLERANCE = 1e-2
"""Nats below the optimum from which an adapted point is called not converged: a hundredth of a unit of evidence."""

_NEGLIGIBLE = -9.0
"""Log of the share of draws, about one in 10,000, below which a mode does not count."""

_SHOWN = 3


class RepairedCurvature(UserWarning):
    """A task's curvature was not positive definite where the Gaussian was put, and has been repaired."""


class NotConverged(UserWarning):
    """A task's optimiser stopped short of the optimum."""


def describe_curvature(state: Any, sites: Mapping[str, SiteLayout]) -> dict[str, Tensor | list[str | None]]:
    """What a batch of Laplace states reports, one entry a task; empty for other inference.

    Args:
        state: State of T tasks.
        sites: Layout of z.

    Returns:
        `repair`, by how much the lowest curvature was raised relative to its scale, (T,); `decrement`, nats that the
        adapted point lies below the optimum of a quadratic with its score and curvature, (T,); `converged`, (T,);
        `repaired`, (T,); `flat_site`, the site with a flat direction or None; `log_evidence`, (T,). Of several modes
        the worst counts among those that draws come from.
    """
    if not hasattr(state, "repair"):
        return {}
    mass = vmap(log_mass)(state).detach()
    counts = torch.log_softmax(mass, 1) > _NEGLIGIBLE
    repair, decrement = (
        torch.where(counts | ~value.isfinite(), value, 0.0).amax(1)
        for value in (state.repair.detach(), state.decrement.detach())
    )
    return {
        "repair": repair,
        "repaired": repair > 0,
        "decrement": decrement,
        "converged": decrement <= _TOLERANCE,
        "flat_site": [_site_of(int(i), sites) for i in torch.where(counts, state.flat, -1).amax(1).tolist()],
        "log_evidence": torch.logsumexp(mass, 1),
    }


def _site_of(coordinate: int, sites: Mapping[str, SiteLayout]) -> str | None:
    return next((name for name, site in sites.items() if site.start <= coordinate < site.stop), None)


def check_measured(state: Any, sites: Mapping[str, SiteLayout], names: Sequence[str], *, must_converge: bool) -> None:
    """Refuses flat directions; warns of repairs, and of points short of the optimum.

    Args:
        state: State of T tasks.
        sites: Layout of z.
        names: T task names.
        must_converge: Whether the inference is one that leads to an optimum.

    Raises:
        ValueError: If a task's density does not curve along some direction.

    Warns:
        RepairedCurvature: Names the first tasks and the size of the repair.
        NotConverged: Names the first tasks, and the sites that have farthest to go.
    """
    found = describe_curvature(state, sites)
    if not found:
        return
    # Far from an optimum a direction may look flat and not be.
    at_rest = found["converged"].tolist()  # type: ignore[union-attr]
    flat = zip(names, found["flat_site"], at_rest, strict=True)
    if tasks := [(task, site) for task, site, rests in flat if site is not None and (rests or not must_converge)]:
        task, site = tasks[0]
        raise ValueError(
            f"the log density of task {task!r} is flat along site {site!r} ({len(tasks)} of {len(names)} tasks): "
            "neither the prior nor the data say where it is. Give the site a proper prior, leave out what the data "
            "cannot tell apart, or standardise the data if its curvature is only lost in rounding"
        )
    repair: Any = found["repair"]
    if worst := repair.nonzero().flatten().tolist():
        listed = ", ".join(f"{names[i]!r} (by {repair[i]:.2g})" for i in worst[:_SHOWN])
        warnings.warn(
            f"the curvature of {len(worst)} of {len(names)} tasks was not positive definite and was raised: {listed}; "
            "their posterior spread is a guess in some direction. Several starts (num_particles=5), more steps or "
            'curvature="fisher" may help',
            RepairedCurvature,
            stacklevel=3,
        )
    _warn_of_unconverged(state, found, sites, names, must_converge)


def _warn_of_unconverged(
    state: Any, found: Mapping[str, Any], sites: Mapping[str, SiteLayout], names: Sequence[str], must_converge: bool
) -> None:
    short = (~found["converged"]).nonzero().flatten().tolist()
    if not must_converge or not short:
        return
    mode = state.decrement.argmax(1)
    listed = ", ".join(
        f"{names[i]!r} (site {_site_of(int(state.steepest[i, mode[i]]), sites)!r}, {found['decrement'][i]:.2g} nats)"
        for i in short[:_SHOWN]
    )
    warnings.warn(
        f"the optimiser of {len(short)} of {len(names)} tasks stopped short of the optimum: {listed}; write more steps "
        "(num_steps=...), or start them elsewhere (num_particles=5) where that does not help",
        NotConverged,
        stacklevel=4,
    )
