"""What a population of sequential Monte Carlo reports of itself: how even its weights stayed, and its evidence."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bmaml_ppl.inference.smc import SMCState

__all__ = ["UnevenWeights", "check_population", "describe_population"]

_LEAST = 0.05
"""Effective sample size of a reweighting, as a share of the particles, below which a population is called uneven."""

_SHOWN = 3


class UnevenWeights(UserWarning):
    """A reweighting left a task with few different particles, which stand for its whole posterior."""


def describe_population(state: Any) -> dict[str, Tensor]:
    """What a batch of populations reports, one entry a task; empty for other inference.

    Args:
        state: State of T tasks.

    Returns:
        `smallest_ess`, the smallest effective sample size of a reweighting as a share of the particles, (T,);
        `acceptance_rate`, the mean acceptance of the last moves, (T,); `log_evidence`, the estimate of the log
        marginal likelihood, (T,).
    """
    if not isinstance(state, SMCState):
        return {}
    return {name: getattr(state, name).detach() for name in ("smallest_ess", "acceptance_rate", "log_evidence")}


def check_population(state: Any, names: Sequence[str]) -> None:
    """Warns of tasks whose posterior few particles stand for.

    Args:
        state: State of T tasks.
        names: T task names.

    Warns:
        UnevenWeights: Names the first tasks and their smallest effective sample sizes.
    """
    found = describe_population(state)
    if not found:
        return
    size = found["smallest_ess"]
    if few := (~(size >= _LEAST)).nonzero().flatten().tolist():  # NaN is not
        listed = ", ".join(f"{names[i]!r} ({size[i]:.2g})" for i in few[:_SHOWN])
        warnings.warn(
            f"the effective sample size of {len(few)} of {len(names)} tasks fell below {_LEAST:.0%} of the particles: "
            f"{listed}; take more steps: num_steps=..., or more particles where that does not help: num_particles=...",
            UnevenWeights,
            stacklevel=3,
        )
