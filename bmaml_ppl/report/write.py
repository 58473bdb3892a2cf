"""Writes the page: what to read of a run, in which order, and what not to conclude from it."""

from dataclasses import replace
from pathlib import Path

from bmaml_ppl.checks import check_count
from bmaml_ppl.diagnostics.check import check
from bmaml_ppl.report.assess import Rows, assess
from bmaml_ppl.report.learning import describe_learned, describe_learning, describe_setup
from bmaml_ppl.report.page import page
from bmaml_ppl.report.predictions import describe_calibration, describe_scores
from bmaml_ppl.report.run import Run, read_run
from bmaml_ppl.report.tasks import describe_tasks
from bmaml_ppl.report.trust import Trial, describe_limits, describe_repetition, describe_trust, summarise
from bmaml_ppl.runs import read_csv, read_tasks
from bmaml_ppl.settings import SettingsError
from bmaml_ppl.tasks import Tasks

__all__ = ["write_report"]

_RESTARTS = 4
_MOST_CHECKED = 100


def write_report(
    run: str | Path,
    *,
    data: str | None = None,
    num_support: int | None = None,
    rows: Rows = "first",
    num_samples: int = 1000,
    out: str | Path | None = None,
) -> Path:
    """Writes one self-contained HTML page on a run of `bmaml-ppl fit`, for a person who was not there.

    Args:
        run: Folder that `bmaml-ppl fit` wrote.
        data: CSV file of other tasks with the columns of the training tasks; None assesses the training tasks.
        num_support: Observations seen of each task, K; None takes what the prior was learned for.
        rows: Whether the first K rows of a task are seen, or K at random.
        num_samples: Draws S.
        out: File of the page; None takes `report.html` in the run's folder.

    Returns:
        The file of the page.

    Raises:
        FileNotFoundError: A file of the run, the model or the data is missing.
        SettingsError: The folder is of another command, or `rows` is unknown.
        ValueError: The model is no longer the one that was learned with, or no task is long enough.
    """
    if rows not in ("first", "random"):
        raise SettingsError(f"got rows {rows!r}; choose 'first' or 'random'")
    check_count("num_samples", num_samples, least=100)
    found = read_run(Path(run))
    num_support = found.shots if num_support is None else num_support
    check_count("num_support", num_support, least=1)
    path = Path(run) / "report.html" if out is None else Path(out)
    trial = _try(found, data, num_support, rows, num_samples)
    path.write_text(_compose(trial, num_samples), encoding="utf-8")
    return path


def _try(run: Run, data: str | None, num_support: int, rows: Rows, num_samples: int) -> Trial:
    settings = run.settings
    # Other tasks that are too short are named on the page instead of left out in silence.
    chosen = settings if data is None else replace(settings, data=data, min_observations=1)
    tasks = read_tasks(read_csv(chosen.data), chosen)
    found = assess(run.prior, tasks, run.outputs, num_support=num_support, rows=rows, num_samples=num_samples)
    some = list(found.names[:_MOST_CHECKED])
    restarts = 1 if run.prior.inference.num_draws else _RESTARTS
    posterior = run.prior.adapt(found.support[some], num_restarts=restarts)
    verdict = check(posterior, found.query[some], num_samples=num_samples)
    return Trial(run, found, verdict, data, rows, num_support, _find_known(run, tasks, data))


def _find_known(run: Run, tasks: Tasks, data: str | None) -> tuple[str, ...]:
    """Names of other tasks that trained the prior too."""
    if data is None or not Path(run.settings.data).is_file():
        return ()
    trained = set(read_tasks(read_csv(run.settings.data), run.settings).names)
    return tuple(name for name in tasks.names if name in trained)


def _compose(trial: Trial, num_samples: int) -> str:
    run, found = trial.run, trial.found
    name, file = run.settings.model.rpartition(":")[2], Path(run.settings.data).name
    sections = (
        ("setup", "The model, the data and the settings", describe_setup(run)),
        ("learned", "What was learned", describe_learned(run)),
        ("learning", "How learning went", describe_learning(run)),
        ("scores", "How well tasks are predicted", describe_scores(found)),
        ("calibration", "Whether probabilities are right", describe_calibration(found)),
        ("tasks", "Single tasks", describe_tasks(run, found, num_samples)),
        ("trust", "Whether the posterior can be believed", describe_trust(trial)),
        ("limits", "What cannot be concluded", describe_limits(trial)),
        ("repeat", "How to repeat it", describe_repetition(trial)),
    )
    return page(f"What {name} learned from {file}", summarise(trial), sections)
