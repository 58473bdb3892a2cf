"""How each method of the study learns its prior, and how it adapts it."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro import poutine

from bmaml_ppl.datasets.sinusoid import sine_offset
from bmaml_ppl.experiments.sinusoid.recipe import Recipe
from bmaml_ppl.inference import hmc, laplace, map_estimate, mean_field, platipus, smc, svgd
from bmaml_ppl.models import hierarchical_regression, neural_linear, neural_linear_mixture, sinusoid_program
from bmaml_ppl.objectives import Objective, chaser, elbo, evidence, platipus_loss, query_nll
from bmaml_ppl.types import Inference, Model

__all__ = ["ABLATIONS", "FAIR", "METHODS", "PICTURES", "RECIPES", "RELEASED"]

NETWORK = (1, 40, 40, 40, 1)
NUM_PARTICLES = 10
_KL_WEIGHT = 0.02
_EVERY_SHOTS: dict[str, Any] = {
    "num_points": lambda shots: 20,
    "num_support": range(4, 20),
    "shares_shots": True,
}
"""One prior for every K, learned from tasks of 20 points."""


def _given(known: dict[str, float], **more: Any) -> Model:
    """A network some of whose precisions are known; noise begins at 1, with which first steps are of MAML's length."""
    fixed: dict[str, Any] = {name: torch.tensor(value) for name, value in known.items()}
    model: Model = poutine.do(hierarchical_regression(NETWORK, **{"initial_noise": 1.0, **more}), data=fixed)
    return model


_network = partial(_given, {"lam": 1.0})
"""The same likelihood and priors for all. The weights' precision, which 3,401 weights determine, is too stiff a latent
for gradient steps as long as weights need: with it, learning is slow, or lost when it overshoots."""

_spread_network = partial(_network, precision_spread=0.5)
"""Noise that starts apart: where that of all particles agrees, a kernel of its own flings it away."""

_learned_network = partial(
    hierarchical_regression, NETWORK, initial_noise=1.0, center="learned", precisions="learned", initial_scale=0.05
)
"""A learned mean and standard deviation of each weight, and a learned noise."""

_smooth_network = partial(_learned_network, initial_scale=0.1, activation=torch.tanh)
"""With tanh, of which a linear approximation holds further, and a learned prior of a useful width."""


def _newton(shots: int) -> Inference:
    """Three Gauss-Newton steps from a learned start."""
    return map_estimate(num_steps=3, step_size=1.0, preconditioner="gauss_newton", init="free")


_LEARNED: dict[str, Any] = {"num_steps": 5, "preconditioner": "none", "learn_step_size": "parameter", "init": "free"}


def _point(num_particles: int, **more: Any) -> Callable[[int], Inference]:
    """Gradient ascent of independent particles, with one learned step size a weight.

    The density is a sum over K observations: steps begin at .02 / K, of .01 along the mean squared error's gradient.
    """
    return lambda shots: map_estimate(num_particles=num_particles, **{**_LEARNED, "step_size": 0.02 / shots, **more})


_fine_tune = _point(1, step_size=1e-2, learn_step_size="none")
"""The best of seven step sizes from .0002 to .02 for a pretrained network, on 200 other tasks."""


def _svgd(num_particles: int = NUM_PARTICLES, *, length: float = 0.02, **more: Any) -> Callable[[int], Inference]:
    """SVGD with one kernel; its direction is a mean over the particles, so that steps are as many times longer."""
    settings: dict[str, Any] = {"num_particles": num_particles, "structure": "joint", **_LEARNED, **more}
    return lambda shots: svgd(**{"step_size": length * num_particles / shots, **settings})


_ADAPTIVE: dict[str, Any] = {
    "num_steps": 5,
    "step_size": 2e-2,
    "preconditioner": "adaptive",
    "learn_step_size": "parameter",
}
"""Steps that no coordinate overshoots with."""


def _laplace(shots: int) -> Inference:
    return laplace(gradient="unrolled", init="prior", **_ADAPTIVE)


def _abml(num_particles: int) -> Callable[[int], Inference]:
    settings: dict[str, Any] = {
        "num_steps": 5,
        "step_size": 0.1,
        "learn_step_size": "parameter",
        "preconditioner": "natural",
    }
    return lambda shots: mean_field(num_particles=num_particles, kl_weight=_KL_WEIGHT, **settings)


def _platipus(num_particles: int) -> Callable[[int], Inference]:
    return lambda shots: platipus(num_particles=num_particles, posterior_scale=0.05, **_ADAPTIVE)


def _starts(num: int, num_steps: int) -> Callable[[int], Inference]:
    """Laplace's method from many draws of the prior, each mode weighted by its evidence."""
    return lambda shots: laplace(num_particles=num, num_steps=num_steps, preconditioner="curvature", init="prior")


