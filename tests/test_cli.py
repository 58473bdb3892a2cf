"""The command line from a user's side: a model file and a CSV file, and every mistake told in a line or two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from bmaml_ppl import __version__
from bmaml_ppl.cli import app

MODEL = """
import pyro
import pyro.distributions as dist
import torch


def line(time, weight=None):
    mean = pyro.param("mean", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
    coef = pyro.sample("coef", dist.Normal(mean, scale).to_event(1))
    with pyro.plate("data", time.shape[0]):
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * time, 0.3), obs=weight)


def misspelt(time, weight=None):
    pyro.sample("coef", dist.Norml(0.0, 1.0))


NUMBER = 3
"""
_INTERRUPTED = """

def interrupted(time, weight=None):
    import os, signal
    from pathlib import Path

    calls = Path("calls")
    if not Path("a/prior.safetensors").exists():
        with calls.open("a") as file:
            file.write(".")
        if calls.stat().st_size == 30:
            os.kill(os.getpid(), signal.SIGINT)
    line(time, weight)
"""
PIG = ["--task", "Pig", "--output", "weight=Weight", "--num-steps", "2"]
FIT = [*PIG, "--input", "time=Time"]
SMALL = ["--set", "num_particles=3", "--set", "num_steps=2", "--batch-size", "3"]

Run = Callable[..., Result]


def _pigs() -> pandas.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(f"pig {i}", t, 20 + 5 * t + rng.normal()) for i in range(5) for t in range(6 - i % 2)]
    return pandas.DataFrame(rows, columns=["Pig", "Time", "Weight"])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in a folder that holds model.py and pigs.csv."""
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    _pigs().to_csv("pigs.csv", index=False)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return run


def _fit(run: Run, *more: str) -> Result:
    result = run("fit", "model.py:line", "--data", "pigs.csv", *FIT, *SMALL, *more)
    assert result.exit_code == 0, result.output
    return result


