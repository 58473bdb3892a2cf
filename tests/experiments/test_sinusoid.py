"""The sinusoid study: its cells, its scores, and what it writes."""

import csv
import json
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bmaml_ppl import meta_learn
from bmaml_ppl.cli import app
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.experiments.sinusoid import cells as cells_module
from bmaml_ppl.experiments.sinusoid.cells import Cell, learn_cell, run_cells
from bmaml_ppl.experiments.sinusoid.figures import draw_figure_1, draw_methods
from bmaml_ppl.experiments.sinusoid.recipes import ABLATIONS, FAIR, METHODS, PICTURES, RECIPES, RELEASED
from bmaml_ppl.experiments.sinusoid.run import PARTS, run_sinusoid
from bmaml_ppl.experiments.sinusoid.scoring import draw_test_tasks, predict_curves, score_prior
from bmaml_ppl.experiments.sinusoid.settings import QUICK, SinusoidSettings
from bmaml_ppl.experiments.sinusoid.tables import TABLES
from bmaml_ppl.inference import hmc, map_estimate, smc
from bmaml_ppl.models import hierarchical_regression
from bmaml_ppl.objectives import query_nll

TINY = replace(QUICK, shots=(5,), num_test_tasks=4, num_query=6, effort=1e-9, workers=1, seeds=(0,))
"""One meta-step of everything."""


def test_test_tasks_are_the_same_for_every_method_and_nested_in_the_shots() -> None:
    few, many = draw_test_tasks(3, 10), draw_test_tasks(3, 10)
    assert torch.equal(few.y, many.y)
    assert torch.equal(few.support(5).data["x"], many.support(10).data["x"][:, :5])
    truth = sinusoid(3, 30, seed=1_000_003)
    torch.testing.assert_close(few.clean, truth.curve(few.x))
    noise = (few.y - few.clean).abs().amax(1) / truth.parameters["amplitude"]
    assert bool((noise < 0.05).all())
    assert bool((noise > 0).all())


def test_scores_are_those_of_a_naive_loop() -> None:
    tests = draw_test_tasks(3, 7)
    prior = meta_learn(
        hierarchical_regression((1, 8, 1), initial_noise=1.0),
        sinusoid(10, 10, seed=0).tasks,
        num_support=5,
        inference=map_estimate(num_particles=3, num_steps=2, step_size=1e-2, preconditioner="none", init="free"),
        objective=query_nll("mean"),
        num_steps=1,
        progress=False,
    )
    scores = score_prior(prior, None, tests, 5, None)
    posterior = prior.adapt(tests.support(5))
    mean, sd = predict_curves(posterior, tests.x)
    assert mean.shape == sd.shape == (3, 3, 7)
    error: Any = 0.0
    member: Any = 0.0
    nll: Any = 0.0
    inside = 0.0
    for task in range(3):
        for point in range(7):
            normals = [torch.distributions.Normal(mean[m, task, point], sd[m, task, point]) for m in range(3)]
            y, clean = tests.y[task, point], tests.clean[task, point]
            error += (sum(n.mean for n in normals) / 3 - clean) ** 2 / 21
            member += sum((n.mean - clean) ** 2 for n in normals) / 63
            nll -= torch.log(sum(n.log_prob(y).exp() for n in normals) / 3) / 21
            inside += float(0.05 < sum(n.cdf(y) for n in normals) / 3 < 0.95) / 21
    assert scores.mse == pytest.approx(float(error), rel=1e-4)
    assert scores.member_mse == pytest.approx(float(member), rel=1e-4)
    assert scores.nll == pytest.approx(float(nll), rel=1e-4)
    assert scores.coverage90 == pytest.approx(inside, abs=1e-6)
    assert scores.mse < scores.member_mse