def _last_layer(title: str, objective: Objective, **more: Any) -> Recipe:
    """Particles of the last layer alone, in whitened coordinates, on features that all tasks share."""
    settings: dict[str, Any] = {"num_particles": NUM_PARTICLES, "num_steps": 5, **more}
    return Recipe(
        title,
        partial(neural_linear, (1, 64, 64, 32)),
        lambda shots: svgd(**settings),
        objective,
        num_steps=3_000,
        rate=5e-3,
        **_EVERY_SHOTS,
    )


_NEURAL_LINEAR = Recipe(
    "neural linear, evidence",
    partial(neural_linear, (1, 64, 64, 64)),
    lambda shots: laplace(),
    evidence(),
    num_steps=5_000,
    rate=1e-3,
    **_EVERY_SHOTS,
    num_draws=200,
)
_PROGRAM = Recipe(
    "probabilistic program",
    sinusoid_program,
    _starts(128, 20),
    evidence(),
    num_steps=300,
    rate=0.05,
    **_EVERY_SHOTS,
    at_test=_starts(512, 30),
    num_draws=200,
)

METHODS: dict[str, Recipe] = {
    "pretraining": Recipe(
        "multi-task pretraining",
        _network,
        _point(1, num_steps=0),
        query_nll("mean"),
        **_EVERY_SHOTS,
        at_test=_fine_tune,
    ),
    "fomaml": Recipe("first-order MAML", _network, _point(1, learn_step_size="none"), query_nll(), first_order=True),
    "maml": Recipe("MAML", _network, _point(1, learn_step_size="scalar"), query_nll()),
    "meta_sgd": Recipe("Meta-SGD", _network, _point(1), query_nll()),
    "emaml": Recipe("EMAML", _network, _point(NUM_PARTICLES), query_nll("mean")),
    "bmaml_chaser": Recipe("BMAML, chaser", _network, _svgd(learn_step_size="none"), chaser(1, sites=["weights"])),
    "bmaml": Recipe("BMAML, query", _network, _svgd(), query_nll("mean")),
    "bmaml_site": Recipe(
        "BMAML, query, a kernel per site", _spread_network, _svgd(structure="site"), query_nll("mean")
    ),
    "bmaml_last": _last_layer("BMAML, last layer, query", query_nll()),
    "bmaml_last_chaser": _last_layer("BMAML, last layer, chaser", chaser(1)),
    "bmaml_last_apart": _last_layer("BMAML, last layer, no repulsion", query_nll(), repulsion=0.0),
    "ml_point": Recipe("ML-POINT", _learned_network, _point(1, **_ADAPTIVE, init="prior"), query_nll()),
    "ml_laplace": Recipe(
        "ML-LAPLACE",
        _learned_network,
        _laplace,
        evidence("query", eta=1e-6),  # the weight that Grant et al. chose by cross-validation
        num_steps=4_000,
    ),
    "abml": Recipe(
        "ABML", _learned_network, _abml(2), elbo(_KL_WEIGHT), num_steps=4_000, at_test=_abml(10), num_draws=100
    ),
    "platipus": Recipe("PLATIPUS", _learned_network, _platipus(1), platipus_loss(_KL_WEIGHT), at_test=_platipus(100)),
    "maml_newton": Recipe("MAML, Gauss-Newton steps", _smooth_network, _newton, query_nll(), num_steps=4_000),
    "neural_linear": _NEURAL_LINEAR,
    "hmc": replace(
        _NEURAL_LINEAR,
        title="neural linear, HMC from its learned prior",
        prior_of="neural_linear",
        at_test=lambda shots: hmc(num_chains=2, num_warmup=600, num_draws=100, num_leapfrog=32, mass_matrix="dense"),
    ),
    "linear_mixture": Recipe(
        "mixture of neural linears, evidence",
        partial(
            neural_linear_mixture, (1, 64, 64, 32), num_components=24, rank=6, initial_scale=3.0, initial_noise=0.3
        ),
        _starts(72, 6),
        evidence(),
        num_steps=3_500,
        batch_size=20,
        **_EVERY_SHOTS,
        at_test=_starts(144, 20),
        num_draws=200,
    ),
    "program": _PROGRAM,
    "program_smc": replace(
        _PROGRAM,
        title="probabilistic program, sequential Monte Carlo",
        prior_of="program",
        at_test=lambda shots: smc(num_particles=1000, num_steps=40),
    ),
}
"""The table's rows."""

_FEW: dict[str, Any] = {"num_points": lambda shots: 40, "draw_tasks": sine_offset}

PICTURES: dict[str, Recipe] = {
    "offset_pretraining": Recipe(
        "multi-task pretraining",
        _network,
        _point(1, num_steps=0),
        query_nll("mean"),
        at_test=_fine_tune,
        **_FEW,
    ),
    "offset_maml": Recipe("MAML", _network, _point(1, learn_step_size="scalar"), query_nll(), **_FEW),
    "offset_bmaml": Recipe("BMAML", _network, _svgd(), query_nll("mean"), **_FEW),
}
"""What the pictures are drawn with, on y = a sin(b x) + c."""