def _refused(result: Result) -> str:
    """What a user reads of a mistake: one paragraph, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_fit_adapt_and_show_work_together(run: Run) -> None:
    shown = _fit(run, "--out", "runs/a").output
    assert {path.name for path in Path("runs/a").iterdir()} == {
        "prior.safetensors",
        "settings.yaml",
        "history.csv",
        "learning.png",
    }
    assert len(pandas.read_csv("runs/a/history.csv")) == 2
    new = _pigs().iloc[:11]
    new.loc[(new.Time > 2) | (new.Pig == "pig 1"), "Weight"] = np.nan
    new = new.iloc[::-1]
    new.to_csv("new.csv", index=False)
    result = run("adapt", "runs/a/prior.safetensors", "--data", "new.csv", "--num-samples", "300")
    assert result.exit_code == 0, result.output
    assert run("show", "runs/a/prior.safetensors").output.strip() in shown
    _check_predictions(new.reset_index(drop=True))
    sites = pandas.read_csv("runs/a/adapted/posterior.csv")
    assert sites[["task", "site"]].to_numpy().tolist() == [["pig 0", "coef[0]"], ["pig 0", "coef[1]"]]
    assert Path("runs/a/adapted/posterior.nc").stat().st_size > 0
    assert {row["name"] for row in json.loads(Path("runs/a/adapted/check.json").read_text())["findings"]} >= {"spread"}
    assert yaml.safe_load(Path("runs/a/adapted/adapt.yaml").read_text())["num_samples"] == 300


def _check_predictions(new: pandas.DataFrame) -> None:
    table = pandas.read_csv("runs/a/adapted/predictions.csv")
    pandas.testing.assert_frame_equal(table[["Pig", "Time", "Weight"]], new, check_dtype=False)
    assert table.adapted_to.tolist() == new.Weight.notna().tolist()
    assert list(table.columns[-7:]) == [f"Weight_{s}" for s in ("mean", "sd", "q05", "q25", "q50", "q75", "q95")]
    assert table.notna().drop(columns="Weight").all(axis=None)
    assert (np.diff(table[["Weight_q05", "Weight_q25", "Weight_q50", "Weight_q75", "Weight_q95"]]) > 0).all()
    assert table[table.Pig == "pig 0"].Weight_sd.iloc[-1] < table[table.Pig == "pig 1"].Weight_sd.min()


def test_show_tells_sites_parameters_and_units(run: Run) -> None:
    _fit(run, "--out", "a")
    shown = run("show", "a/prior.safetensors").output
    for text in (
        "svgd(num_particles=3",
        "3 observations a task",
        "coef (2) on Real()",
        "obs from weight",
        "mean (2) = [",
    ):
        assert text in shown
    assert "weight (output), standardised: mean 31." in shown


def test_config_file_is_overruled_by_the_command_line(run: Run) -> None:
    Path("a.yaml").write_text(
        "model: model.py:line\ndata: pigs.csv\ntask: Pig\ninput: {time: Time}\noutput: {weight: Weight}\n"
        "num_steps: 1\nseed: 3\nout: from_file\nset: {num_particles: 3, num_steps: 2}\n"
    )
    result = run("fit", "--config", "a.yaml", "--num-steps", "2", "--set", "num_steps=1", "--min-observations", "6")
    assert result.exit_code == 0, result.output
    kept = yaml.safe_load(Path("from_file/settings.yaml").read_text())
    assert (kept["num_steps"], kept["seed"], kept["min_observations"]) == (2, 3, 6)
    assert kept["set"] == {"num_particles": 3, "num_steps": 1}
    assert kept["versions"]["bmaml-ppl"] == __version__


def test_kept_settings_repeat_the_run(run: Run) -> None:
    _fit(run, "--out", "a", "--seed", "1")
    assert run("fit", "--config", "a/settings.yaml", "--out", "b").exit_code == 0
    losses = [pandas.read_csv(f"{folder}/history.csv") for folder in ("a", "b")]
    pandas.testing.assert_frame_equal(*losses)


def test_adapt_asks_for_what_is_not_beside_the_prior(run: Run) -> None:
    _fit(run, "--out", "a")
    Path("a/prior.safetensors").rename("alone.safetensors")
    told = _refused(run("adapt", "alone.safetensors", "--data", "pigs.csv"))
    assert "missing settings: model, task, input, output" in told
    given = [
        "--model",
        "model.py:line",
        "--task",
        "Pig",
        "--input",
        "time=Time",
        "--output",
        "weight=Weight",
        "--out",
        "b",
        "--num-samples",
        "50",
    ]
    assert run("adapt", "alone.safetensors", "--data", "pigs.csv", *given).exit_code == 0
    assert Path("b/predictions.csv").is_file()


def test_a_finished_run_is_kept_and_another_is_refused_unless_it_may_be_replaced(run: Run) -> None:
    _fit(run, "--out", "a")
    before = Path("a/prior.safetensors").read_bytes()
    assert "Learned before by the same settings" in _fit(run, "--out", "a", "--compile", "false").output
    again = ("fit", "--config", "a/settings.yaml", "--out", "a", "--num-steps", "3")
    told = _refused(run(*again))
    assert "'a' holds a finished run of other settings (num_steps was 2, is 3); write --overwrite" in told
    assert Path("a/prior.safetensors").read_bytes() == before
    assert "Written to" in run(*again, "--overwrite").output
    assert len(pandas.read_csv("a/history.csv")) == 3


def test_an_edited_model_or_data_file_makes_another_run(run: Run) -> None:
    _fit(run, "--out", "a")
    Path("model.py").write_text(MODEL.replace("0.3", "0.4"))
    _pigs().iloc[1:].to_csv("pigs.csv", index=False)
    told = _refused(run("fit", "--config", "a/settings.yaml", "--out", "a"))
    assert "the model file has changed; the data file has changed" in told


def test_an_interrupted_run_goes_on_to_the_same_prior(run: Run) -> None:
    # The second model sends Ctrl-C to its own process once, in the middle of the third meta-step or so.
    Path("model.py").write_text(MODEL + _INTERRUPTED)
    more = ["--data", "pigs.csv", *FIT, *SMALL, "--num-steps", "6", "--compile", "false", "--checkpoint-every", "4"]
    with pytest.warns(UserWarning, match="interrupted at meta-step"):
        stopped = run("fit", "model.py:interrupted", *more, "--out", "a")
    assert "Stopped early, the same command goes on" in stopped.output
    assert len(pandas.read_csv("a/history.csv")) < 6
    assert "Written to a" in run("fit", "model.py:interrupted", *more, "--out", "a").output
    assert not Path("a/checkpoints").exists()
    assert run("fit", "model.py:interrupted", *more, "--out", "b").exit_code == 0
    assert Path("a/prior.safetensors").read_bytes() == Path("b/prior.safetensors").read_bytes()
    assert Path("a/history.csv").read_text() == Path("b/history.csv").read_text()


def test_memory_precision_and_chunks_reach_the_learner(run: Run) -> None:
    _fit(run, "--out", "a", "--memory", "checkpointed(2)", "--chunk-size", "2", "--precision", "float64")
    kept = yaml.safe_load(Path("a/settings.yaml").read_text())
    assert (kept["memory"], kept["chunk_size"], kept["precision"]) == ("checkpointed(2)", 2, "float64")
    assert all(value.dtype == torch.float64 for value in load_file("a/prior.safetensors").values())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model.py:lines", *FIT], "'model.py' has no function 'lines'; did you mean 'line'?"),
        (["model.py:NUMBER", *FIT], "has no function 'NUMBER'"),
        (["model.py", *FIT], "write FILE.py:NAME"),
        (["modle.py:line", *FIT], "there is no model file"),
        (["model.py:misspelt", *FIT], "AttributeError: module 'pyro.distributions' has no attribute 'Norml'"),
        (["model.py:misspelt", *FIT], 'in model.py, line 16: pyro.sample("coef", dist.Norml(0.0, 1.0))'),
        (["model.py:line", *FIT, "--inference", "svdg"], "unknown inference: 'svdg'; did you mean 'svgd'?"),
        (["model.py:line", *FIT, "--set", "num_particle=3"], "did you mean 'num_particles'?"),
        (["model.py:line", *FIT, "--set", "num_particles"], "write --set NAME=VALUE"),
        (["model.py:line", *FIT, "--set", "step_size=-1"], "step_size=-1 must be positive"),
        (["model.py:line", *FIT, "--objective", "chasr"], "unknown objective: 'chasr'; did you mean 'chaser'?"),
        (["model.py:line", *FIT, "--task", "Pigs"], "unknown name 'Pigs'; did you mean 'Pig'?"),
        (["model.py:line", *PIG, "--input", "time=Tme"], "unknown name 'Tme'; did you mean 'Time'?"),
        (["model.py:line", *PIG, "--input", "tyme=Time"], "the model takes (time, weight=None)"),
        (["model.py:line", *FIT, "--input", "time=Time"], "--input gives 'time' twice"),
        (["model.py:line", *FIT, "--data", "pig.csv"], "there is no data file"),
        (["model.py:line", *FIT, "--num-support", "six"], "is a number such as 3, or a range"),
        (["model.py:line", *FIT, "--num-support", "6"], "pig 1"),
        (["model.py:line", *FIT, "--config", "none.yaml"], "there is no settings file 'none.yaml'"),
        (["--task", "Pig"], "missing settings: model, input, output"),
        (["model.py:line", *FIT, "--memory", "ful"], "unknown memory: 'ful'; did you mean 'full'?"),
        (["model.py:line", *FIT, "--precision", "half"], "'precision' is float32, tf32, bf16, float64; got 'half'"),
        (["model.py:line", *FIT, "--compile", "yes"], "'compile' is auto, true or false, got 'yes'"),
        (["model.py:line", *FIT, "--checkpoint-every", "0"], "checkpoint_every"),
    ],
)
def test_a_mistake_of_fit_is_told_in_words(run: Run, arguments: list[str], told: str) -> None:
    data = [] if "--data" in arguments else ["--data", "pigs.csv"]
    assert told in _refused(run("fit", *arguments, *data))


def test_an_unknown_setting_of_a_file_is_told(run: Run) -> None:
    Path("a.toml").write_text("num_stepz = 3\n")
    assert "'num_stepz'; did you mean 'num_steps'?" in _refused(run("fit", "--config", "a.toml"))


def test_a_model_file_that_does_not_parse_is_told(run: Run) -> None:
    Path("model.py").write_text("def line(:\n")
    assert "SyntaxError: invalid syntax (model.py, line 1)" in _refused(
        run("fit", "model.py:line", "--data", "x", *FIT)
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda frame: frame.assign(Weight=np.nan), "gives no value of ['Weight']"),
        (lambda frame: frame.drop(columns="Weight"), "gives no value of ['Weight']"),
        (lambda frame: frame.drop(columns="Time"), "unknown name 'Time'"),
        (lambda frame: frame.rename(columns={"Pig": "Pigs"}), "did you mean 'Pigs'?"),
        (lambda frame: frame.assign(Time="a"), "column 'Time' holds"),
    ],
)
def test_a_mistake_in_the_data_to_adapt_to_is_told(run: Run, change: Callable[[Any], Any], told: str) -> None:
    _fit(run, "--out", "a", "--num-steps", "0")
    change(_pigs()).to_csv("new.csv", index=False)
    assert told in _refused(run("adapt", "a/prior.safetensors", "--data", "new.csv"))


def test_another_model_than_the_learned_one_is_refused(run: Run) -> None:
    _fit(run, "--out", "a", "--num-steps", "0")
    Path("model.py").write_text(MODEL.replace('"scale"', '"width"'))
    told = _refused(run("adapt", "a/prior.safetensors", "--data", "pigs.csv"))
    assert "param 'scale' is missing in the model" in told


def test_a_file_that_is_no_prior_is_told(run: Run) -> None:
    assert "not a complete safetensors file" in _refused(run("show", "pigs.csv"))
    assert "there is no file 'none'" in _refused(run("show", "none"))


def test_raw_units_are_warned_of_and_kept(run: Run) -> None:
    with pytest.warns(UserWarning, match="root mean square"):
        _fit(run, "--out", "a", "--no-standardize", "--num-steps", "0")
    shown = run("show", "a/prior.safetensors").output
    assert "standardised" not in shown


def test_debug_shows_the_traceback(run: Run) -> None:
    result = run("--debug", "fit", "model.py:lines", "--data", "pigs.csv", *FIT)
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("command", ["fit", "adapt", "show", "demo", "experiment growth", "experiment sine-line"])
def test_help_has_its_examples_line_by_line(run: Run, command: str) -> None:
    text = run(*command.split(), "--help").output
    assert f"bmaml-ppl {command}" in text
    assert "\b" not in text


def test_seeds_that_are_no_numbers_are_told(run: Run) -> None:
    assert "--seeds '1-3' is not a list" in _refused(run("experiment", "growth", "--quick", "--seeds", "1-3"))


def test_version_is_shown(run: Run) -> None:
    assert run("--version").output == f"bmaml-ppl {__version__}\n"


def test_laplace_is_fitted_by_its_evidence(run: Run) -> None:
    fitted = run(
        "fit", "model.py:line", "--data", "pigs.csv", *FIT, "--inference", "laplace", "--objective", "evidence"
    )
    assert fitted.exit_code == 0, fitted.output
    assert "laplace" in run("show", "runs/fit/prior.safetensors").output or "laplace" in fitted.output
    query = run(
        "fit",
        "model.py:line",
        "--data",
        "pigs.csv",
        *FIT,
        "--inference",
        "laplace",
        "--objective",
        "evidence(query, 0.1)",
        "--overwrite",
    )
    assert query.exit_code == 0, query.output


def test_sine_line_study_runs(run: Run) -> None:
    done = run("experiment", "sine-line", "--quick", "--out", "study")
    assert done.exit_code == 0, done.output
    assert "PLATIPUS, 5 shots: rmse" in done.output
    assert Path("study/ambiguous.png").is_file()
