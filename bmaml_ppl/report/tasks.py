"""Section of a report on single tasks: fan charts, latents side by side, and a table of all."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmaml_ppl.diagnostics import scores
from bmaml_ppl.plots import draw_figure, encode_png, plot_forest, plot_task
from bmaml_ppl.plots.style import flatten_sites
from bmaml_ppl.report.assess import Assessment, Column, score_tasks
from bmaml_ppl.report.page import Html, figure, join, number, paragraph, section, table
from bmaml_ppl.report.run import Run
from bmaml_ppl.settings import Settings

__all__ = ["describe_tasks"]

_MOST_FANS, _MOST_FORESTS, _MOST_ROWS, _MOST_LISTED = 3, 3, 30, 200
_GRID = 60
_MOST_NUMBERS = 20_000_000


def describe_tasks(run: Run, found: Assessment, num_samples: int) -> Html:
    """Fan charts of the best, the median and the worst task, forests, and the table."""
    ranking = score_tasks(found)
    return join(
        paragraph(
            "Tasks are ranked by their CRPS in standard deviations of each column, which is small where predictions "
            "are near to what was observed and as sure as they may be."
        ),
        section("Best, median and worst task", *_show_fans(run, found, ranking, num_samples)),
        section("Latents of the tasks", *_show_forests(run, found, num_samples)),
        section("Every task", _tabulate(found, ranking)),
    )


def _show_fans(run: Run, found: Assessment, ranking: Tensor, num_samples: int) -> Iterator[Html]:
    key = _find_axis(run.settings, found)
    if key is None:
        yield paragraph(
            "No curves are drawn: they need one input that is one column with more than two values; the table below "
            "gives every task's scores."
        )
        return
    order = ranking.argsort(stable=True).tolist()
    chosen = dict.fromkeys((order[0], order[(len(order) - 1) // 2], order[-1]))
    labels = dict(zip((order[-1], order[(len(order) - 1) // 2], order[0]), ("worst", "median", "best"), strict=True))
    yield Html('<div class="figures">')
    for i in chosen:
        for fan in _predict_fan(run, found, i, key, num_samples)[:_MOST_FANS]:
            yield _draw_fan(fan, labels[i], ranking[i].item(), str(run.settings.input[key]))
    yield Html("</div>")


def _find_axis(settings: Settings, found: Assessment) -> str | None:
    """The keyword of the only input, if it is one column that varies."""
    if len(settings.input) != 1:
        return None
    key, column = next(iter(settings.input.items()))
    everything = found.support.join(found.query).with_mask()
    assert everything.mask is not None
    values = everything.data[key][everything.mask]
    return key if isinstance(column, str) and len(values.unique()) > 2 else None


class _Fan(NamedTuple):
    task: str
    column: str
    draws: Tensor
    x: Tensor
    seen: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def _predict_fan(run: Run, found: Assessment, index: int, key: str, num_samples: int) -> list[_Fan]:
    """What one task is predicted to be over the range of its inputs, each output column."""
    name = found.names[index]
    seen, held_out = found.support[name].data, found.query[name].data
    inputs = torch.cat([seen[key][0], held_out[key][0]])
    x = torch.linspace(inputs.min().item(), inputs.max().item(), _GRID)
    grid: dict[str, Any] = {key: x}
    draws = found.posterior[name].predict(num_samples=num_samples, **grid)
    fans = []
    for site, output in run.prior.density.observed.items():
        if output not in run.outputs:
            continue
        flat = draws[site].cpu().reshape(num_samples, _GRID, -1)
        for i, column in enumerate(run.outputs[output]):
            points = [
                (data[key][0].cpu(), data[output][0].cpu().reshape(len(data[key][0]), -1)[:, i])
                for data in (seen, held_out)
            ]
            fans.append(_Fan(name, column, flat[..., i], x, points[0], points[1]))
    return fans


def _draw_fan(fan: _Fan, rank: str, score: float, axis: str) -> Html:
    lower, upper = scores.interval_bounds(fan.draws, 0.9)
    title = f"{rank}: {fan.task}"
    drawn = draw_figure(
        plot_task,
        fan.draws,
        fan.x,
        fan.seen,
        fan.held_out,
        labels=(_plain(axis), _plain(fan.column)),
        title=_plain(title),
    )
    alt = (
        f"Predictions of {fan.column} over {axis} for task {fan.task}: {len(fan.seen[0])} points seen, "
        f"{len(fan.held_out[0])} held out, a median curve, 50 % and 90 % bands; the 90 % band is "
        f"{number((upper - lower).mean().item())} wide on average."
    )
    caption = f"{fan.column}, {rank} task {fan.task}: CRPS of {number(score)} standard deviations."
    return figure(encode_png(drawn), alt, caption)


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def _show_forests(run: Run, found: Assessment, num_samples: int) -> Iterator[Html]:
    num_tasks, dim = len(found.names), run.prior.density.dim
    num_samples = max(100, min(num_samples, _MOST_NUMBERS // (num_tasks * dim)))
    names, draws = flatten_sites({k: v.cpu() for k, v in found.posterior.sites(num_samples).items()}, 2)
    apart = draws.mean(0).std(0, correction=0) / draws.std(0).mean(0).clamp_min(1e-12)
    chosen = sorted(apart.argsort(descending=True, stable=True)[:_MOST_FORESTS].tolist())
    rows = torch.linspace(0, num_tasks - 1, min(num_tasks, _MOST_ROWS)).round().long()
    some = f" Shown are {_MOST_FORESTS} of {len(names)} latents, those in which tasks differ most."
    fewer = f" Of {num_tasks} tasks, {_MOST_ROWS} are shown, evenly spaced in order."
    yield paragraph(
        "What makes tasks differ, in the model's units: each line is what the model believes of one task after its "
        "observations, and the grey band what it expected of any task."
        f"{some if len(names) > _MOST_FORESTS else ''}{fewer if num_tasks > _MOST_ROWS else ''}"
    )
    before = _draw_before(run, found, num_samples)
    order = draws.mean(0).argsort(dim=0, descending=True, stable=True)
    yield Html('<div class="figures">')
    for i in chosen:
        shared = None if before is None else before[:, i]
        tasks = order[rows, i].tolist()
        yield _draw_forest(draws[:, tasks, i], [found.names[t] for t in tasks], names[i], shared, run.settings.task)
    yield Html("</div>")


def _draw_before(run: Run, found: Assessment, num_samples: int) -> Tensor | None:
    """Prior draws of every latent coordinate, (S, D), or None where they differ between tasks."""
    some = found.support[list(dict.fromkeys((found.names[0], found.names[-1])))]
    draws = flatten_sites(run.prior.sites(some, num_samples=num_samples), 2)[1].cpu()
    return draws[:, 0] if torch.allclose(draws, draws[:, :1]) else None


def _draw_forest(draws: Tensor, tasks: list[str], latent: str, prior: Tensor | None, label: str) -> Html:
    size, labels = (6.0, 1.6 + 0.2 * max(len(tasks), 6)), (latent, _plain(label))
    drawn = draw_figure(plot_forest, draws, names=tasks, prior=prior, labels=labels, size=size)
    low, high = (number(value.item()) for value in draws.mean(0).aminmax())
    alt = f"Intervals of {latent} for {len(tasks)} tasks; posterior means from {low} to {high}."
    return figure(encode_png(drawn), alt, f"{latent}: median, 50 % and 90 % interval of each task.")


def _tabulate(found: Assessment, ranking: Tensor) -> Html:
    order = ranking.argsort(descending=True, stable=True).tolist()[:_MOST_LISTED]
    measures = [name for column in found.columns for name in _measures(column)]
    headers = ["task", "seen", "predicted", "CRPS, sd", "−log density", *measures]
    seen = found.support.num_observations.tolist()
    rows = []
    for i in order:
        cells: list[str | int | float | None] = [found.names[i], int(seen[i]), 0, ranking[i].item()]
        cells.append(-found.log_density[i].nanmean().item())
        for column in found.columns:
            real = column.mask[i]
            draws, target = column.draws[:, i][:, real], column.target[i][real]
            cells[2] = len(target)
            cells += [value.item() for value in _measure(column, draws, target)]
        rows.append(cells)
    which = f"the {_MOST_LISTED} worst of {len(found.names)}" if len(found.names) > _MOST_LISTED else "the worst first"
    return table(f"Tasks, {which}", headers, rows)


def _measures(column: Column) -> list[str]:
    return (
        [f"Brier score of {column.name}"]
        if column.binary
        else [f"RMSE of {column.name}", f"in 90 % interval of {column.name}"]
    )


def _measure(column: Column, draws: Tensor, target: Tensor) -> list[Tensor]:
    if column.binary:
        return [scores.brier_score(draws.mean(0), target.long())]
    return [scores.rmse(draws.mean(0), target), scores.coverage(draws, target, 0.9)]
