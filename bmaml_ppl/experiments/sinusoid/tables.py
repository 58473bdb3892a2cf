"""The study's tables, as text, CSV and JSON."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from bmaml_ppl.experiments.sinusoid.figures import PUBLISHED, mean_and_interval, size_of
from bmaml_ppl.experiments.sinusoid.recipes import FAIR, RECIPES, RELEASED
from bmaml_ppl.experiments.sinusoid.scoring import Scores

__all__ = ["TABLES", "format_headline", "to_csv"]

Cells = Sequence[Mapping[str, Any]]

_SCORES = {
    "mse": "MSE",
    "member_mse": "member MSE",
    "nll": "NLL",
    "calibration": "calibration error",
    "coverage90": "90 % coverage",
}
_HEADLINE = ("mse", "nll", "coverage90")


def to_csv(cells: Cells) -> str:
    """All cells, one a line, with everything that was measured."""
    text = io.StringIO()
    names = [*Scores._fields, "learn_seconds", "device", "failed"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["recipe", "title", "shots", "tasks", "seed", "num_steps", *names])
    for cell in cells:
        asked, values = cell["asked"], {**(cell["scores"] or {}), **cell}
        tasks = "inf" if asked["tasks"] is None else asked["tasks"]
        numbers = [f"{v:.6g}" if isinstance(v, float) else v for v in map(values.get, names)]
        title = RECIPES[asked["recipe"]].title
        writer.writerow([asked["recipe"], title, asked["shots"], tasks, asked["seed"], asked["num_steps"], *numbers])
    return text.getvalue()


def _format_methods(cells: Cells) -> str:
    """A row for each method and K."""
    heads = ["method", "K", *_SCORES.values(), "meta-steps", "s to learn", "ms to adapt a task"]
    rows = []
    for cell in cells:
        asked, scores = cell["asked"], cell["scores"]
        adapt = f"{1000 * scores['adapt_seconds'] / asked['num_test_tasks']:.1f}" if scores else ""
        numbers = _show_scores(scores)
        last = [f"{asked['num_steps']:,}", f"{cell['learn_seconds']:,.0f}", adapt]
        rows.append([RECIPES[asked["recipe"]].title, asked["shots"], *numbers, *last])
    return _table(heads, rows)


def format_headline(cells: Cells) -> str:
    """The rows that published numbers exist for, or the limit, with all K in a line."""
    shots = sorted({cell["asked"]["shots"] for cell in cells})
    lines: list[tuple[str, str | None, str | None]] = [
        ("BMAML (of the last layer, as published)", "BMAML, published", "bmaml_last"),
        ("best learner without the formula", "best learner, published", "linear_mixture"),
        ("probabilistic program", None, "program"),
        ("Bayes limit: the formula and the prior known", "Bayes limit", None),
    ]
    told = " / ".join(map(str, shots))
    heads = [f"K = {told}", "MSE, published", "MSE, here", "NLL", "90 % coverage"]
    rows = []
    for title, published, recipe in lines:
        known = [_shorten(PUBLISHED[published][k]) for k in shots] if published else []
        scores = {c["asked"]["shots"]: c["scores"] for c in cells if c["asked"]["recipe"] == recipe and c["scores"]}
        here = [[_shorten(scores[k][name]) if k in scores else "" for k in shots] for name in _HEADLINE if recipe]
        rows.append([title, *(" / ".join(values) for values in (known, *(here or [[]] * len(_HEADLINE))))])
    return _table(heads, rows)


def _shorten(value: float) -> str:
    digits = f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"
    return digits.replace("0.", ".", 1) if digits.lstrip("-").startswith("0.") else digits


def _format_ablations(cells: Cells) -> str:
    """A row for each change."""
    heads = ["BMAML", *_SCORES.values(), "s to learn"]
    rows = [
        [
            RECIPES[c["asked"]["recipe"]].title,
            *_show_scores(c["scores"]),
            f"{c['learn_seconds']:,.0f}",
        ]
        for c in cells
    ]
    return _table(heads, rows)


def _format_figure_1(cells: Cells) -> str:
    """A row for each method and K, a column for each number of tasks: means over seeds and 95 % intervals."""
    sizes = sorted({size_of(cell) for cell in cells})
    heads = ["settings", "method", "K", "metric", *(_show_size(size) for size in sizes)]
    return _table(heads, list(_figure_1_rows(cells, sizes)))


def _figure_1_rows(cells: Cells, sizes: Sequence[float]) -> Iterator[list[Any]]:
    shots = sorted({cell["asked"]["shots"] for cell in cells})
    found = partial(_find_scores, cells, sizes=sizes)
    for settings, names in (("released", RELEASED), ("fair", FAIR)):
        for name in names:
            for k in shots:
                for metric in ("mse", "member_mse") if name.startswith("emaml") else ("mse",):
                    shown = [_show_seeds(list(scores.values())) for scores in found(name, k, metric)]
                    yield [settings, RECIPES[name].title, k, _SCORES[metric], *shown]
        ensemble = next(name for name in names if name.startswith("emaml"))
        for name in names:
            for k in shots if name.startswith("bmaml") else ():
                pairs = zip(found(name, k, "mse"), found(ensemble, k, "mse"), strict=True)
                less = [_subtract(ours, theirs) for ours, theirs in pairs]
                yield [settings, f"{RECIPES[name].title}, less EMAML", k, "MSE, paired", *map(_show_seeds, less)]


def _find_scores(
    cells: Cells, recipe: str, shots: int, metric: str, sizes: Sequence[float]
) -> list[dict[int, float | None]]:
    """By number of training tasks, the score of each seed, None where it diverged."""
    chosen = [c for c in cells if c["asked"]["recipe"] == recipe and c["asked"]["shots"] == shots]
    return [
        {c["asked"]["seed"]: c["scores"] and c["scores"][metric] for c in chosen if size_of(c) == size}
        for size in sizes
    ]


def _subtract(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> list[float | None]:
    """Differences on the same training tasks."""
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return [None if a is None or b is None else a - b for a, b in pairs]


def _show_seeds(scores: Sequence[float | None]) -> str:
    values = [value for value in scores if value is not None]
    if len(values) < len(scores) or not values:
        return f"{len(scores) - len(values)} of {len(scores)} diverged" if scores else ""
    mean, half = mean_and_interval(values)
    return f"{mean:.2f} ± {half:.2f}" if len(values) > 1 else f"{mean:.2f}"


def _show_size(size: float) -> str:
    return "∞" if size == float("inf") else f"{size:,.0f}"


def _show(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.095 else f"{value:.2f}"


def _show_scores(scores: Mapping[str, float] | None) -> list[str]:
    return ["diverged"] * len(_SCORES) if scores is None else [_show(scores[name]) for name in _SCORES]


def _table(heads: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


TABLES = {"methods": _format_methods, "figure1": _format_figure_1, "ablations": _format_ablations}
"""What makes a Markdown table of a part's cells, by part."""
