"""Point estimation by gradient steps: MAML's inner loop, ML-POINT, and independent ensembles of them."""

from collections.abc import Mapping
from functools import partial

import torch

from bmaml_ppl.checks import check_count
from bmaml_ppl.inference.derivatives import curvature_factor, hessians, safe_fraction, scores
from bmaml_ppl.inference.particles import (
    LearnedStepSize,
    ParticleState,
    Preconditioner,
    StepRule,
    advance,
    resample,
)
from bmaml_ppl.types import Inference, LogDensity, SiteLayout, Start

__all__ = ["map_estimate", "update"]

_SLACK = 0.01


def map_estimate(
    *,
    num_particles: int = 1,
    num_steps: int = 5,
    step_size: float | None = None,
    learn_step_size: LearnedStepSize = "none",
    preconditioner: Preconditioner = "auto",
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
            "curvature" by each particle's own damped Hessian; "auto" chooses by the number of latents.
        init: "free" starts at learned particles, "prior" at draws from the model's own prior.
        sites: Layout of z; given by the learner.

    References:
        Finn, Abbeel and Levine (2017), Model-Agnostic Meta-Learning, equation 1; Grant et al. (2018),
        Recasting Gradient-Based Meta-Learning as Hierarchical Bayes, subroutine 3 (ML-POINT).
    """
    config = {
        "num_particles": num_particles,
        "num_steps": num_steps,
        "step_size": step_size,
        "learn_step_size": learn_step_size,
        "preconditioner": preconditioner,
        "init": init,
    }
    check_count("num_particles", num_particles, least=1)
    check_count("num_steps", num_steps, least=0)
    rule = StepRule(step_size, learn_step_size, preconditioner, sites)
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
    )


def update(state: ParticleState, log_density: LogDensity, *, rule: StepRule) -> ParticleState:
    """One step of every particle; see `map_estimate`."""
    direction = scores(log_density, state.particles)
    if rule.kind(direction.shape[1]) == "curvature":
        factor = curvature_factor(-hessians(log_density, state.particles))
        direction = torch.cholesky_solve(direction.unsqueeze(-1), factor).squeeze(-1)
        direction = direction * safe_fraction(log_density, state.particles, state.step_size * direction, _SLACK)
    return advance(rule, state, direction)
