"""The vocabulary shared by every module."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "Inference",
    "LogDensity",
    "Model",
    "Observations",
    "SiteLayout",
    "Start",
    "State",
    "TaskLogDensity",
    "Tensors",
]

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

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...] | None:
        """Shapes of the parameters that a flat site holds one after another, None where it is one."""


class Observations(Protocol):
    """What a model says at one z of the R rows of an observed site, as a function of their family's parameters."""

    @property
    def eta(self) -> Tensor:
        """Unconstrained parameters of each row's distribution, (R, P)."""

    @property
    def weight(self) -> Tensor:
        """Weight of each row's log-probability, (R,): 0 where it is masked."""

    def log_prob(self, eta: Tensor) -> Tensor:
        """Weighted log-probability of each row under other parameters: (R, P) -> (R,)."""

    def information_root(self, eta: Tensor) -> Tensor:
        """S, (R, P, P), with S S^T the weighted Fisher information of each row's parameters."""

    @property
    def unknown_columns(self) -> Mapping[int, str]:
        """Columns of eta whose information is not known, and the parameter that each belongs to."""


class TaskLogDensity(Protocol):
    """A log density that also shows what it is made of, which some curvatures need."""

    def __call__(self, z: Tensor) -> Tensor:
        """Log joint density: (D,) -> scalar."""

    def log_prior(self, z: Tensor) -> Tensor:
        """Its prior part: (D,) -> scalar."""

    def observations(self, z: Tensor) -> Mapping[str, Observations]:
        """Its likelihood part, by observed site."""


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
        prepare: `prepare(state, log_density) -> State`, once before the first step where the start is a draw from
            the prior; None leaves it.
        settle: `settle(state, log_density) -> State`, once after the last step and before `measure`, without gradient
            where `implicit`: what to do with particles that went astray; None leaves them.
        measure: `measure(state, log_density) -> State`, once after the last step, differentiable: what `sample`
            needs to know of the density where the particles ended; None needs nothing. Steps can go on from it.
        log_prob: `log_prob(state, z) -> scalar`, log density of the adapted posterior at one point; None where it
            has none.
        check: `check(log_density, z)`, once on one task before anything is batched: raises where the inference
            would be wrong for the model; None asks nothing.
        num_draws: How many of the last steps each give a draw of every particle (Markov chains), 0 for none.
        visit: `visit(state)`, what is kept of each of those steps.
        collect: `collect(state, visits) -> State`, once after the last step: `visits` is what was kept, with a leading
            num_draws on every tensor.
        implicit: Whether steps lead to an optimum of the log density, so that outer gradients follow from the
            implicit function theorem there and none passes through the steps.
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
    prepare: Callable[[Any, LogDensity], Any] | None = None
    settle: Callable[[Any, LogDensity], Any] | None = None
    measure: Callable[[Any, LogDensity], Any] | None = None
    log_prob: Callable[[Any, Tensor], Tensor] | None = None
    check: Callable[[LogDensity, Tensor], None] | None = None
    implicit: bool = False
    num_draws: int = 0
    visit: Callable[[Any], Any] | None = None
    collect: Callable[[Any, Any], Any] | None = None
