"""Growth and other curves of five real data sets: the classical mixed model beside Pyro models of one task.

Countries, chicks, sleep-deprived subjects, patients and pigs: most tasks of a set train, a few observations of each
other task are seen and the rest is predicted. Every method sees the same splits. The models and how they were chosen
are in `bmaml_ppl.experiments.studies`; no reported split was used for it.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bmaml_ppl.baselines import predict_mixed
from bmaml_ppl.evaluation import (
    Forecast,
    Row,
    Split,
    average,
    forecast_gaussian,
    forecast_learned,
    format_table,
    run_jobs,
    score,
    split_tasks,
)
from bmaml_ppl.experiments.studies import STUDIES, Study
from bmaml_ppl.inference import laplace, svgd
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.objectives import evidence, marginal_nll

__all__ = [
    "LAPLACE",
    "METHODS",
    "MIXED",
    "QUICK",
    "SVGD",
    "GrowthSettings",
    "Result",
    "evaluate",
    "format_studies",
    "make_optimizer",
    "run_growth",
    "split_study",
]

MIXED, SVGD, LAPLACE = METHODS = ("linear mixed model", "SVGD", "Laplace + evidence")
"""Every row of a data set's table."""


@dataclass(frozen=True)
class GrowthSettings:
    """What `run_growth` does.

    Attributes:
        seeds: One split each; the seed also chooses the observations that are seen. Splits 0 to 4 were looked at while
            numbers of steps and first values were set, so that others are reported.
        fraction: Of the tasks that train.
        svgd_steps: Meta-steps of SVGD.
        laplace_steps: Meta-steps of Laplace's method.
        workers: Processes side by side; the results do not depend on it, the seconds do.
    """

    seeds: tuple[int, ...] = (5, 6, 7, 8, 9)
    fraction: float = 0.7
    svgd_steps: int = 100
    laplace_steps: int = 300
    workers: int = 2


QUICK = GrowthSettings(seeds=(0,), svgd_steps=1, laplace_steps=1, workers=1)
"""Shows that everything runs, and nothing else."""


class Result(NamedTuple):
    """One method on one split of one data set.

    Attributes:
        study: Name of the data set.
        seed: Of the split.
        row: Its scores.
    """

    study: str
    seed: int
    row: Row


def split_study(study: Study, seed: int, settings: GrowthSettings) -> Split:
    """Training tasks, and the seen and the held-out observations of the others; all carry the training scaling."""
    return split_tasks(study.load(), settings.fraction, study.num_support, seed)


def evaluate(name: str, method: str, seed: int, settings: GrowthSettings, folder: Path) -> Result:
    """Fits a method on the training tasks of one split and scores it on the held-out observations of the others.

    Laplace's prior of the first split is saved in the folder as `NAME.safetensors`.
    """
    study = STUDIES[name]
    split = split_study(study, seed, settings)
    began = perf_counter()
    forecast = _forecast_mixed(study, split) if method == MIXED else _forecast(study, method, split, settings)
    row = score(method, forecast, split.query.scaled(), study.output, perf_counter() - began)
    if method == LAPLACE and forecast.prior is not None and seed == settings.seeds[0]:
        forecast.prior.save(folder / f"{name}.safetensors")
    return Result(name, seed, row)


def _forecast_mixed(study: Study, split: Split) -> Forecast:
    columns = (study.input, study.output, study.degree)
    return forecast_gaussian(predict_mixed(*split, *columns), split.query, study.output)


def _forecast(study: Study, method: str, split: Split, settings: GrowthSettings) -> Forecast:
    scaling = split.train.scaling
    assert scaling is not None
    prior = _learn(study, method, split, settings)
    return forecast_learned(prior, split.support, split.query, study.output, scaling)


def _learn(study: Study, method: str, split: Split, settings: GrowthSettings) -> LearnedPrior:
    train = split.train if study.standardize else replace(split.train, scaling=None)
    steps = settings.svgd_steps if method == SVGD else settings.laplace_steps
    how: dict[str, Any] = {
        SVGD: {"inference": svgd(num_steps=10), "objective": marginal_nll()},
        LAPLACE: {"inference": laplace(), "objective": evidence()},
    }[method]
    return meta_learn(
        study.model,
        train,
        num_support=study.num_support,
        num_steps=steps,
        optimizer=partial(make_optimizer, num_steps=steps),
        device="cpu",
        progress=False,
        **how,
    )


def make_optimizer(parameters: list[Tensor], num_steps: int) -> torch.optim.Optimizer:
    """Adam at more than twice the default rate, on a cosine to zero: a short run goes as far."""
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(num_steps, 1))
    optimizer.register_step_post_hook(lambda *_: decay.step())
    return optimizer


def run_growth(
    folder: str | Path, settings: GrowthSettings | None = None, *, progress: bool = True
) -> dict[str, list[Row]]:
    """Runs the experiment and leaves everything in a folder.

    It writes `metrics.json`, `metrics.csv` (a line a data set, split and method), `forecasts.png`, and the prior
    that Laplace's method learned of each data set's first split, such as `pigs.safetensors`.

    Args:
        folder: Made where it does not exist.
        settings: None takes the defaults.
        progress: Whether to show a progress bar.

    Returns:
        Each data set's table: its methods' means over the splits.

    Raises:
        ImportError: If the packages of `pip install "bmaml-ppl[data]"` are missing.
    """
    from bmaml_ppl.experiments.growth_report import draw_forecasts

    settings, folder = settings or GrowthSettings(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The slow methods come first, so that no process waits for the last one alone.
    jobs = [(n, m, s, settings, folder) for m in reversed(METHODS) for n in STUDIES for s in settings.seeds]
    results = []
    with tqdm(total=len(jobs), disable=not progress, desc="growth", unit="fit") as bar:
        for result in run_jobs(evaluate, jobs, settings.workers):
            results.append(result)
            bar.update()
            bar.set_postfix_str(f"{result.study}, {result.row.method}, split {result.seed}: {result.row.seconds:.0f} s")
    results.sort(key=lambda r: (list(STUDIES).index(r.study), METHODS.index(r.row.method), r.seed))
    tables = {
        name: [average([r.row for r in results if (r.study, r.row.method) == (name, m)]) for m in METHODS]
        for name in STUDIES
    }
    _write_metrics(folder, settings, tables, results)
    draw_forecasts(folder, settings).savefig(folder / "forecasts.png", dpi=150)
    return tables


def _write_metrics(
    folder: Path, settings: GrowthSettings, tables: dict[str, list[Row]], results: Sequence[Result]
) -> None:
    per_split = [{"study": r.study, "seed": r.seed, **r.row._asdict()} for r in results]
    means = {name: [row._asdict() for row in rows] for name, rows in tables.items()}
    metrics = {"rows": means, "settings": asdict(settings), "splits": per_split}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(per_split[0]))
        writer.writeheader()
        writer.writerows(per_split)


def format_studies(tables: dict[str, list[Row]]) -> str:
    """The tables as text."""
    parts = [f"{STUDIES[n].title} (K = {STUDIES[n].num_support})\n{format_table(rows)}" for n, rows in tables.items()]
    return "\n\n".join(parts)
