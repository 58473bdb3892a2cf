"""Sinusoids and lines mixed: an ambiguous support set has a posterior of two modes, and who finds both."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.datasets.sine_line import AmbiguousTask, ambiguous_task, sine_line
from bmaml_ppl.diagnostics import scores
from bmaml_ppl.inference import mean_field, platipus
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.meta import MetaStep, meta_learn
from bmaml_ppl.models import hierarchical_regression
from bmaml_ppl.objectives import Objective
from bmaml_ppl.posterior import Posterior
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, Model
from bmaml_ppl.variational_objectives import elbo, platipus_loss

__all__ = ["METHODS", "QUICK", "Method", "SineLineSettings", "measure_ambiguity", "run_sine_line"]

_BLUE, _ORANGE, _BLACK = "#0072B2", "#D55E00", "#000000"


class Method(NamedTuple):
    """One method of the study.

    Attributes:
        title: Of its panel.
        inference: Adaptation in training.
        objective: What is minimised.
        at_test: Settings of the inference that differ after training.
    """

    title: str
    inference: Inference
    objective: Objective
    at_test: dict[str, Any]


_STEPS: dict[str, Any] = {"num_steps": 5, "preconditioner": "none", "learn_step_size": "parameter"}

METHODS: dict[str, Callable[[], Method]] = {
    "abml": lambda: Method("ABML", mean_field(num_particles=2, step_size=2e-3, **_STEPS), elbo(0.1), {}),
    "platipus": lambda: Method(
        "PLATIPUS",
        platipus(num_particles=1, step_size=4e-3, posterior_scale=0.03, **_STEPS),
        platipus_loss(0.1),
        {"num_particles": 100},
    ),
}
"""Methods by name; each is made anew."""


@dataclass(frozen=True)
class SineLineSettings:
    """What the study does.

    Attributes:
        methods: Keys of `METHODS`.
        network: Layer sizes.
        num_tasks: Training tasks.
        num_observations: Of each task.
        num_support: Observations that a training task adapts to, drawn for each.
        num_steps: Meta-steps.
        batch_size: Tasks a meta-step.
        rate: Of Adam for the weights' mean; five times that for all else, both on a cosine to zero.
        shots: Observations that a test task adapts to.
        num_test_tasks: Test tasks, of 40 observations each.
        num_draws: Of each posterior.
        seed: Of everything.
    """

    methods: tuple[str, ...] = ("abml", "platipus")
    network: tuple[int, ...] = (1, 40, 40, 1)
    num_tasks: int = 10_000
    num_observations: int = 20
    num_support: range = range(2, 11)
    num_steps: int = 4000
    batch_size: int = 25
    rate: float = 4e-3
    shots: tuple[int, ...] = (5, 10)
    num_test_tasks: int = 500
    num_draws: int = 100
    seed: int = 0


QUICK = SineLineSettings(network=(1, 8, 8, 1), num_tasks=100, num_steps=25, batch_size=5, num_test_tasks=10)
"""Far too little to learn from: shows that it runs."""


def run_sine_line(out: str | Path, settings: SineLineSettings | None = None) -> dict[str, Any]:
    """Learns each method's prior, scores it on test tasks, and draws its posterior of an ambiguous one.

    Writes `metrics.json`, `ambiguous.png` and, for each method, `NAME.safetensors` to the folder.

    Args:
        out: Folder.
        settings: None is the whole study, which takes about ten minutes a method on one core.

    Returns:
        What `metrics.json` holds: by method, scores by shots and the ambiguous task's summary.

    References:
        Finn, Xu and Levine (2018), Probabilistic Model-Agnostic Meta-Learning, section 6 and figure 3; Ravi and
        Beatson (2019), Amortized Bayesian Meta-Learning.
    """
    settings = settings or SineLineSettings()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    task = ambiguous_task()
    figure = Figure(figsize=(5.2 * len(settings.methods), 6.2), layout="constrained")
    axes = figure.subplots(2, len(settings.methods), squeeze=False, height_ratios=(3, 1), sharey="row")
    metrics: dict[str, Any] = {}
    for column, name in enumerate(settings.methods):
        method = METHODS[name]()
        prior = learn(method, settings)
        prior.save(folder / f"{name}.safetensors")
        x, functions = draw_functions(adapt(prior, method, task.support), settings.num_draws)
        position = measure_ambiguity(functions, x, task)
        metrics[name] = {**score_shots(prior, method, settings), "ambiguous": summarise(position)}
        draw_ambiguous(axes[:, column], method.title, task, x, functions, position)
    figure.savefig(folder / "ambiguous.png", dpi=150)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def make_model(settings: SineLineSettings) -> Model:
    """A network whose weights have a learned mean and standard deviation each, and a learned noise."""
    return hierarchical_regression(
        settings.network,
        center="learned",
        precisions="learned",
        initial_noise=1.0,
        initial_scale=0.03,
        activation=torch.tanh,
        seed=settings.seed,
    )


def learn(method: Method, settings: SineLineSettings) -> LearnedPrior:
    """The method's prior."""
    decay = _Decay(settings)
    return meta_learn(
        make_model(settings),
        sine_line(settings.num_tasks, settings.num_observations, seed=settings.seed).tasks,
        num_support=settings.num_support,
        inference=method.inference,
        objective=method.objective,
        num_steps=settings.num_steps,
        batch_size=settings.batch_size,
        optimizer=decay.make_optimizer,
        seed=settings.seed,
        callbacks=[decay],
    )


class _Decay:
    """Adam with two rates on a cosine: the weights' mean, the first parameter, moves more slowly."""

    def __init__(self, settings: SineLineSettings) -> None:
        self.settings = settings

    def make_optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of the meta-parameters."""
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 5 * self.settings.rate}]
        optimizer = torch.optim.Adam(groups, lr=self.settings.rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.settings.num_steps)
        return optimizer

    def __call__(self, info: MetaStep) -> None:
        """Lowers the rates after a meta-step."""
        self.schedule.step()


def adapt(prior: LearnedPrior, method: Method, tasks: Tasks) -> Posterior:
    """The posteriors of tasks."""
    inference = type(method.inference)(*method.inference)
    if method.at_test:
        inference = _rebuild(method)
    return prior.adapt(tasks, inference=inference)
