"""Sections of a report on what was asked and what was learned."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmaml_ppl.plots import draw_learning, encode_png
from bmaml_ppl.plots.style import flatten_sites
from bmaml_ppl.report.page import Html, code, figure, join, number, paragraph, section, table
from bmaml_ppl.report.run import Run
from bmaml_ppl.runs import describe_values

__all__ = ["describe_learning", "describe_learned", "describe_setup", "name_columns"]

_MOST_LATENTS = 24
_LAST_SHARE = 0.2


def name_columns(columns: str | list[str]) -> str:
    """Columns as text."""
    return columns if isinstance(columns, str) else ", ".join(columns)


def describe_setup(run: Run) -> Html:
    """The model, the columns, the settings and the versions."""
    settings = run.settings
    shown = {name: value for name, value in asdict(settings).items() if name not in ("input", "output", "constant")}
    when = f"{run.learned_at:%Y-%m-%d %H:%M} UTC"
    return join(
        paragraph(
            "The model below describes one task. What it asks of",
            code("pyro.param"),
            "(or of a network) is shared by all tasks and was learned; what it draws by",
            code("pyro.sample"),
            "is each task's own. This is the file as it is now; its sites and densities are those of the learned "
            "prior.",
        ),
        section("Model", paragraph(code(Path(settings.model).name)), code(run.source, block=True)),
        section("Data", table("Columns", ["column", "keyword of the model", "role", "model's unit"], _columns(run))),
        section(
            "Settings",
            table("Settings of the run", ["setting", "value"], [(k, _show(v)) for k, v in shown.items()]),
            table("Versions", ["package", "version"], [*run.versions.items(), ("prior written", when)]),
        ),
    )


def _columns(run: Run) -> Iterator[tuple[str, str, str, str]]:
    settings, scaling = run.settings, run.prior.scaling
    yield settings.task, "–", "labels the task", "–"
    roles = (("input", settings.input), ("output", settings.output), ("once a task", settings.constant))
    for role, columns in roles:
        for key, names in columns.items():
            unit = "as in the file"
            if scaling is not None and key in scaling.loc:
                loc, scale = describe_values(scaling.loc[key]), describe_values(scaling.scale[key])
                unit = f"standard deviations ({scale}) from the mean ({loc})"
            yield name_columns(names), key, role, unit


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={entry}" for key, entry in value.items()) or "defaults"
    return str(value)


def describe_learned(run: Run) -> Html:
    """The learned parameters, and what the prior expects of a task's latents."""
    prior = run.prior
    rows = [
        (
            name,
            _show_shape(value),
            "the model" if name in prior.density.prior else prior.inference.name,
            describe_values(value),
        )
        for name, value in prior.params.items()
    ]
    shared, own = ", ".join(prior.density.prior) or "nothing but the particles' start", ", ".join(prior.density.sites)
    return join(
        paragraph(
            f"Shared by all tasks: {shared}. Each task's own: {own}. The values are those that let "
            f"{prior.inference.name} adapt to a task from {run.shown_shots} of its observations. Parameters and "
            "latents are in the model's units (see Data)."
        ),
        table("Learned parameters", ["parameter", "shape", "of", "value"], rows),
        _describe_latents(run),
    )


def _show_shape(value: Tensor) -> str:
    return " × ".join(map(str, value.shape)) or "one number"


def _describe_latents(run: Run) -> Html:
    names, draws = flatten_sites(_draw_latents(run), 1)
    headers = ["latent", "mean", "standard deviation", "5 %", "50 %", "95 %"]
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    rows = [
        (name, x.mean().item(), x.std().item(), *x.quantile(levels).tolist())
        for name, x in zip(names[:_MOST_LATENTS], draws.double().T, strict=False)
    ]
    shown = f"; the first {_MOST_LATENTS} of {len(names)}" if len(names) > _MOST_LATENTS else ""
    return table(f"What the prior expects of a new task's latents{shown}", headers, rows)


def _draw_latents(run: Run) -> dict[str, Tensor]:
    prior = run.prior
    example = prior.template.example(2, prior.like)
    inputs = {key: value for key, value in example.items() if key not in prior.template.outputs}
    return {name: value.cpu() for name, value in prior.sites(**inputs, num_samples=1000).items()}


def describe_learning(run: Run) -> Html:
    """The learning curves."""
    loss = torch.tensor(run.history.loss, dtype=torch.float64)
    if not len(loss):
        return paragraph("No meta-step was made, or its history is gone: there is no learning curve.")
    part = max(1, round(_LAST_SHARE * len(loss)))
    first, before, last = (x.median().item() for x in (loss[:part], loss[-2 * part : -part], loss[-part:]))
    tail = f"The median loss was {number(first)} in the first fifth of {len(loss)} steps and {number(last)} in the last"
    moved = "" if len(loss) < 10 else f" ({number(before)} in the fifth before)"
    alt = f"{tail}{moved}; the curves of loss and gradient norm over the steps."
    return join(
        paragraph(
            f"{tail}{moved}. Each step sees other tasks, so single steps scatter. A curve that still falls at its end "
            "asks for more steps; one that has settled is no proof that the best prior was found."
        ),
        figure(encode_png(draw_learning(run.history)), alt, "Loss and gradient norm of each meta-step."),
    )