def test_a_learned_prior_is_kept_and_learned_again_only_where_the_settings_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, seconds = learn_cell(tmp_path, Cell("maml", 5), TINY)
    monkeypatch.setattr(cells_module, "meta_learn", None)
    again, told = learn_cell(tmp_path, Cell("maml", 5), TINY)
    assert told == seconds
    assert torch.equal(first.params["particles"], again.params["particles"])
    monkeypatch.setitem(RECIPES, "maml", replace(RECIPES["maml"], at_test=RECIPES["meta_sgd"].inference))
    assert learn_cell(tmp_path, Cell("maml", 5), TINY)[1] == seconds, "nothing is learned of what is done at test"
    with pytest.raises(TypeError):
        learn_cell(tmp_path, Cell("maml", 5), replace(TINY, effort=1e-3))
    with pytest.raises(TypeError):
        learn_cell(tmp_path, Cell("maml", 5, seed=1), TINY)


def test_cells_that_share_a_prior_learn_it_once(tmp_path: Path) -> None:
    settings = replace(TINY, shots=(5, 10))
    found = [
        cell for group in run_cells(tmp_path, [Cell("neural_linear", k) for k in (5, 10)], settings) for cell in group
    ]
    assert len(list((tmp_path / "priors").glob("*.safetensors"))) == 1
    assert {cell["asked"]["shots"] for cell in found} == {5, 10}
    assert found[0]["learn_seconds"] == found[1]["learn_seconds"]
    assert found[0]["scores"]["mse"] != found[1]["scores"]["mse"]


def test_a_prior_that_another_recipe_learned_is_adapted_otherwise(tmp_path: Path) -> None:
    cells = [Cell("program", 5), Cell("program_smc", 5)]
    (found,) = run_cells(tmp_path, cells, TINY)
    assert {path.stem for path in (tmp_path / "priors").glob("*.safetensors")} == {"program_s0"}
    assert {path.stem for path in (tmp_path / "cells").glob("*.json")} == {"program_s0_at5", "program_smc_s0_at5"}
    assert [cell["asked"]["at_test"][0] for cell in found] == ["laplace", "smc"]
    assert found[0]["learn_seconds"] == found[1]["learn_seconds"]
    assert found[0]["scores"]["mse"] != found[1]["scores"]["mse"]


