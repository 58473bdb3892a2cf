"""How each method of the study learns its prior, and how it adapts it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from bmaml_ppl.datasets.sinusoid import SinusoidTasks, sine_offset, sinusoid
from bmaml_ppl.inference import hmc, laplace, map_estimate, mean_field, platipus, smc, svgd
from bmaml_ppl.models import hierarchical_regression, neural_linear, neural_linear_mixture, sinusoid_program
from bmaml_ppl.objectives import Objective, chaser, elbo, evidence, platipus_loss, query_nll
from bmaml_ppl.types import Inference, Model

__all__ = ["ABLATIONS", "FAIR", "METHODS", "PICTURES", "RECIPES", "RELEASED", "Recipe", "make_optimizer"]

NETWORK = (1, 40, 40, 40, 1)
NUM_PARTICLES = 10
_KL_WEIGHT = 0.02
_EVERY_SHOTS: dict[str, Any] = {
    "num_points": lambda shots: 20,
    "num_support": range(4, 20),
    "shares_shots": True,
}
"""One prior for every K, learned from tasks of 20 points."""


@dataclass(frozen=True)
class Recipe:
    """One method.

    Attributes:
        title: Its name in tables.
        model: Makes the Pyro model of one task.
        inference: Adaptation in training, by K.
        objective: What is minimised.
        num_steps: Meta-steps.
        batch_size: Tasks a meta-step.
        rate: Of Adam.
        schedule: "cosine" to zero, or "released": times .98 at each hundredth of the run.
        num_points: Observations of a training task, by K.
        num_support: Of these, how many a training task adapts to, by K; None is K.
        shares_shots: Whether one prior serves every K.
        first_order: Whether gradients stop at the scores.
        max_grad_norm: Longer meta-gradients are shortened to it.
        at_test: Adaptation after training; None is that of training.
        num_draws: Of each posterior; None takes each particle once.
        prior_of: Key of the recipe whose prior it adapts; None learns its own.
        draw_tasks: Of training.
    """

    title: str
    model: Callable[[], Model]
    inference: Callable[[int], Inference]
    objective: Objective
    num_steps: int = 6_000
    batch_size: int = 10
    rate: float = 3e-3
    schedule: str = "cosine"
    num_points: Callable[[int], int] = lambda shots: 2 * shots
    num_support: range | None = None
    shares_shots: bool = False
    first_order: bool = False
    max_grad_norm: float = 10.0
    at_test: Callable[[int], Inference] | None = None
    num_draws: int | None = None
    prior_of: str | None = None
    draw_tasks: Callable[..., SinusoidTasks] = sinusoid

    def describe(self, shots: int) -> dict[str, object]:
        """All that decides the result, as JSON values."""
        test = self.inference if self.at_test is None else self.at_test
        return {
            "model": _describe_model(self.model),
            "inference": [self.inference(shots).name, self.inference(shots).config],
            "objective": str(self.objective),
            "tasks_of": self.draw_tasks.__name__,
            "num_steps": self.num_steps,
            "batch_size": self.batch_size,
            "rate": self.rate,
            "schedule": self.schedule,
            "num_points": self.num_points(shots),
            "num_support": shots if self.num_support is None else [self.num_support.start, self.num_support.stop],
            "first_order": self.first_order,
            "max_grad_norm": self.max_grad_norm,
            "at_test": [test(shots).name, test(shots).config],
        }


def _describe_model(make: Callable[..., Model]) -> object:
    """The factory's name and arguments, as JSON values."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else getattr(value, "__name__", value)

    if not isinstance(make, partial):
        return make.__name__
    return [make.func.__name__, *map(plain, make.args), {name: plain(value) for name, value in make.keywords.items()}]


