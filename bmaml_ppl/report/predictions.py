"""Sections of a report on how well tasks are predicted: scores and calibration."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bmaml_ppl.diagnostics.scores import interval_bounds, pit
from bmaml_ppl.plots import draw_figure, encode_png, plot_calibration, plot_pit
from bmaml_ppl.report.assess import Assessment, Column, score_column
from bmaml_ppl.report.page import Html, figure, join, paragraph, section, table

__all__ = ["Share", "describe_calibration", "describe_scores", "judge_calibration", "measure_coverage"]

_MEANING = {
    "RMSE": "typical error of the mean; lower is better",
    "CRPS": "error of the whole distribution, an absolute error for a sure prediction; lower is better",
    "interval score (90 %)": "width of 90 % intervals, and what they miss 20-fold; lower is better",
    "coverage of 90 % intervals": "share of values inside; calibrated is 0.9",
    "coverage of 50 % intervals": "share of values inside; calibrated is 0.5",
    "calibration error": "gap between nominal and observed probabilities; lower is better",
    "Brier score": "squared error of probabilities over both answers, 0 to 2; lower is better",
    "expected calibration error": "gap between confidence and accuracy; lower is better",
}
_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 5
_FEW_TASKS = 8
_FAR = 2.8
"""Standard errors beyond which the farthest of five levels is no chance: one calibrated column in fifty."""


class Share(NamedTuple):
    """How often something is so, over all values.

    Attributes:
        value: In [0, 1].
        error: Its standard error, with tasks (not values) as independent; NaN for one task.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.0%}" + (f" (± {self.error:.0%})" if self.error == self.error else "")


def measure_coverage(column: Column, level: float = 0.9) -> Share:
    """Share of the values of one column inside their central interval."""
    lower, upper = interval_bounds(column.draws, level)
    return _measure_share((lower <= column.target) & (column.target <= upper), column.mask)


def _measure_share(so: Tensor, mask: Tensor) -> Share:
    """The share of real values, (T, N), that are so: a ratio of sums over tasks, and its error."""
    hits, counts, num_tasks = (so & mask).sum(1).double(), mask.sum(1), len(mask)
    share = (hits.sum() / counts.sum()).item()
    apart = (hits - share * counts).square().sum().sqrt() / counts.sum()
    return Share(share, apart.item() * (num_tasks / (num_tasks - 1)) ** 0.5 if num_tasks > 1 else float("nan"))


def describe_scores(found: Assessment) -> Html:
    """A table of scores for each column, and the log density."""
    density = found.log_density[~found.log_density.isnan()]
    nll = [
        (
            "negative log density of an observation, nats",
            -density.mean().item(),
            "surprise at what was observed, in the units of the data; lower is better, between models of the same data",
        )
    ]
    return join(
        paragraph(
            "“After adapting” is what this model says of the values that it was not shown; “prior alone” is what it "
            "says of them without any observation of the task. The difference is what the observations of the task are "
            "worth."
        ),
        *(section(column.name, _tabulate(column)) for column in found.columns),
        section("All outputs together", table("Log score", ["score", "after adapting", "meaning"], nll)),
    )


def _tabulate(column: Column) -> Html:
    after, before = score_column(column), score_column(column, before=True)
    rows: list[tuple[str, float, float | None, str]]
    rows = [(name, value, before[name], _MEANING[name]) for name, value in after.items()]
    if not column.binary:
        rows.append(("standard deviation of the values", column.spread, None, "for comparison with the RMSE"))
    num_values, num_tasks = int(column.mask.sum()), len(column.mask)
    caption = f"{column.name}: {num_values} values of {num_tasks} tasks, in the units of the data"
    return table(caption, ["score", "after adapting", "prior alone", "meaning"], rows)


