"""The sinusoid study: which cells each part needs, and what is made of them."""

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

from bmaml_ppl.experiments.sinusoid.cells import Cell, read_json, run_cells, write_json
from bmaml_ppl.experiments.sinusoid.figures import draw_figure_1, draw_methods
from bmaml_ppl.experiments.sinusoid.pictures import draw_pictures
from bmaml_ppl.experiments.sinusoid.recipes import ABLATIONS, FAIR, METHODS, RELEASED
from bmaml_ppl.experiments.sinusoid.settings import SinusoidSettings
from bmaml_ppl.experiments.sinusoid.tables import TABLES, to_csv
from bmaml_ppl.files import write_atomically

__all__ = ["PARTS", "run_sinusoid"]

_ABLATION_SHOTS = 10
_FIGURES = {"methods": draw_methods, "figure1": draw_figure_1}


def _figure_1_cells(settings: SinusoidSettings) -> list[Cell]:
    shots = [k for k in settings.shots if k <= _ABLATION_SHOTS] or list(settings.shots)
    return [
        Cell(name, k, num, seed)
        for seed in settings.seeds
        for name in (*RELEASED, *FAIR)
        for num in settings.tasks
        for k in shots
    ]


def _methods_cells(settings: SinusoidSettings) -> list[Cell]:
    return [Cell(name, k, inf, settings.seeds[0]) for name in settings.methods or METHODS for k in settings.shots]


def _ablation_cells(settings: SinusoidSettings) -> list[Cell]:
    shots = _ABLATION_SHOTS if _ABLATION_SHOTS in settings.shots else settings.shots[0]
    return [Cell(name, shots, inf, settings.seeds[0]) for name in ABLATIONS]


PARTS: dict[str, Callable[[SinusoidSettings], list[Cell]]] = {
    "methods": _methods_cells,
    "figure1": _figure_1_cells,
    "ablations": _ablation_cells,
}
"""Cells of each part that scores methods."""


def run_sinusoid(
    out: str | Path, settings: SinusoidSettings | None = None, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs the study, or what is left of it: cells that the folder holds with the same settings are not run again.

    Writes, by part: `methods.csv`, `figure1.csv` and `ablations.csv` with all scores, `methods.md`, `figure1.md` and
    `ablations.md`, `methods.png`, `figure1.png`, and the pictures `adaptation.png`, `mixture.png` and `banana.png`; and
    all of it as `results.json`. Learned priors are under `priors`, the scores of each cell under `cells`.

    Args:
        out: Folder.
        settings: None is the whole study, which takes hours.
        report: Called with a line of text for each cell.

    Returns:
        What `results.json` holds: by part, the cells' settings and scores, and the pictures' numbers.

    Raises:
        ValueError: If a part or a method is not known.

    References:
        Yoon et al. (2018), Bayesian Model-Agnostic Meta-Learning, section 5.1 and figure 1; Finn et al. (2017),
        Model-Agnostic Meta-Learning, section 5.1; Liu and Wang (2016), Stein Variational Gradient Descent, figure 1.
    """
    settings = settings or SinusoidSettings()
    _check(settings)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = read_json(folder / "results.json") or {}
    for part in settings.parts:
        if part == "pictures":
            results[part] = draw_pictures(folder, settings)
        else:
            results[part] = _run_part(folder, part, settings, report)
        write_json(folder / "results.json", results)
    return results


def _run_part(folder: Path, part: str, settings: SinusoidSettings, report: Callable[[str], None]) -> list[Any]:
    cells = PARTS[part](settings)
    found: list[dict[str, Any]] = []
    for group in run_cells(folder, cells, settings):
        found += group
        for cell in group:
            report(f"{part}: {len(found)} of {len(cells)}; {_describe(cell)}")
    order = {(cell.recipe, cell.shots, cell.tasks, cell.seed): i for i, cell in enumerate(cells)}
    found.sort(key=lambda cell: order[_key(cell["asked"])])
    _write(folder / f"{part}.csv", to_csv(found))
    _write(folder / f"{part}.md", TABLES[part](found) + "\n")
    if part in _FIGURES:
        _FIGURES[part]([cell for cell in found if cell["scores"] is not None]).savefig(folder / f"{part}.png", dpi=110)
    return found


def _key(asked: dict[str, Any]) -> tuple[Any, ...]:
    tasks = inf if asked["tasks"] is None else asked["tasks"]
    return asked["recipe"], asked["shots"], tasks, asked["seed"]


def _describe(cell: dict[str, Any]) -> str:
    recipe, shots, tasks, seed = _key(cell["asked"])
    scores, told = cell["scores"], f"failed: {cell['failed']}"
    if scores is not None:
        told = f"MSE {scores['mse']:.3g}, NLL {scores['nll']:.2f}, coverage {scores['coverage90']:.2f}"
    return f"{recipe}, K = {shots}, |T| = {tasks:g}, seed {seed}: {told}; learned in {cell['learn_seconds']:.0f} s"


def _check(settings: SinusoidSettings) -> None:
    for name, given, known in (
        ("parts", settings.parts, ["pictures", *PARTS]),
        ("methods", settings.methods or (), list(METHODS)),
    ):
        if unknown := [value for value in given if value not in known]:
            raise ValueError(f"{name} {unknown} are not known; choose from {known}")
    for name, counts in (("shots", settings.shots), ("tasks", settings.tasks)):
        if not counts or min(counts) < 1:
            raise ValueError(f"{name}={counts!r} must be some numbers of at least 1")
    if max(settings.shots) > 20:
        raise ValueError(f"shots={settings.shots!r}: test tasks have 20 observations to adapt to; give at most 20")


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())
