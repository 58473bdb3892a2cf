"""Settings: where they come from, what wins, and what is said of a wrong one."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from bmaml_ppl.memory import Memory, checkpointed, full, truncated
from bmaml_ppl.objectives import chaser, query_nll
from bmaml_ppl.settings import (
    Settings,
    SettingsError,
    make_inference,
    make_memory,
    make_objective,
    parse_pairs,
    read_settings,
    resolve,
    write_settings,
)

NEEDED: dict[str, Any] = {
    "model": "growth.py:growth",
    "data": "pigs.csv",
    "task": "Pig",
    "input": {"time": "Time"},
    "output": {"weight": "Weight"},
}


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_file_and_command_line_win_in_this_order(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.yaml", "num_steps: 7\nbatch_size: 3\nset: {num_particles: 4, step_size: 1e-4}\n")
    settings = resolve({**NEEDED, "batch_size": 5, "seed": None, "set": {"num_particles": "6"}}, path)
    assert (settings.seed, settings.num_steps, settings.batch_size) == (0, 7, 5)
    assert settings.set == {"num_particles": 6, "step_size": 1e-4}


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    in_yaml = _write(tmp_path, "a.yaml", "num-support: 2-5\nstandardize: false\ninput: {x: [a, b]}\n")
    in_toml = _write(tmp_path, "a.toml", 'num_support = "2-5"\nstandardize = false\n[input]\nx = ["a", "b"]\n')
    assert read_settings(in_yaml) == read_settings(in_toml)
    settings = resolve({**NEEDED, "input": None}, in_yaml)
    assert settings.shots == range(2, 6)
    assert settings.input == {"x": ["a", "b"]}


def test_written_settings_read_back_as_they_were(tmp_path: Path) -> None:
    settings = resolve({**NEEDED, "set": {"step_size": "1e-4", "learn_step_size": "scalar"}, "num_support": [2, 4]})
    write_settings(vars(settings), tmp_path / "settings.yaml")
    assert resolve({}, tmp_path / "settings.yaml") == settings
    versions = yaml.safe_load((tmp_path / "settings.yaml").read_text())["versions"]
    assert set(versions) == {"python", "bmaml-ppl", "torch", "pyro-ppl", "arviz"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "num_stepz: 3\n", "unknown setting in .*'num_stepz'; did you mean 'num_steps'"),
        ("a.yaml", "- 1\n", "holds list"),
        ("a.yaml", "a: [\n", "cannot be read"),
        ("a.toml", "num_steps =\n", "cannot be read"),
        ("a.ini", "num_steps=3\n", "ends in '.ini'"),
        ("a.yaml", "num_steps: many\n", "'num_steps' is a whole number from 0 up, got 'many'"),
        ("a.yaml", "standardize: 3\n", "'standardize' is true or false, got 3"),
        ("a.yaml", "num_support: 5-2\n", "'num_support' is a number such as 3, or a range"),
        ("a.yaml", "input: Time\n", "'input' maps the model's keywords to columns"),
        ("a.yaml", "set: 3\n", "'set' maps options to values"),
        ("a.yaml", "task: true\n", "'task' is text, got True"),
        ("a.yaml", "compile: often\n", "'compile' is auto, true or false, got 'often'"),
        ("a.yaml", "precision: float16\n", "'precision' is float32, tf32, bf16, float64; got 'float16'"),
        ("a.yaml", "checkpoint_every: -1\n", "'checkpoint_every' is a whole number from 0 up, got -1"),
        ("a.yaml", "chunk_size: all\n", "'chunk_size' is a whole number from 0 up, got 'all'"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve(NEEDED, _write(tmp_path, name, text))


def test_missing_settings_are_listed_together() -> None:
    with pytest.raises(SettingsError, match="missing settings: model, output;"):
        resolve({**NEEDED, "model": None, "output": None})


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no settings file 'nowhere.yaml'"):
        resolve(NEEDED, "nowhere.yaml")


def test_pairs_keep_text_and_split_at_commas() -> None:
    assert parse_pairs("input", ["x=no", "z = a, b"]) == {"x": "no", "z": ["a", "b"]}


@pytest.mark.parametrize("pairs", [["x"], ["=a"], ["x="], ["x=a", "x=b"]])
def test_pairs_that_are_none_are_refused(pairs: list[str]) -> None:
    with pytest.raises(SettingsError, match="--input"):
        parse_pairs("input", pairs)


def test_every_setting_is_read_by_its_kind() -> None:
    assert resolve(NEEDED) == Settings(**NEEDED)


def test_inference_is_made_by_name_with_its_options() -> None:
    inference = make_inference("svgd", {"num_particles": 7, "step_size": 0.5})
    assert (inference.name, inference.num_particles, inference.config["step_size"]) == ("svgd", 7, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svdg", {}, "unknown inference: 'svdg'; did you mean 'svgd'"),
        ("svgd", {"num_particle": 3}, "unknown option of inference 'svgd': .*did you mean 'num_particles'"),
        ("map_estimate", {"sites": 3}, "unknown option of inference 'map_estimate': 'sites'"),
    ],
)
def test_unknown_inference_and_options_name_the_nearest(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_inference(name, options)


@pytest.mark.parametrize("text", ["chaser(5) + query_nll(mean)", "0.5 chaser(1) + query_nll(mixture)", "marginal_nll"])
def test_an_objective_is_read_as_it_is_shown(text: str) -> None:
    assert str(make_objective(text)) == text


@pytest.mark.parametrize(("given", "read"), [("auto", "auto"), ("True", True), (False, False), ("false", False)])
def test_compilation_is_read_from_text_and_from_a_switch(given: Any, read: Any) -> None:
    assert resolve({**NEEDED, "compile": given}).compile is read


@pytest.mark.parametrize(
    ("text", "made"), [("full", full()), ("checkpointed(5)", checkpointed(5)), ("truncated( 10 )", truncated(10))]
)
def test_a_memory_mode_is_made_of_text(text: str, made: Memory) -> None:
    assert make_memory(text) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [("checkpoint(5)", "did you mean 'checkpointed'"), ("full +", "write a mode"), ("truncated(-1)", "num_steps")],
)
def test_a_wrong_memory_mode_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_memory(text)


def test_automatic_objective_is_left_to_the_learner() -> None:
    assert make_objective("auto") is None
    assert str(make_objective("chaser + query_nll")) == str(chaser() + query_nll())


@pytest.mark.parametrize(
    ("text", "message"), [("chasr + query_nll", "did you mean 'chaser'"), ("chaser -", "write a sum")]
)
def test_a_wrong_objective_is_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_objective(text)
