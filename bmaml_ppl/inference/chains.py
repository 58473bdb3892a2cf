"""Markov chains as the state of an inference algorithm: what hmc and nuts end with, and draws from it."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ChainState", "sample", "thin", "thin_tasks"]


class ChainState(NamedTuple):
    """M chains of S draws each, of one task.

    Attributes:
        particles: The last position of each chain, (M, D).
        draws: Every kept position, (M, S, D).
        log_density: Log joint density at each, up to a constant, in nats, (M, S).
        acceptance_rate: Mean probability with which each proposal was to be accepted, (M, S).
        energy: Hamiltonian at the start of each transition, in nats, (M, S).
        diverging: Where the simulation of a transition lost the Hamiltonian, (M, S), bool.
        step_size: Step size of each transition, (M, S).
    """

    particles: Tensor
    draws: Tensor
    log_density: Tensor
    acceptance_rate: Tensor
    energy: Tensor
    diverging: Tensor
    step_size: Tensor


def sample(state: ChainState, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Evenly spaced draws, one chain after another, (num_samples, D); all of them in order for num_samples = M S.

    Thinning is deterministic, so that `generator` is not used; more draws than there are repeat them.
    """
    return thin(state.draws, num_samples)


def thin(values: Tensor, num_samples: int) -> Tensor:
    """Evenly spaced entries of (M, S, ...), one chain after another: (num_samples, ...)."""
    flat = values.flatten(0, 1)
    index = torch.arange(num_samples, device=flat.device) * len(flat) // num_samples
    return flat.index_select(0, index)


def thin_tasks(values: Tensor, num_samples: int) -> Tensor:
    """The same for a batch of tasks: (T, M, S, ...) -> (T, num_samples, ...)."""
    return torch.stack([thin(of_task, num_samples) for of_task in values])