def test_a_changed_model_is_another_recipe() -> None:
    recipe = RECIPES["maml"]
    changed = replace(recipe, model=partial(hierarchical_regression, (1, 40, 40, 1), activation=torch.tanh))
    told = changed.describe(5)["model"]
    assert told == ["hierarchical_regression", [1, 40, 40, 1], {"activation": "tanh"}]
    assert told != recipe.describe(5)["model"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_described_by_what_decides_its_result(name: str) -> None:
    described = RECIPES[name].describe(5)
    assert json.loads(json.dumps(described)) == described
    assert RECIPES[name].title


def test_recipes_differ() -> None:
    told = [json.dumps([r.describe(10), r.prior_of]) for r in RECIPES.values() if r not in ABLATIONS.values()]
    assert len(set(told)) == len(told)
    assert len(RECIPES) == len(METHODS) + len(RELEASED) + len(FAIR) + len(ABLATIONS) + len(PICTURES)


def test_the_study_runs_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(TINY, parts=("methods", "figure1"), methods=("maml", "bmaml_chaser"), tasks=(20, inf))
    lines: list[str] = []
    results = run_sinusoid(tmp_path, settings, lines.append)
    assert len(results["methods"]) == 2
    assert len(results["figure1"]) == len(lines) - 2 == len(PARTS["figure1"](settings))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = list(csv.DictReader((tmp_path / "methods.csv").read_text().splitlines()))
    assert [row["recipe"] for row in rows] == ["maml", "bmaml_chaser"]
    assert float(rows[0]["mse"]) == pytest.approx(results["methods"][0]["scores"]["mse"], rel=1e-5)
    assert (tmp_path / "methods.md").read_text().splitlines()[2].startswith("| MAML |")
    assert {path.name for path in tmp_path.glob("*.png")} == {"methods.png", "figure1.png"}
    monkeypatch.setattr(cells_module, "meta_learn", None)
    assert run_sinusoid(tmp_path, settings, lines.append) == results


@pytest.mark.parametrize("name", [*METHODS, *RELEASED])
def test_every_method_learns_and_is_scored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One meta-step each: priors that have hardly moved predict within an order of the curves' mean square of 4.3."""
    recipe = RECIPES[name]
    short = {"smc": smc(num_particles=50, num_steps=10), "hmc": hmc(num_chains=2, num_warmup=20, num_draws=100)}
    if recipe.at_test is not None and recipe.at_test(5).name in short:
        few = short[recipe.at_test(5).name]
        monkeypatch.setitem(RECIPES, name, replace(recipe, at_test=lambda shots: few))
    (found,) = next(run_cells(tmp_path, [Cell(name, 5)], TINY))
    assert found["failed"] is None
    assert 0.01 < found["scores"]["mse"] < 60
    assert TABLES["methods"]([found]).count("\n") == 2


def _scored(recipe: str, tasks: float | None, seed: int, mse: float | None) -> dict[str, Any]:
    asked = {"recipe": recipe, "shots": 5, "tasks": tasks, "seed": seed}
    return {"asked": asked, "scores": mse and {"mse": mse, "member_mse": 2 * mse, "mse_error": 0.1}}


def test_differences_are_of_the_same_training_tasks() -> None:
    """Seeds that differ much more than methods do leave a narrow interval of the difference."""
    ensemble = [_scored("emaml_fair", None, seed, 1.0 + seed) for seed in range(3)]
    ours = [_scored("bmaml_fair", None, seed, 1.5 + seed + 0.1 * (seed == 2)) for seed in range(3)]
    lost = [_scored("bmaml_chaser_fair", None, seed, None if seed else 1.0) for seed in range(3)]
    lines = TABLES["figure1"]([*ensemble, *ours, *lost]).splitlines()
    half = 4.30 * torch.tensor([0.5, 0.5, 0.6]).std().item() / 3**0.5
    assert f"| fair | BMAML, query, less EMAML | 5 | MSE, paired | 0.53 ± {half:.2f} |" in lines
    assert "| fair | BMAML, query | 5 | MSE | 2.53 ± 2.61 |" in lines
    assert "| fair | EMAML | 5 | member MSE | 4.00 ± 4.97 |" in lines
    assert "| fair | BMAML, chaser, less EMAML | 5 | MSE, paired | 2 of 3 diverged |" in lines


def test_figures_show_every_method_and_interval() -> None:
    names = (*RELEASED, *FAIR)
    made = [_scored(name, tasks, seed, 1.0 + seed) for name in names for tasks in (100, None) for seed in (0, 1)]
    axes = draw_figure_1(made).axes
    assert [len(ax.containers) for ax in axes] == [len(RELEASED), len(FAIR)]
    emaml = axes[0].containers[1]
    assert emaml[0].get_ydata().tolist() == [3.0, 3.0], "as released, EMAML is scored by its members"
    half = axes[1].containers[0][2][0].get_segments()[0]
    assert half[1, 1] - half[0, 1] == pytest.approx(2 * 12.71 * 0.5**0.5 / 2**0.5)
    assert len(draw_methods(made[:2]).axes) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parts", "figure"], "parts ['figure'] are not known"),
        (["--methods", "mamml"], "methods ['mamml'] are not known"),
        (["--shots", "5,ten"], "--shots '5,ten' is not a list of integers; write --shots 5,10,20"),
        (["--shots", "5,40"], "test tasks have 20 observations"),
        (["--tasks", "many"], "--tasks 'many' is not a list of numbers; write --tasks 100,1000,inf"),
    ],
)
def test_mistakes_on_the_command_line_are_told(more: list[str], message: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["experiment", "sinusoid", "--out", str(tmp_path), "--quick", *more])
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_the_command_line_runs_a_part(tmp_path: Path) -> None:
    asked = ["--quick", "--parts", "methods", "--methods", "maml", "--shots", "5", "--effort", "1e-9", "--workers", "1"]
    found = CliRunner().invoke(app, ["experiment", "sinusoid", "--out", str(tmp_path), *asked])
    assert found.exit_code == 0, found.output
    assert "maml, K = 5, |T| = inf, seed 0: MSE" in found.output
    assert "methods.md" in found.output


def test_the_whole_study_is_of_the_size_that_its_page_tells() -> None:
    whole = SinusoidSettings()
    assert (whole.shots, whole.tasks, len(whole.seeds), whole.num_test_tasks) == (
        (5, 10, 20),
        (100, 1000, inf),
        3,
        1000,
    )
