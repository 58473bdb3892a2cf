"""Point estimation by gradient steps: MAML's inner loop, ML-POINT, and independent ensembles of them."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from bmaml_ppl.checks import check_count
from bmaml_ppl.inference.curvature import measure_curvature, repair_dense
from bmaml_ppl.inference.derivatives import FirstOrder, curvature_factor, exact_density, hessians, safe_fraction, scores
from bmaml_ppl.inference.particles import (
    LearnedStepSize,
    ParticleState,
    Preconditioner,
    StepRule,
    advance,
    resample,
)
from bmaml_ppl.types import Inference, LogDensity, SiteLayout, Start

__all__ = ["check_gradient", "map_estimate", "update"]

_SLACK = 0.01
_NUM_FRACTIONS = 8


def map_estimate(
    *,
    num_particles: int = 1,
    num_steps: int = 5,
    step_size: float | None = None,
    learn_step_size: LearnedStepSize = "none",
    preconditioner: Preconditioner = "auto",
    gradient: Literal["unrolled", "implicit"] = "unrolled",
    init: Start = "auto",
    sites: Mapping[str, SiteLayout] | None = None,
) -> Inference:
    r"""Gradient ascent on a task's log joint density, :math:`z \leftarrow z + \alpha \nabla \log p(z, D)`.

    A few steps from a learned start are MAML; seen as truncated maximum a posteriori estimation they
    are ML-POINT. Several particles are independent of each other: EMAML.

    Args:
        num_particles: M, independent estimates.
        num_steps: Adaptation steps n; 0 leaves the start as it is (multi-task pretraining).
        step_size: alpha; None takes the preconditioner's default.
        learn_step_size: Whether the step size is meta-learned, and how finely (Meta-SGD: "parameter").
        preconditioner: "none" is plain gradient ascent, "adaptive" scales by a decayed second moment,
            "curvature" by each particle's own damped Hessian, "gauss_newton" solves with its Fisher information;
            "auto" is "curvature" up to 32 latents, then "adaptive".
        gradient: "unrolled" passes outer gradients through the steps; "implicit" (iMAML) takes the end for an
            optimum, which as many steps as it takes must reach, and needs a prior that is learned in the model.
        init: "free" starts at learned particles, "prior" at draws from the model's own prior.
        sites: Layout of z; given by the learner.

    References:
        Finn, Abbeel and Levine (2017), Model-Agnostic Meta-Learning, equation 1; Grant et al. (2018),
        Recasting Gradient-Based Meta-Learning as Hierarchical Bayes, subroutine 3 (ML-POINT); Rajeswaran et al.
        (2019), Meta-Learning with Implicit Gradients, equation 6.
    """
    config = {
        "num_particles": num_particles,
        "num_steps": num_steps,
        "step_size": step_size,
        "learn_step_size": learn_step_size,
        "preconditioner": preconditioner,
        "gradient": gradient,
        "init": init,
    }
    check_count("num_particles", num_particles, least=1)
    check_count("num_steps", num_steps, least=0)
    check_gradient(gradient, learn_step_size)
    rule = StepRule(step_size, learn_step_size, preconditioner, sites, exact=gradient == "implicit")
    return Inference(
        init=rule.init,
        update=partial(update, rule=rule),
        sample=resample,
        parameters=rule.parameters,
        name="map_estimate",
        config=config,
        num_particles=num_particles,
        num_steps=num_steps,
        start=init,
        implicit=gradient == "implicit",
    )


def check_gradient(gradient: str, learned: str) -> None:
    """Refuses unknown gradients, and implicit ones of a step size."""
    if gradient not in ("implicit", "unrolled"):
        raise ValueError(f'gradient={gradient!r} is not known; choose "implicit" or "unrolled"')
    if gradient == "implicit" and learned != "none":
        raise ValueError(
            f"learn_step_size={learned!r} has no implicit gradient, since an optimum does not depend on how it was "
            'found; write gradient="unrolled"'
        )


def _solve_fisher(
    log_density: LogDensity, particles: Tensor, direction: Tensor, sites: Mapping[str, SiteLayout] | None
) -> Tensor:
    """Each particle's direction, (M, D), multiplied by the inverse Fisher information of its joint density."""
    first_order = isinstance(log_density, FirstOrder)
    exact = exact_density(log_density)

    def solve(z: Tensor, score: Tensor) -> Tensor:
        precision = measure_curvature(exact, z.detach() if first_order else z, "fisher", sites=sites).precision
        if first_order:
            precision = tree_map(torch.detach, precision)
        return precision.solve(score)

    return vmap(solve)(particles, direction)


def update(state: ParticleState, log_density: LogDensity, *, rule: StepRule) -> ParticleState:
    """One step of every particle; see `map_estimate`."""
    direction = scores(log_density, state.particles)
    kind = rule.kind(direction.shape[1])
    if kind == "curvature":
        curved = -hessians(log_density, state.particles)
        factor = vmap(repair_dense)(curved).precision.factor if rule.exact else curvature_factor(curved)
        direction = torch.cholesky_solve(direction.unsqueeze(-1), factor).squeeze(-1)
    elif kind == "gauss_newton":
        direction = _solve_fisher(log_density, state.particles, direction, rule.sites)
    if kind in ("curvature", "gauss_newton"):
        move = state.step_size * direction
        fraction = safe_fraction(log_density, state.particles, move, _SLACK, _NUM_FRACTIONS)
        direction = torch.where(fraction > 0, direction * fraction, 0.0)
    return advance(rule, state, direction)
