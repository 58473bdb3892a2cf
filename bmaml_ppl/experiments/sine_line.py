"""Sinusoids and lines mixed: an ambiguous support set has a posterior of two modes, and who finds both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from bmaml_ppl.loop import MetaStep
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.models import hierarchical_regression
from bmaml_ppl.objectives import Objective, elbo, platipus_loss, query_nll
from bmaml_ppl.posterior import Posterior
from bmaml_ppl.storage import load_prior
from bmaml_ppl.types import Inference, Model

__all__ = ["METHODS", "QUICK", "Method", "SineLineSettings", "format_metrics", "measure_ambiguity", "run_sine_line"]

_BLUE, _ORANGE, _BLACK, _GREY = "#0072B2", "#D55E00", "#000000", "#767676"
_KL_WEIGHT = 0.02


class Method(NamedTuple):
    """One method of the study.

    Attributes:
        title: Of its panel.
        inference: Adaptation in training.
        objective: What is minimised.
        at_test: Adaptation after training, with more draws.
        scale: Standard deviation of the weights' prior, and of what PLATIPUS draws from, at the start.
        batch_size: Tasks a meta-step.
        effort: Share of the study's meta-steps that it takes: those of ABML are slow.
        follows: The method whose prior it goes on from, or None.
    """

    title: str
    inference: Inference
    objective: Objective
    at_test: Inference
    scale: float = 0.05
    batch_size: int = 25
    effort: float = 1.0
    follows: str | None = None


def _abml(num_particles: int) -> Inference:
    return mean_field(
        num_particles=num_particles,
        num_steps=5,
        step_size=0.1,
        learn_step_size="parameter",
        preconditioner="natural",
        kl_weight=_KL_WEIGHT,
    )


def _platipus(num_particles: int) -> Inference:
    return platipus(
        num_particles=num_particles,
        num_steps=5,
        step_size=4e-3,
        learn_step_size="parameter",
        preconditioner="none",
        posterior_scale=0.05,
    )


METHODS: dict[str, Method] = {
    "abml": Method("ABML", _abml(2), elbo(_KL_WEIGHT), _abml(10), scale=0.02, effort=0.4),
    "platipus": Method("PLATIPUS", _platipus(1), platipus_loss(_KL_WEIGHT), _platipus(100)),
    "mixture": Method(
        "PLATIPUS, mixture likelihood",
        _platipus(8),
        query_nll("mixture"),
        _platipus(100),
        batch_size=16,
        effort=4.0,
        follows="platipus",
    ),
}
"""The methods by name. Divergences weigh little: with 1, that of two thousand weights drowns twenty observations. A
published PLATIPUS draw answers for the query alone; draws that answer for it together need not all be right, so that
some keep to lines and others to sinusoids."""


_AMBIGUOUS = {"ambiguous": ambiguous_task(), "ambiguous, central": ambiguous_task(phase=0.3, width=0.9)}


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
        rate: Of Adam for the weights' mean; four times that for all else, both on a cosine to zero.
        shots: Observations that a test task adapts to.
        num_test_tasks: Test tasks, of 40 observations each.
        num_draws: Of each posterior.
        seed: Of everything.
    """

    methods: tuple[str, ...] = ("abml", "platipus", "mixture")
    network: tuple[int, ...] = (1, 40, 40, 1)
    num_tasks: int = 10_000
    num_observations: int = 20
    num_support: range = range(2, 8)
    num_steps: int = 3000
    rate: float = 4e-3
    shots: tuple[int, ...] = (3, 5)
    num_test_tasks: int = 500
    num_draws: int = 100
    seed: int = 0


QUICK = SineLineSettings(network=(1, 8, 8, 1), num_tasks=100, num_steps=5, num_test_tasks=10)
"""Far too little to learn from: shows that it runs."""