def describe_calibration(found: Assessment) -> Html:
    """Calibration curve, probability integral transforms and a table for each column."""
    intro = paragraph(
        "Values lie below the 5 % quantile of a calibrated prediction 5 % of the time, and so on for every level. The "
        "grey bands hold the whole curve of a calibrated prediction with a probability of 95 % if all values are "
        "independent; values of the same task are not, so a curve may leave the band a little without being wrong."
    )
    return join(
        intro, *(section(c.name, *(_show_answers if c.binary else _show_calibration)(c)) for c in found.columns)
    )


def _show_answers(column: Column) -> Iterator[Html]:
    """How often the answer was yes, by the predicted probability of it."""
    probability, yes = column.draws.mean(0)[column.mask], column.target[column.mask]
    bins = (probability * _BINS).long().clamp(max=_BINS - 1)
    rows = []
    for i in range(_BINS):
        inside, at = bins == i, f"{i / _BINS:g} to {(i + 1) / _BINS:g}"
        if inside.any():
            rows.append((at, int(inside.sum()), probability[inside].mean().item(), yes[inside].mean().item()))
    headers = ["predicted probability", "values", "mean prediction", "observed frequency"]
    yield table(f"{column.name}: predictions of yes (1) and how often it was so", headers, rows)


def _show_calibration(column: Column) -> Iterator[Html]:
    told = judge_calibration(column)
    yield paragraph(f"{told[0].upper()}{told[1:]}.")
    curve = draw_figure(plot_calibration, column.draws, column.target, size=(5.2, 5.2), mask=column.mask)
    values = draw_figure(plot_pit, pit(column.draws, column.target, column.mask), size=(5.6, 4.2), kind="histogram")
    caption = f"{column.name}: share of values below predictive quantiles."
    second = f"{column.name}: where values lie within their predictions; level bars are calibrated."
    yield Html('<div class="figures">')
    yield figure(encode_png(curve), f"Calibration curve of {column.name}: {told}.", caption)
    yield figure(encode_png(values), f"Histogram of probability integral transforms of {column.name}: {told}.", second)
    yield Html("</div>")
    rows = [(level, *share) for level, share in _measure_levels(column).items()]
    headers = ["nominal probability", "observed share of values below", "its standard error"]
    yield table(f"{column.name}: calibration at single levels", headers, rows)


def judge_calibration(column: Column) -> str:
    """Calibration of one column in words; tasks, not values, are taken as independent."""
    if len(column.mask) < _FEW_TASKS:
        return f"{len(column.mask)} tasks are too few to judge the calibration"
    shares = _measure_levels(column)
    far = {
        level: abs(share.value - level) / max(share.error, _least_error(column, level))
        for level, share in shares.items()
    }
    level = max(far, key=lambda level: far[level])
    said = f"{shares[level]} of the values lie below the {level:.0%} quantile of their prediction"
    if far[level] < _FAR:
        return f"no miscalibration shows beyond chance (at most: {said})"
    return f"calibration is off: {' and '.join(_name_flaws(column))} ({said})"


def _name_flaws(column: Column) -> list[str]:
    shift = _transform(column)[column.mask].mean().item() - 0.5
    flaws = ["predictions lie too low" if shift > 0 else "predictions lie too high"] if abs(shift) > 0.03 else []
    worst = max((measure_coverage(column, level).value - level for level in (0.5, 0.9)), key=abs)
    if abs(worst) > 0.03:
        flaws.append(f"intervals hold too {'few' if worst < 0 else 'many'} values")
    return flaws or ["the shape of the predictions differs from that of the values"]


def _measure_levels(column: Column) -> dict[float, Share]:
    values = _transform(column)
    return {level: _measure_share(values < level, column.mask) for level in _LEVELS}


def _least_error(column: Column, level: float) -> float:
    """The standard error of independent values, below which that of tasks is luck."""
    return (level * (1 - level) / int(column.mask.sum())) ** 0.5


def _transform(column: Column) -> Tensor:
    """Probability integral transforms, (T, N), ties broken at random with a fixed seed; NaN where nothing is real."""
    generator = torch.Generator().manual_seed(0)
    return pit(column.draws, column.target, column.mask, generator=generator).double()
