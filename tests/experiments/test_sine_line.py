"""The sine/line study, far too short to learn from, and its measure of two modes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bmaml_ppl.datasets.sine_line import ambiguous_task
from bmaml_ppl.experiments import sine_line as study
from bmaml_ppl.experiments.sine_line import (
    METHODS,
    QUICK,
    draw_functions,
    make_model,
    measure_ambiguity,
    run_sine_line,
    summarise,
)
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.storage import load_prior


def test_positions_are_zero_at_the_line_and_one_at_the_sinusoid() -> None:
    task = ambiguous_task()
    x = torch.linspace(-5, 5, 101)
    line = task.line["slope"] * x + task.line["intercept"]
    sine = task.sine["amplitude"] * torch.sin(x - task.sine["phase"])
    position = measure_ambiguity(torch.stack([line, sine, 0.5 * (line + sine), line + 0.4 * (sine - line)]), x, task)
    torch.testing.assert_close(position, torch.tensor([0.0, 1.0, 0.5, 0.4]))
    assert summarise(position) == {"line": 0.25, "sine": 0.25, "between": 0.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sine_line")
    run_sine_line(folder, QUICK)
    return folder


def test_the_study_writes_scores_priors_and_a_figure(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics) == list(METHODS)
    for scored in metrics.values():
        assert set(scored) == {"3 shots", "5 shots", "ambiguous", "ambiguous, central"}
        assert sum(scored["ambiguous"].values()) == pytest.approx(1.0)
        assert 0 < scored["5 shots"]["rmse"] < 20
        assert 0 <= scored["3 shots"]["coverage90"] <= 1
    assert (finished / "ambiguous.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_prior_draws_functions(finished: Path, name: str) -> None:
    prior = load_prior(finished / f"{name}.safetensors", make_model(QUICK, METHODS[name].scale))
    posterior = prior.adapt(ambiguous_task().support, inference=METHODS[name].at_test)
    x, functions = draw_functions(prior, posterior, 7)
    assert functions.shape == (7, len(x))
    assert torch.isfinite(functions).all()
    assert (functions.std(0) > 0).all()


def test_priors_that_are_there_are_kept(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> LearnedPrior:
        raise AssertionError("learned again")

    before = json.loads((finished / "metrics.json").read_text())
    monkeypatch.setattr(study, "learn", refuse)
    assert run_sine_line(finished, QUICK) == before
    with pytest.raises(AssertionError, match="learned again"):
        run_sine_line(finished, replace(QUICK, seed=1))


def test_a_method_needs_the_one_it_goes_on_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mixture' goes on from 'platipus'"):
        run_sine_line(tmp_path, replace(QUICK, methods=("mixture",)))
