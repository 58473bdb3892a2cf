"""What the growth experiment leaves for the eye: fan charts of held-out tasks of each data set."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bmaml_ppl.experiments.growth import GrowthSettings, split_study
from bmaml_ppl.experiments.studies import STUDIES, Study
from bmaml_ppl.plots import Points, plot_task
from bmaml_ppl.storage import load_prior
from bmaml_ppl.tasks import Tasks

__all__ = ["draw_forecasts"]

_NUM_TASKS = 4
_GRID = 60


def draw_forecasts(folder: Path, settings: GrowthSettings) -> Figure:
    """Held-out tasks of the first split, predicted by the priors that Laplace's method learned; a row a data set.

    Args:
        folder: Where the priors are, such as `pigs.safetensors`.
        settings: Of the experiment.
    """
    figure = Figure(figsize=(3.2 * _NUM_TASKS, 2.9 * len(STUDIES)), layout="constrained")
    axes = figure.subplots(len(STUDIES), _NUM_TASKS, sharey="row", sharex="row", squeeze=False)
    for row, (name, study) in zip(axes, STUDIES.items(), strict=True):
        _draw_study(row, study, folder / f"{name}.safetensors", settings)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), frameon=False)
    return figure


def _draw_study(axes: list[Axes], study: Study, path: Path, settings: GrowthSettings) -> None:
    prior = load_prior(path, study.model)
    split = split_study(study, settings.seeds[0], settings)
    times = study.load().data[study.input]
    grid = torch.linspace(times.min().item(), times.max().item(), _GRID)
    support, query = split.support[: len(axes)], split.query[: len(axes)]
    inputs: dict[str, Any] = {study.input: grid.expand(len(support), -1)}
    draws = prior.adapt(support).predict(num_samples=4000, **inputs)["obs"]
    for i, ax in enumerate(axes):
        labels = study.labels if i == 0 else (study.labels[0], "")
        title = f"{study.title}\n{support.names[i]}" if i == 0 else f"\n{support.names[i]}"
        seen, held_out = _points(support[i], study), _points(query[i], study)
        plot_task(draws[:, i], grid, seen, held_out, ax, labels=labels, title=title)


def _points(task: Tasks, study: Study) -> Points:
    return task.data[study.input][0], task.data[study.output][0]