def make_optimizer(recipe: Recipe) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Makes Adam, whose rate falls as the recipe says."""

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(params, lr=recipe.rate)
        num = max(recipe.num_steps, 1)
        schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num)
        if recipe.schedule == "released":
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(num // 100, 1), 0.98)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer

    return make


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


def _svgd(num_particles: int = NUM_PARTICLES, **more: Any) -> Callable[[int], Inference]:
    """SVGD with one kernel; its direction is a mean over the particles, so that steps are as many times longer."""
    settings: dict[str, Any] = {"num_particles": num_particles, "structure": "joint", **_LEARNED, **more}
    return lambda shots: svgd(**{"step_size": 0.02 * num_particles / shots, **settings})


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
        at_test=_point(1, step_size=2e-4, learn_step_size="none"),
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
        evidence("query", eta=0.5),
        num_steps=4_000,
    ),
    "abml": Recipe(
        "ABML", _learned_network, _abml(2), elbo(_KL_WEIGHT), num_steps=4_000, at_test=_abml(10), num_draws=100
    ),
    "platipus": Recipe("PLATIPUS", _learned_network, _platipus(1), platipus_loss(_KL_WEIGHT), at_test=_platipus(100)),
    "maml_newton": Recipe("MAML, Gauss-Newton steps", _smooth_network, _newton, query_nll(), num_steps=10_000),
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
        at_test=_point(1, num_steps=1, step_size=2e-4, learn_step_size="none"),
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
_AS_RELEASED: dict[str, Any] = {"num_steps": 100_000, "schedule": "released", "max_grad_norm": 1e9, "rate": 1e-3}

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
"""Figure 1's methods with the settings of the authors' code: a squared error for two, a noise model for the third."""

FAIR = ("meta_sgd", "emaml", "bmaml_chaser", "bmaml")
"""Figure 1's methods with one likelihood and prior, and learned step sizes for all."""

_ABLATED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no repulsion": {"repulsion": 0.0},
    "half the repulsion": {"repulsion": 0.5},
    "a narrow kernel: particles all but independent": {"bandwidth": 10.0},
    "the released bandwidth": {"bandwidth": "released"},
    "inverse multiquadric kernel": {"kernel": "imq"},
    "a kernel per site": {"structure": "site"},
    "a kernel per coordinate": {"structure": "coordinate"},
    "1 particle": {"num_particles": 1},
    "5 particles": {"num_particles": 5},
    "20 particles": {"num_particles": 20},
    "1 step": {"num_steps": 1},
    "10 steps": {"num_steps": 10},
    "fixed step size": {"learn_step_size": "none"},
    "one step size": {"learn_step_size": "scalar"},
}


def _ablate() -> dict[str, Recipe]:
    found = {
        f"ablated_{i}": Recipe(title, _network, _svgd(**changed), query_nll("mean"))
        for i, (title, changed) in enumerate(_ABLATED.items())
    }
    # A chaser that may choose the steps makes leader and follower agree by hardly moving.
    fixed, adaptive = _svgd(learn_step_size="none"), _svgd(**_ADAPTIVE)
    others = {
        "fixed step size, chaser, 1 leader step": Recipe("", _network, fixed, chaser(1, sites=["weights"])),
        "fixed step size, chaser, 5 leader steps": Recipe("", _network, fixed, chaser(5, sites=["weights"])),
        "fixed step size, chaser and query": Recipe(
            "", _network, fixed, chaser(1, sites=["weights"]) + query_nll("mean")
        ),
        "query of the mixture": Recipe("", _network, _svgd(), query_nll()),
        "noise of 1, not inferred": Recipe("", partial(_given, {"gamma": 1.0, "lam": 1.0}), _svgd(), query_nll("mean")),
        "adaptive steps": Recipe("", _network, adaptive, query_nll("mean")),
        "adaptive steps, weights' precision inferred": Recipe("", partial(_given, {}), adaptive, query_nll("mean")),
    }
    later = enumerate(others.items(), len(found))
    return found | {f"ablated_{i}": replace(recipe, title=title) for i, (title, recipe) in later}


ABLATIONS = _ablate()
"""BMAML with one thing changed at a time."""

RECIPES: dict[str, Recipe] = {**METHODS, **PICTURES, **RELEASED, **ABLATIONS}
"""Everything that a cell can be."""
