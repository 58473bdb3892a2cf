"""What the demonstration leaves for the eye: figures of the learned prior, and a posterior for ArviZ."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bmaml_ppl.demo import DemoSettings, growth
from bmaml_ppl.diagnostics.export import save_tree
from bmaml_ppl.evaluation import Split
from bmaml_ppl.learned import History, LearnedPrior
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.plots import Points, draw_learning, plot_prior_predictive, plot_task
from bmaml_ppl.storage import load_prior
from bmaml_ppl.tasks import Tasks

__all__ = ["write_report"]

_LABELS = ("time (weeks)", "weight (kg)")
_WEEKS = torch.linspace(1, 12, 45)
_TICKS = range(2, 13, 2)


def write_report(folder: Path, split: Split, settings: DemoSettings, history: History) -> None:
    """Draws the figures and writes the posterior of the first split's growth curve.

    Args:
        folder: Where `growth.safetensors` is and everything goes.
        split: The first split.
        settings: Of the demonstration.
        history: Of the growth curve's meta-learning.
    """
    prior = load_prior(folder / "growth.safetensors", growth)
    posterior = prior.adapt(split.support)
    save_tree(posterior.to_arviz(split.query, num_samples=100), folder / "posterior.nc")
    untrained = meta_learn(
        growth, split.train, num_support=settings.num_support, num_steps=0, device="cpu", progress=False
    )
    figures = {
        "prior.png": _draw_priors(untrained, prior, split.train),
        "pigs.png": _draw_pigs(prior, split),
        "learning.png": draw_learning(history),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)


def _points(task: Tasks) -> Points:
    return task.data["time"][0], task.data["weight"][0]


def _predict(prior: LearnedPrior, support: Tasks | None = None) -> Tensor:
    """Draws of one pig's weight over the weeks, (S, N): zero-shot without weighings."""
    source = prior if support is None else prior.adapt(support)
    draws = source.predict(time=_WEEKS, num_samples=4000)["obs"]
    return draws.reshape(len(draws), -1)


def _draw_priors(before: LearnedPrior, after: LearnedPrior, train: Tasks) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    shown = [_points(task) for task in train]
    titles = ("Prior before meta-learning", f"Prior after meta-learning from {len(train)} pigs")
    for ax, prior, title in zip(axes, (before, after), titles, strict=True):
        plot_prior_predictive(
            _predict(prior), _WEEKS, ax, tasks=shown, labels=_LABELS, task_label="one training pig", title=title
        )
    axes[1].set(ylabel="", xticks=_TICKS)
    _share_legend(figure, axes[1])
    return figure


def _draw_pigs(prior: LearnedPrior, split: Split, num_pigs: int = 4) -> Figure:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, num_pigs, sharex=True, sharey=True)
    for ax, support, query in zip(axes, split.support, split.query, strict=False):
        draws = _predict(prior, support)
        title = f"Pig {support.names[0]}"
        plot_task(draws, _WEEKS, _points(support), _points(query), ax, labels=_LABELS, title=title)
    axes[0].set_xticks(_TICKS)
    for ax in axes[1:]:
        ax.set_ylabel("")
    _share_legend(figure, axes[0])
    return figure


def _share_legend(figure: Figure, ax: Axes) -> None:
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
