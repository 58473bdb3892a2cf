"""Parts of a report that say how far to trust it: the summary, the trust check, the limits, how to repeat it."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bmaml_ppl import __version__
from bmaml_ppl.diagnostics.check import Verdict
from bmaml_ppl.report.assess import Assessment, Column, Rows, score_column
from bmaml_ppl.report.learning import name_columns
from bmaml_ppl.report.page import Html, bullets, code, join, number, paragraph, table
from bmaml_ppl.report.predictions import judge_calibration, measure_coverage
from bmaml_ppl.report.run import Run

__all__ = ["Trial", "describe_limits", "describe_repetition", "describe_trust", "summarise"]

_LISTED = 5
_FEW_TASKS = 20


@dataclass(frozen=True)
class Trial:
    """A run and how its prior did on tasks.

    Attributes:
        run: What was learned.
        found: Tasks adapted to and predicted.
        verdict: What the trust check says of them.
        data: CSV file of other tasks, or None where the training tasks were tried.
        rows: Which observations were seen.
        num_support: How many, K.
        known: Names of other tasks that trained the prior too.
    """

    run: Run
    found: Assessment
    verdict: Verdict
    data: str | None
    rows: Rows
    num_support: int
    known: tuple[str, ...]

    @property
    def held_out(self) -> str:
        """Whether the tasks trained the prior, in one sentence."""
        if self.data is None:
            return (
                "These tasks also trained the prior: expect new tasks to be predicted somewhat worse. Give other tasks "
                "by --data FILE.csv to see how much."
            )
        if self.known:
            return (
                f"{len(self.known)} of these tasks have the names of tasks that trained the prior "
                f"({_list(self.known)}): if they are the same, the scores are too good."
            )
        return f"These tasks, from {Path(self.data).name}, have other names than the tasks that trained the prior."


def _list(names: tuple[str, ...]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def summarise(trial: Trial) -> Html:
    """What to know where nothing else is read."""
    run, found = trial.run, trial.found
    settings, inference = run.settings, run.prior.inference
    inputs, outputs = (", ".join(map(name_columns, columns.values())) for columns in (settings.input, settings.output))
    seen = f"the first {trial.num_support}" if trial.rows == "first" else f"{trial.num_support} random"
    lines = [
        f"Learned: a prior that the tasks of {Path(settings.data).name} (column {settings.task}) share, to predict "
        f"{outputs} from {inputs}, by {inference.name} in {len(run.history.loss)} meta-steps.",
        f"Tried: on {len(found.names)} tasks, seeing {seen} observations of each and predicting "
        f"the rest. {trial.held_out}",
        *(_summarise_column(column) for column in found.columns),
        f"Trust check: {trial.verdict.headline}.",
    ]
    return join(
        paragraph("For a reader who was not there: what was learned, how well it predicts, and what to make of it."),
        bullets(lines),
    )


def _summarise_column(column: Column) -> str:
    after, before = (score_column(column, before=before) for before in (False, True))
    name = next(iter(after))
    text = f"{column.name}: {name} {number(after[name])} after adapting, {number(before[name])} by the prior alone"
    if column.binary:
        return f"{text}."
    return (
        f"{text}; 90 % intervals hold {measure_coverage(column)} of {int(column.mask.sum())} values; "
        f"{judge_calibration(column)}."
    )


def describe_trust(trial: Trial) -> Html:
    """The findings of `check`."""
    verdict, num_tasks = trial.verdict, len(trial.found.names)
    some = f", the first of {num_tasks} tasks" if verdict.num_tasks < num_tasks else ""
    rows = [
        (found.name, found.level, found.value, found.limit, found.reason, _list(found.tasks))
        for found in verdict.findings
    ]
    return join(
        paragraph(f"{verdict.headline[0].upper()}{verdict.headline[1:]}."),
        paragraph(
            f"Looked at: {verdict.about}{some}. Questions that failed are reasons not to believe the posterior; a "
            "posterior can pass them all and still be wrong."
        ),
        table(
            "Questions of the trust check",
            ["question", "answer", "value", "what passes", "reason", "tasks"],
            rows,
        ),
    )


def describe_limits(trial: Trial) -> Html:
    """What a reader must not conclude."""
    return join(bullets(_limits(trial)))


def _limits(trial: Trial) -> Iterator[str]:
    run, found = trial.run, trial.found
    if trial.data is None or trial.known:
        yield trial.held_out
    yield (
        "Other tasks are predicted as well only if they are like these: from the same population, measured in the same "
        f"way, with {trial.num_support} observations seen."
    )
    if trial.rows == "first":
        yield (
            "Meta-learning chose the observations that a task adapts to at random; here the first "
            f"{trial.num_support} in the file were seen. Where rows are in order (of time, say), this asks for "
            "extrapolation, which is harder. --rows random asks what was learned for."
        )
    if trial.num_support != run.shots or not isinstance(run.prior.num_support, int):
        yield f"Tasks adapted to {trial.num_support} observations here; the prior was learned for {run.shown_shots}."
    if len(found.names) < _FEW_TASKS:
        yield f"{len(found.names)} tasks are few: coverage and scores of as many others may differ much."
    if found.short:
        yield (
            f"{len(found.short)} tasks have no more than {trial.num_support} observations and were left out: "
            f"{_list(found.short)}."
        )
    if found.num_given > len(found.names):
        yield f"Of {found.num_given} tasks, {len(found.names)} evenly spaced in the file were tried."
    yield (
        "Coverage and calibration are averages over tasks: right on average, predictions may be too sure for some "
        "tasks and too cautious for others. The table of tasks shows which."
    )
    yield (
        "That the model predicts well does not make its latents causes, nor its structure true; another model may "
        "predict as well. Log scores can be compared between models of the same data only."
    )
    yield "It is one run from one seed; another seed leads to another prior, most often a similar one."


def describe_repetition(trial: Trial) -> Html:
    """The commands."""
    folder = str(trial.run.folder)
    commands = [
        shlex.join(["bmaml-ppl", "fit", "--config", f"{folder}/settings.yaml", "--overwrite"]),
        shlex.join(["bmaml-ppl", "report", folder, *_options(trial)]),
    ]
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return join(
        code("\n".join(commands), block=True),
        paragraph(
            "Settings and seed are kept, so the first command repeats the run with the same versions on the same kind "
            f"of machine. This page was written by bmaml_ppl {__version__} on {now}; it holds everything that it shows "
            "and fetches nothing."
        ),
    )


def _options(trial: Trial) -> list[str]:
    options = [] if trial.data is None else ["--data", trial.data]
    options += [] if trial.num_support == trial.run.shots else ["--num-support", str(trial.num_support)]
    return options + ([] if trial.rows == "first" else ["--rows", trial.rows])
