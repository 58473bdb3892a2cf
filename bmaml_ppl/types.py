"""The vocabulary shared by every module."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Inference", "LogDensity", "Model", "SiteLayout", "Start", "State", "Tensors"]

Tensors = Mapping[str, Tensor]
"""Named tensors: meta-parameters, observations, or constrained latents."""

Model = Callable[..., Any]
"""An ordinary Pyro model of ONE task, called with keyword tensors; outputs may be None."""

LogDensity = Callable[[Tensor], Tensor]
"""Log density of one task at one point: (D,) -> scalar, up to a constant in z."""

Start = Literal["auto", "free", "prior"]
"""Where particles start: a free learned tensor, or draws from the model's own prior."""


class SiteLayout(Protocol):
    """What an algorithm may know of a latent site: its place in z."""

    @property
    def start(self) -> int:
        """First coordinate of the site in z."""

    @property
    def stop(self) -> int:
        """One past the last coordinate of the site in z."""


class State(Protocol):
    """What every algorithm's state shows to the outside: the current particles, (M, D)."""

    @property
    def particles(self) -> Tensor:
        """Current particles, shape (M, D)."""


class Inference(NamedTuple):
    """One inference algorithm with its hyperparameters bound: pure functions for ONE task.

    Attributes:
        init: `init(prior) -> State`. `prior["particles"]` holds the start, shape (M, D); entries the
            algorithm learns itself (see `parameters`) are read from the same dict.
        update: `update(state, log_density) -> State`, one step, differentiable.
        sample: `sample(state, num_samples, generator) -> (S, D)` draws from the adapted posterior.
        parameters: `parameters(dim) -> dict` of the meta-parameters the algorithm adds (step sizes).
        name: Key in `bmaml_ppl.inference.ALGORITHMS`.
        config: The factory's arguments (JSON values), so that an algorithm can be saved and rebuilt.
        num_particles: M.
        num_steps: Adaptation steps n.
        start: Where particles start.
    """

    init: Callable[[Tensors], Any]
    update: Callable[[Any, LogDensity], Any]
    sample: Callable[[Any, int, torch.Generator | None], Tensor]
    parameters: Callable[[int], dict[str, Tensor]]
    name: str
    config: dict[str, Any]
    num_particles: int
    num_steps: int
    start: Start