_squared_error = partial(_given, {"gamma": 1.0, "lam": 1e-6})
"""Unit noise and no prior to speak of: the log density is minus half the squared error."""


def _mean_squared_error(num_particles: int) -> Callable[[int], Inference]:
    """Steps of 0.001 along the gradient of the mean squared error."""
    settings: dict[str, Any] = {
        "num_particles": num_particles,
        "num_steps": 1,
        "preconditioner": "none",
        "init": "free",
    }
    return lambda shots: map_estimate(step_size=2e-3 / shots, **settings)


_RELEASED_STEP: dict[str, Any] = {
    "num_steps": 1,
    "step_size": 1e-3,
    "preconditioner": "none",
    "learn_step_size": "none",
}
_AS_RELEASED: dict[str, Any] = {"num_steps": 15_000, "schedule": "released", "max_grad_norm": 1e9, "rate": 1e-3}

RELEASED: dict[str, Recipe] = {
    "maml_released": Recipe("MAML", _squared_error, _mean_squared_error(1), query_nll("mean"), **_AS_RELEASED),
    "emaml_released": Recipe(
        "EMAML", _squared_error, _mean_squared_error(NUM_PARTICLES), query_nll("mean"), **_AS_RELEASED
    ),
    "bmaml_released": Recipe(
        "BMAML",
        partial(hierarchical_regression, NETWORK),
        _svgd(**_RELEASED_STEP, bandwidth="released", repulsion=0.5),
        chaser(1, sites=["weights"]),
        **_AS_RELEASED,
    ),
}
"""Figure 1's methods with the settings of the authors' code: a squared error for two, a noise model for the third.
Theirs take 100,000 meta-steps."""

_SHORT: dict[str, Any] = {"num_steps": 3_000}

FAIR = {f"{name}_fair": replace(METHODS[name], **_SHORT) for name in ("meta_sgd", "emaml", "bmaml_chaser", "bmaml")}
"""Figure 1's methods with one likelihood and prior; all but the chaser learn their step sizes."""

_fixed, _adaptive = _svgd(learn_step_size="none"), _svgd(**_ADAPTIVE)
# A chaser that may choose the steps makes leader and follower agree by hardly moving.
_ABLATED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no repulsion": {"inference": _svgd(repulsion=0.0)},
    "half the repulsion": {"inference": _svgd(repulsion=0.5)},
    "a narrow kernel: particles all but independent": {"inference": _svgd(bandwidth=10.0)},
    "the released bandwidth": {"inference": _svgd(bandwidth="released")},
    "inverse multiquadric kernel": {"inference": _svgd(kernel="imq")},
    "1 particle": {"inference": _svgd(1)},
    "5 particles": {"inference": _svgd(5)},
    "20 particles": {"inference": _svgd(20)},
    "1 step": {"inference": _svgd(num_steps=1)},
    "10 steps": {"inference": _svgd(num_steps=10)},
    "steps half as long at first": {"inference": _svgd(length=0.01)},
    "steps a quarter as long at first": {"inference": _svgd(length=0.005)},
    "fixed step size": {"inference": _fixed},
    "one step size": {"inference": _svgd(learn_step_size="scalar")},
    "a kernel per site": {"model": _spread_network, "inference": _svgd(structure="site")},
    "a kernel per site, steps half as long at first": {
        "model": _spread_network,
        "inference": _svgd(structure="site", length=0.01),
    },
    "a kernel per coordinate": {"model": _spread_network, "inference": _svgd(structure="coordinate")},
    "fixed step size, chaser, 1 leader step": {"inference": _fixed, "objective": chaser(1, sites=["weights"])},
    "fixed step size, chaser, 5 leader steps": {"inference": _fixed, "objective": chaser(5, sites=["weights"])},
    "fixed step size, chaser and query": {
        "inference": _fixed,
        "objective": chaser(1, sites=["weights"]) + query_nll("mean"),
    },
    "query of the mixture": {"objective": query_nll()},
    "noise of 1, not inferred": {"model": partial(_given, {"gamma": 1.0, "lam": 1.0})},
    "adaptive steps": {"inference": _adaptive},
    "adaptive steps, weights' precision inferred": {"model": partial(_given, {}), "inference": _adaptive},
}


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower())


ABLATIONS = {
    f"ablated_{_slug(title)}": replace(METHODS["bmaml"], title=title, **_SHORT, **changes)
    for title, changes in _ABLATED.items()
}
"""BMAML with one thing changed at a time."""

RECIPES: dict[str, Recipe] = {**METHODS, **PICTURES, **RELEASED, **FAIR, **ABLATIONS}
"""Everything that a cell can be."""
