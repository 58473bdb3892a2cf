"""What the particle algorithms share: their state, their step rule, and draws from particles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bmaml_ppl.types import SiteLayout, Tensors

__all__ = [
    "LearnedStepSize",
    "ParticleState",
    "Preconditioner",
    "StepRule",
    "advance",
    "resample",
    "silverman_width",
    "smooth_resample",
]

Preconditioner = Literal["auto", "none", "adaptive", "curvature", "gauss_newton"]
LearnedStepSize = Literal["none", "scalar", "site", "parameter"]

_CURVATURE_LIMIT = 32
_STEP_SIZE = 0.01
_DECAY = 0.9
_EPSILON = 1e-8


class ParticleState(NamedTuple):
    """State of an algorithm that moves particles.

    Attributes:
        particles: Points in unconstrained coordinates, (M, D).
        step_size: Step size, a scalar or (D,).
        second_moment: Decayed mean of squared directions, (M, D); a scalar zero unless adaptive.
        num_updates: Steps taken, a scalar.
    """

    particles: Tensor
    step_size: Tensor
    second_moment: Tensor
    num_updates: Tensor


@dataclass(frozen=True)
class StepRule:
    """How long a step is and in which metric.

    Attributes:
        step_size: alpha; None takes the preconditioner's default: `newton` for Newton steps, else 0.01. An
            adaptive step moves each coordinate about that far; longer ones make a network's function jump.
        learned: Whether the step size is meta-learned, and how finely.
        preconditioner: "none", "adaptive" (AdaGrad with decay), "curvature" (damped Hessian, O(M D^3) a
            step), "gauss_newton" (Fisher information, in its dual form above 128 coordinates), or "auto": "curvature"
            up to `limit` latent coordinates, else `large`.
        sites: Layout of z; None is one site.
        newton: Default step size under "curvature" and "gauss_newton"; interacting particles need shorter steps
            than one.
        limit: Most latent coordinates for which "auto" takes "curvature".
        large: What "auto" takes above.
        exact: Whether Newton's steps take each negative eigenvalue as its absolute value and leave small ones as they
            are, which ends at the optimum sooner and through which no gradient can pass; else the Hessian is shifted.
    """

    step_size: float | None
    learned: LearnedStepSize
    preconditioner: Preconditioner
    sites: Mapping[str, SiteLayout] | None
    newton: float = 1.0
    limit: int = _CURVATURE_LIMIT
    large: Preconditioner = "adaptive"
    exact: bool = False

    def __post_init__(self) -> None:
        for name, got, allowed in (
            ("preconditioner", self.preconditioner, ("auto", "none", "adaptive", "curvature", "gauss_newton")),
            ("learn_step_size", self.learned, ("none", "scalar", "site", "parameter")),
        ):
            if got not in allowed:
                raise ValueError(f"{name}={got!r} is not known; choose one of {list(allowed)}")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size={self.step_size!r} must be positive, or None for the default")

    def kind(self, dim: int) -> Preconditioner:
        """The preconditioner in use for D latent coordinates."""
        if self.preconditioner != "auto":
            return self.preconditioner
        return "curvature" if dim <= self.limit else self.large

    def blocks(self, dim: int) -> list[slice]:
        """Slices of z, one a latent site."""
        if self.sites is None:
            return [slice(0, dim)]
        return [slice(site.start, site.stop) for site in self.sites.values()]

    def value(self, dim: int) -> float:
        """The step size at its start."""
        if self.step_size is not None:
            return self.step_size
        return self.newton if self.kind(dim) in ("curvature", "gauss_newton") else _STEP_SIZE

    def parameters(self, dim: int) -> dict[str, Tensor]:
        """The meta-parameter `step_size` at its start, empty where it is not learned.

        Reference:
            Li, Zhou, Chen and Li (2017), Meta-SGD, for one step size a parameter.
        """
        if self.learned == "none":
            return {}
        shape = {"scalar": (), "site": (len(self.blocks(dim)),), "parameter": (dim,)}[self.learned]
        return {"step_size": torch.full(shape, self.value(dim))}

    def init(self, prior: Tensors) -> ParticleState:
        """Starts at `prior["particles"]`, (M, D), with the learned or the fixed step size."""
        particles = prior["particles"]
        zero = particles.new_zeros(())
        moment = torch.zeros_like(particles) if self.kind(particles.shape[1]) == "adaptive" else zero
        return ParticleState(particles, self._step_size(prior), moment, zero)

    def _step_size(self, prior: Tensors) -> Tensor:
        particles = prior["particles"]
        dim = particles.shape[1]
        if self.learned == "none":
            return particles.new_tensor(self.value(dim))
        learned = prior["step_size"]
        if self.learned != "site":
            return learned
        blocks = self.blocks(dim)
        return torch.cat([learned[i].expand(b.stop - b.start) for i, b in enumerate(blocks)])


def advance(rule: StepRule, state: ParticleState, direction: Tensor) -> ParticleState:
    """Moves every particle along its direction, (M, D), and counts the step."""
    second_moment = state.second_moment
    if rule.kind(direction.shape[1]) == "adaptive":
        second_moment, direction = _scale_adaptively(second_moment, direction, state.num_updates)
    particles = state.particles + state.step_size * direction
    return ParticleState(particles, state.step_size, second_moment, state.num_updates + 1)


def _scale_adaptively(second_moment: Tensor, direction: Tensor, num_updates: Tensor) -> tuple[Tensor, Tensor]:
    """AdaGrad with decay, as Liu and Wang (2016) run SVGD; the epsilon inside the root keeps it smooth.

    Returns:
        The new second moment and the scaled direction, (M, D) each.
    """
    squared = direction.square()
    decayed = torch.where(num_updates == 0, squared, _DECAY * second_moment + (1 - _DECAY) * squared)
    return decayed, direction / torch.sqrt(decayed + _EPSILON)


def resample(state: ParticleState, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws from equally weighted particles, each one as often as any other: (S, D).

    Whole passes over all particles come first; the rest is drawn without replacement.
    """
    num_particles = state.particles.shape[0]
    passes, rest = divmod(num_samples, num_particles)
    index = torch.arange(num_particles).repeat(passes)
    extra = torch.randperm(num_particles, generator=generator)[:rest]
    return state.particles[torch.cat([index, extra]).to(state.particles.device)]


def smooth_resample(state: ParticleState, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draws from a Gaussian mixture around the particles that keeps their mean and covariance: (S, D).

    A handful of particles has no tails; the mixture has. Components are shrunk toward the mean, their
    width is Silverman's rule. With no more particles than dimensions, particles are drawn as they are.

    Reference:
        Liu and West (2001), Combined parameter and state estimation in simulation-based filtering, section
        10.3.2.
    """
    num, dim = state.particles.shape
    drawn = resample(state, num_samples, generator)
    if num <= dim + 1:
        return drawn
    mean = state.particles.mean(0)
    centred = (state.particles - mean) * (num / (num - 1)) ** 0.5
    width = silverman_width(num, dim)
    weights = torch.randn(num_samples, num, generator=generator, dtype=mean.dtype).to(mean.device) / num**0.5
    scale = ((1 - width**2) * num / (num - 1)) ** 0.5
    return mean + scale * (drawn - mean) + width * (weights @ centred)


def silverman_width(num: int, dim: int) -> float:
    """Width of each of `num` Gaussian components, relative to the whole, in `dim` dimensions."""
    return min((4 / (num * (dim + 2))) ** (1 / (dim + 4)), 0.95)
