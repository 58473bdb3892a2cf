"""One cell of the study: a recipe, a number of shots and of training tasks, and a seed; learned once and kept."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from math import inf, isinf
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from bmaml_ppl.evaluation import run_jobs
from bmaml_ppl.experiments.sinusoid.recipe import Recipe, make_optimizer
from bmaml_ppl.experiments.sinusoid.recipes import RECIPES
from bmaml_ppl.experiments.sinusoid.scoring import TestTasks, draw_test_tasks, score_prior
from bmaml_ppl.experiments.sinusoid.settings import SinusoidSettings
from bmaml_ppl.files import write_atomically
from bmaml_ppl.learned import History, LearnedPrior
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.storage import load_prior

__all__ = ["Cell", "learn_cell", "read_json", "run_cells", "write_json"]

_MOST_TASKS = 200_000
_SHARED_SHOTS = 20


class Cell(NamedTuple):
    """What is learned and scored together.

    Attributes:
        recipe: Key of `RECIPES`.
        shots: K at test, and in training where the recipe's prior is for one K.
        tasks: Training tasks; `inf` is as many as the run sees, 200,000 at most.
        seed: Of the training tasks, batches, starts and draws.
    """

    recipe: str
    shots: int
    tasks: float = inf
    seed: int = 0

    @property
    def learner(self) -> str:
        """Key of the recipe that learns the prior."""
        return RECIPES[self.recipe].prior_of or self.recipe

    @property
    def prior_name(self) -> str:
        """Of the learned prior, which cells of several K may share."""
        return self._name_of(self.learner)

    @property
    def name(self) -> str:
        """Of its scores."""
        return f"{self._name_of(self.recipe)}_at{self.shots}"

    def _name_of(self, recipe: str) -> str:
        shots = "" if RECIPES[recipe].shares_shots else f"_k{self.shots}"
        tasks = "" if isinf(self.tasks) else f"_t{self.tasks:.0f}"
        return f"{recipe}{shots}{tasks}_s{self.seed}"


def run_cells(folder: Path, cells: Sequence[Cell], settings: SinusoidSettings) -> Iterator[list[dict[str, Any]]]:
    """Scores of cells, those that share a prior together, in any order.

    Those that the folder holds with the same settings are not run again.

    Args:
        folder: Where priors and scores are kept.
        cells: Which.
        settings: Of the study.
    """
    # Cells that share a prior would learn it twice side by side.
    groups: dict[str, list[Cell]] = {}
    for cell in dict.fromkeys(cells):
        groups.setdefault(cell.prior_name, []).append(cell)
    jobs = [(folder, group, settings) for group in groups.values()]
    yield from run_jobs(_run_group, jobs, settings.workers)


def _run_group(folder: Path, cells: Sequence[Cell], settings: SinusoidSettings) -> list[dict[str, Any]]:
    return [_run_cell(folder, cell, settings) for cell in cells]


def _run_cell(folder: Path, cell: Cell, settings: SinusoidSettings) -> dict[str, Any]:
    recipe, path = _scaled(cell.recipe, settings), folder / "cells" / f"{cell.name}.json"
    asked = {
        **cell._asdict(),
        "tasks": None if isinf(cell.tasks) else cell.tasks,
        **recipe.describe(cell.shots),
        "num_test_tasks": settings.num_test_tasks,
        "num_query": settings.num_query,
        "num_draws": recipe.num_draws,
    }
    kept = read_json(path)
    if kept is not None and kept["asked"] == asked:
        return kept
    prior, seconds = learn_cell(folder, cell, settings)
    inference = None if recipe.at_test is None else recipe.at_test(cell.shots)
    tests = _tests(settings.num_test_tasks, settings.num_query)
    scores, failed = None, prior.history.stopped
    if failed is None:
        try:
            scores = score_prior(prior, inference, tests, cell.shots, recipe.num_draws)._asdict()
        except ValueError as error:  # adaptation of some task diverged
            failed = str(error)
    told = {"learn_seconds": seconds, "device": _describe(prior.device), "failed": failed}
    found = {"asked": asked, "scores": scores, **told}
    write_json(path, found)
    return found


def learn_cell(folder: Path, cell: Cell, settings: SinusoidSettings) -> tuple[LearnedPrior, float]:
    """The cell's prior, as it is kept or learned now, and the seconds that learning took.

    Its `history.stopped` says why learning ended early, where it did.
    """
    recipe, path = _scaled(cell.learner, settings), folder / "priors" / f"{cell.prior_name}.safetensors"
    shots = _SHARED_SHOTS if recipe.shares_shots else cell.shots
    described = {name: value for name, value in recipe.describe(shots).items() if name != "at_test"}
    asked = {**described, "tasks": None if isinf(cell.tasks) else cell.tasks, "seed": cell.seed}
    kept = read_json(path.with_suffix(".json"))
    if kept is not None and kept["asked"] == asked and path.exists():
        prior = load_prior(path, recipe.model())
        return replace(prior, history=History(stopped=kept["stopped"])), kept["learn_seconds"]
    prior, seconds = _learn(recipe, cell, shots, settings.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    prior.save(path)
    stopped, curve = prior.history.stopped, _summarise(prior.history.loss)
    write_json(path.with_suffix(".json"), {"asked": asked, "learn_seconds": seconds, "stopped": stopped, "loss": curve})
    return prior, seconds


def _learn(recipe: Recipe, cell: Cell, shots: int, device: str) -> tuple[LearnedPrior, float]:
    num_tasks = min(recipe.num_steps * recipe.batch_size, _MOST_TASKS) if isinf(cell.tasks) else int(cell.tasks)
    num_points = recipe.num_points(shots)
    tasks = recipe.draw_tasks(max(num_tasks, recipe.batch_size), num_points, seed=cell.seed).tasks
    start = perf_counter()
    prior = meta_learn(
        recipe.model(),
        tasks,
        num_support=shots if recipe.num_support is None else recipe.num_support,
        inference=recipe.inference(shots),
        objective=recipe.objective,
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        optimizer=make_optimizer(recipe),
        max_grad_norm=recipe.max_grad_norm,
        first_order=recipe.first_order,
        device=device,
        progress=False,
        seed=cell.seed,
    )
    return prior, perf_counter() - start


def _scaled(name: str, settings: SinusoidSettings) -> Recipe:
    recipe = RECIPES[name]
    return replace(recipe, num_steps=max(round(settings.effort * recipe.num_steps), 1))


@cache
def _tests(num_tasks: int, num_query: int) -> TestTasks:
    return draw_test_tasks(num_tasks, num_query)


def _summarise(losses: Sequence[float]) -> list[float]:
    """The learning curve in a hundred means."""
    parts = torch.tensor(losses, dtype=torch.float64).tensor_split(min(100, max(len(losses), 1)))
    return [round(part.mean().item(), 5) for part in parts if len(part)]


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def read_json(path: Path) -> Any:
    """What a JSON file holds, None where it is not there or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())