def run_sine_line(out: str | Path, settings: SineLineSettings | None = None) -> dict[str, Any]:
    """Learns each method's prior, scores it on test tasks, and draws its posterior of ambiguous ones.

    Writes `metrics.json`, `ambiguous.png` and, for each method, `NAME.safetensors` with its settings in `NAME.txt` to
    the folder. A prior that is already there with the same settings is not learned again.

    Args:
        out: Folder.
        settings: None is the whole study, which takes about 17 minutes on one core.

    Returns:
        What `metrics.json` holds: by method, scores by shots and the shares of functions near either curve of each
            ambiguous task.

    References:
        Finn, Xu and Levine (2018), Probabilistic Model-Agnostic Meta-Learning, section 6 and figure 3; Ravi and
        Beatson (2019), Amortized Bayesian Meta-Learning.
    """
    settings = settings or SineLineSettings()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Any] = {}
    priors: dict[str, LearnedPrior] = {}
    for name in settings.methods:
        priors[name] = _keep_or_learn(folder, name, settings, priors)
        metrics[name] = score_shots(priors[name], METHODS[name], settings)
    figure, summaries = draw_ambiguous(priors, settings.num_draws)
    for name, summary in summaries.items():
        metrics[name].update(summary)
    figure.savefig(folder / "ambiguous.png", dpi=110)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _keep_or_learn(
    folder: Path, name: str, settings: SineLineSettings, priors: Mapping[str, LearnedPrior]
) -> LearnedPrior:
    method, path, record = METHODS[name], folder / f"{name}.safetensors", folder / f"{name}.txt"
    told = f"{replace(settings, methods=())}\n{method.inference.config}\n{method.objective}\n"
    if path.exists() and record.exists() and record.read_text() == told:
        return load_prior(path, make_model(settings, method.scale))
    if method.follows is not None and method.follows not in priors:
        raise ValueError(f"method {name!r} goes on from {method.follows!r}; name that before it in methods=...")
    prior = learn(method, settings, None if method.follows is None else priors[method.follows])
    prior.save(path)
    record.write_text(told)
    return prior


def make_model(settings: SineLineSettings, scale: float) -> Model:
    """A network whose weights have a learned mean and standard deviation each, and a learned noise."""
    return hierarchical_regression(
        settings.network,
        center="learned",
        precisions="learned",
        initial_noise=1.0,
        initial_scale=scale,
        activation=torch.tanh,
        seed=settings.seed,
    )


def learn(method: Method, settings: SineLineSettings, start: LearnedPrior | None = None) -> LearnedPrior:
    """The method's prior, learned from the beginning or from another prior."""
    settings = replace(settings, num_steps=round(method.effort * settings.num_steps))
    decay = _Decay(settings)
    return meta_learn(
        make_model(settings, method.scale),
        sine_line(settings.num_tasks, settings.num_observations, seed=settings.seed).tasks,
        num_support=settings.num_support,
        inference=method.inference,
        objective=method.objective,
        num_steps=settings.num_steps,
        batch_size=method.batch_size,
        optimizer=decay.make_optimizer,
        seed=settings.seed,
        start=start,
        callbacks=[decay],
    )


class _Decay:
    """Adam with two rates on a cosine: the weights' mean, the first parameter, moves more slowly."""

    def __init__(self, settings: SineLineSettings) -> None:
        self.settings = settings

    def make_optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of the meta-parameters."""
        groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "lr": 4 * self.settings.rate}]
        optimizer = torch.optim.Adam(groups, lr=self.settings.rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.settings.num_steps)
        return optimizer

    def __call__(self, info: MetaStep) -> None:
        """Lowers the rates after a meta-step."""
        self.schedule.step()


def draw_functions(prior: LearnedPrior, posterior: Posterior, num_draws: int) -> tuple[Tensor, Tensor]:
    """Noiseless functions of one task's posterior on a grid.

    Returns:
        The grid, (N,), and the functions, (S, N).
    """
    x = torch.linspace(-5, 5, 101)
    grid = {"x": x, "y": torch.zeros_like(x)}

    def evaluate(z: Tensor) -> Tensor:
        mean: Tensor = prior.density.observe(z, prior.params, grid)["obs"].fn.mean
        return mean

    with torch.no_grad():
        return x, vmap(evaluate)(posterior.draws(num_draws)[:, 0])


def measure_ambiguity(functions: Tensor, x: Tensor, task: AmbiguousTask) -> Tensor:
    """Where functions lie between the task's line and its sinusoid, (S,): 0 is at the line and 1 at the sinusoid.

    Args:
        functions: (S, N).
        x: (N,).
        task: Whose two curves explain the support set.
    """
    line, sine = _curves(x, task)
    apart = sine - line
    return (functions - line) @ apart / apart.square().sum()


def _curves(x: Tensor, task: AmbiguousTask) -> tuple[Tensor, Tensor]:
    line = task.line["slope"] * x + task.line["intercept"]
    return line, task.sine["amplitude"] * torch.sin(x - task.sine["phase"])


def summarise(position: Tensor) -> dict[str, float]:
    """Shares of functions near the line, near the sinusoid (a quarter of the way at most), and midway."""
    near_line, near_sine = position < 0.25, position > 0.75
    shares = {"line": near_line, "sine": near_sine, "between": ~(near_line | near_sine)}
    return {name: share.double().mean().item() for name, share in shares.items()}


def score_shots(prior: LearnedPrior, method: Method, settings: SineLineSettings) -> dict[str, dict[str, float]]:
    """Scores of held-out observations of test tasks, by shots, in units of y and nats an observation."""
    tasks = sine_line(settings.num_test_tasks, 40, seed=settings.seed + 1).tasks
    scored = {}
    for shots in settings.shots:
        support, query = tasks.split_observations(shots, torch.Generator().manual_seed(settings.seed))
        posterior = prior.adapt(support, inference=method.at_test)
        draws = posterior.predict(query, num_samples=settings.num_draws)["obs"]
        log_density = posterior.log_likelihood(query, num_samples=settings.num_draws)["obs"]
        target = query.data["y"]
        scored[f"{shots} shots"] = {
            "rmse": scores.rmse(draws.mean(0), target).item(),
            "nll": -scores.mixture_log_density(log_density).mean().item(),
            "coverage90": scores.coverage(draws, target, 0.9).item(),
        }
    return scored


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The scores as text, a line a method and number of shots, and the shares of each ambiguous task."""
    lines = []
    for name, found in metrics.items():
        for what, values in found.items():
            shown = ", ".join(f"{key} {value:.2f}" for key, value in values.items())
            lines.append(f"{METHODS[name].title}, {what}: {shown}")
    return "\n".join(lines)


def draw_ambiguous(
    priors: Mapping[str, LearnedPrior], num_draws: int
) -> tuple[Figure, dict[str, dict[str, dict[str, float]]]]:
    """Posterior functions of ambiguous support sets, a column a method, and their summaries by method and set."""
    columns, rows = len(priors), len(_AMBIGUOUS)
    figure = Figure(figsize=(5.2 * columns, 6 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=(3, 1) * rows, sharey="row")
    summaries: dict[str, dict[str, dict[str, float]]] = {name: {} for name in priors}
    for column, (name, prior) in enumerate(priors.items()):
        for row, (where, task) in enumerate(_AMBIGUOUS.items()):
            posterior = prior.adapt(task.support, inference=METHODS[name].at_test)
            x, functions = draw_functions(prior, posterior, num_draws)
            position = measure_ambiguity(functions, x, task)
            summaries[name][where] = summarise(position)
            above, below = axes[2 * row : 2 * row + 2, column]
            _draw_functions(above, task, x, functions, position)
            above.set_title(METHODS[name].title if row == 0 else "")
            _draw_positions(below, position)
    return figure, summaries


def _draw_functions(ax: Axes, task: AmbiguousTask, x: Tensor, functions: Tensor, position: Tensor) -> None:
    """Functions in the colour of the curve that each is nearer to."""
    for color, chosen in ((_BLUE, position < 0.5), (_ORANGE, position >= 0.5)):
        ax.plot(x, functions[chosen].T, color=color, lw=0.6, alpha=0.5)
    for curve, style, label in zip(_curves(x, task), ("--", ":"), ("the line", "the sinusoid"), strict=True):
        ax.plot(x, curve, style, color=_BLACK, lw=1.8, label=label)
    ax.plot(task.support.data["x"][0], task.support.data["y"][0], "o", color=_BLACK, ms=6, label="seen")
    ax.set(xlabel="x", ylabel="y", ylim=(-13, 10))
    ax.legend(frameon=False, loc="lower right")


def _draw_positions(ax: Axes, position: Tensor) -> None:
    edges = torch.linspace(-0.6, 1.6, 34).tolist()
    ax.hist(position.clamp(-0.59, 1.59).tolist(), edges, color=_GREY)
    for at, style in ((0, "--"), (1, ":")):
        ax.axvline(at, ls=style, color=_BLACK)
    ax.set(xlabel="from the line (0) to the sinusoid (1)", ylabel="functions")
