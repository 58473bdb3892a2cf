"""Settings of a run: from a file, from the command line, checked by name and kind, and kept beside the results."""

import inspect
import platform
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import yaml

from bmaml_ppl import memory, objectives
from bmaml_ppl.compile import Compile
from bmaml_ppl.inference import ALGORITHMS
from bmaml_ppl.memory import Memory
from bmaml_ppl.numerics import Precision
from bmaml_ppl.objectives import Objective
from bmaml_ppl.types import Inference

__all__ = [
    "Settings",
    "SettingsError",
    "make_inference",
    "make_memory",
    "make_objective",
    "parse_pairs",
    "read_settings",
    "resolve",
    "write_settings",
]

ColumnMap = dict[str, str | list[str]]
_NOTES = ("files", "versions")
"""What a kept file of settings says beside them."""


class SettingsError(ValueError):
    """A setting that is unknown, missing, or of the wrong kind."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; the names are those of the command line's options and of a settings file.

    Attributes:
        model: The Pyro model as FILE.py:name.
        data: A CSV file, one row an observation.
        task: Its column that labels the task.
        input: The model's keyword to a column, or to a list of them.
        output: The same for what the model observes and predicts.
        constant: The same for what is known once a task.
        num_support: Observations a task adapts to, K; two numbers are a range, both included.
        min_observations: Tasks with fewer rows are left out.
        standardize: Whether the model sees columns of mean 0 and standard deviation 1.
        inference: Name in `bmaml_ppl.inference.ALGORITHMS`.
        set: Options of the inference.
        objective: A sum such as "chaser(5) + query_nll(mean)", or "auto".
        num_steps: Meta-steps.
        batch_size: Tasks a meta-step.
        first_order: Whether outer gradients stop at the scores.
        compile: Whether to compile an adaptation step, or "auto", where the run is long enough to earn that back.
        memory: What the unrolled adaptation keeps for the outer gradient, such as "full" or "checkpointed(5)".
        chunk_size: Tasks differentiated together; fewer need less memory. None is all.
        precision: Of the arithmetic.
        device: "auto", "cpu" or "cuda".
        seed: Of everything random.
        checkpoint_every: Meta-steps from one checkpoint to the next.
        out: Folder of the results.
    """

    model: str
    data: str
    task: str
    input: ColumnMap
    output: ColumnMap
    constant: ColumnMap = field(default_factory=dict)
    num_support: int | list[int] = 3
    min_observations: int = 1
    standardize: bool = True
    inference: str = "svgd"
    set: dict[str, Any] = field(default_factory=dict)
    objective: str = "auto"
    num_steps: int = 1000
    batch_size: int = 10
    first_order: bool = False
    compile: Compile = "auto"
    memory: str = "full"
    chunk_size: int | None = None
    precision: Precision = "float32"
    device: str = "auto"
    seed: int = 0
    checkpoint_every: int = 100
    out: str = "runs/fit"

    @property
    def shots(self) -> int | range:
        """`num_support` as `meta_learn` takes it."""
        if isinstance(self.num_support, int):
            return self.num_support
        return range(self.num_support[0], self.num_support[1] + 1)


def resolve(given: Mapping[str, Any], config: str | Path | None = None) -> Settings:
    """Merges defaults, a settings file and what was given, each winning over those before, and checks all.

    Mappings (`input`, `set`, ...) are merged key by key.

    Args:
        given: Settings by name; None is not given.
        config: A YAML or TOML file, or None.

    Raises:
        SettingsError: A name is unknown, a setting missing or of the wrong kind.
        FileNotFoundError: There is no such file.
    """
    merged = {} if config is None else read_settings(config)
    for name, value in given.items():
        if isinstance(value, Mapping):
            merged[name] = {**merged.get(name, {}), **value}
        elif value is not None:
            merged[name] = value
    _check_names("setting", merged, _READERS)
    needed = ("model", "data", "task", "input", "output")
    if missing := [name for name in needed if not merged.get(name)]:
        raise SettingsError(
            f"missing settings: {', '.join(missing)}; give them on the command line (--help shows how), or in a "
            "settings file (--config)"
        )
    return Settings(**{name: _READERS[name](name, value) for name, value in merged.items()})


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads settings from YAML or TOML; the versions and files that `write_settings` notes are left out.

    Raises:
        FileNotFoundError: There is no such file.
        SettingsError: The file is of another kind, cannot be parsed, or has unknown names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no settings file '{path}'")
    try:
        if path.suffix == ".toml":
            found = tomllib.loads(path.read_text())
        elif path.suffix in (".yaml", ".yml"):
            found = yaml.safe_load(path.read_text()) or {}
        else:
            raise SettingsError(f"'{path}' ends in {path.suffix!r}; a settings file is .yaml, .yml or .toml")
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise SettingsError(f"'{path}' holds {type(found).__name__}; write lines such as\ntask: Pig")
    found = {name.replace("-", "_") if isinstance(name, str) else name: value for name, value in found.items()}
    for name in _NOTES:
        found.pop(name, None)
    _check_names(f"setting in '{path}'", found, _READERS)
    return {name: _READERS[name](name, value) for name, value in found.items()}


def write_settings(settings: Mapping[str, Any], path: str | Path) -> None:
    """Writes resolved settings and the versions of what ran, as YAML that `read_settings` reads back."""
    content = {**settings, "versions": _find_versions()}
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _find_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("bmaml-ppl", "torch", "pyro-ppl", "arviz"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            from bmaml_ppl import __version__

            found[package] = __version__ if package == "bmaml-ppl" else "not installed"
    return found


def parse_pairs(option: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Parses `name=value` arguments; values stay text, and a comma makes a list.

    Raises:
        SettingsError: There is no `=`, or a name is repeated.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (equals and name.strip() and text.strip()):
            raise SettingsError(f"got --{option} {pair!r}; write --{option} NAME=VALUE")
        if name.strip() in parsed:
            raise SettingsError(f"--{option} gives {name.strip()!r} twice; for several columns write NAME=A,B")
        values = [part.strip() for part in text.split(",")]
        parsed[name.strip()] = values if len(values) > 1 else values[0]
    return parsed


def _parse_scalar(text: Any) -> Any:
    """A YAML scalar, where 1e-4 is a number too, as YAML 1.1 has it not."""
    value = yaml.safe_load(text) if isinstance(text, str) else text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def make_inference(name: str, options: Mapping[str, Any]) -> Inference:
    """Makes an inference algorithm by name.

    Raises:
        SettingsError: The name, or an option, is unknown; names the nearest one.
        ValueError: An option has a value that the algorithm refuses.
    """
    _check_names("inference", [name], ALGORITHMS)
    known = [option for option in inspect.signature(ALGORITHMS[name]).parameters if option != "sites"]
    _check_names(f"option of inference {name!r}", options, known)
    return ALGORITHMS[name](**options)


def make_objective(text: str) -> Objective | None:
    """Makes an objective of text such as "chaser(5) + 0.5 query_nll(mean)"; "auto" is None.

    Raises:
        SettingsError: The text is not a sum of known objectives.
    """
    if text.strip() == "auto":
        return None
    known = {name: getattr(objectives, name) for name in objectives.__all__ if name[0].islower()}
    total = Objective()
    for term in text.split("+"):
        match = re.fullmatch(r"\s*(?:([\d.]+)\s*\*?\s*)?(\w+)(?:\((.*)\))?\s*", term)
        if match is None:
            raise SettingsError(f"got objective {text!r}; write a sum such as 'chaser(5) + query_nll(mean)'")
        weight, name, argument = match.groups()
        _check_names("objective", [name], known)
        total = total + float(weight or 1) * known[name](*_parse_arguments(argument))
    return total


def make_memory(text: str) -> Memory:
    """Makes a memory mode of text such as "full" or "checkpointed(5)".

    Raises:
        SettingsError: The text is not a known mode.
    """
    known = {name: getattr(memory, name) for name in memory.__all__ if name[0].islower()}
    match = re.fullmatch(r"\s*(\w+)(?:\((.*)\))?\s*", text)
    if match is None:
        raise SettingsError(f"got memory {text!r}; write a mode such as 'full' or 'checkpointed(5)'")
    _check_names("memory", [match[1]], known)
    parts = [part.strip() for part in match[2].split(",")] if match[2] else []
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    try:
        made: Memory = known[match[1]](
            *(_parse_limit(part) for part in parts if "=" not in part),
            **{name.strip(): _parse_limit(value) for name, value in named.items()},
        )
    except TypeError as error:
        raise SettingsError(f"got memory {text!r}; write a mode such as 'checkpointed(5)': {error}") from error
    return made


def _parse_limit(text: str) -> Any:
    return None if text.strip().lower() == "none" else _parse_scalar(text.strip())


def _parse_arguments(text: str | None) -> list[Any]:
    return [_parse_scalar(each.strip()) for each in text.split(",")] if text else []


def _check_names(what: str, given: Iterable[Any], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise SettingsError(f"unknown {what}: {name!r}; {hint}Known are {', '.join(known)}")


def _read_text(name: str, value: Any) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise SettingsError(f"setting {name!r} is text, got {value!r}")


def _read_count(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise SettingsError(f"setting {name!r} is a whole number from 0 up, got {value!r}")


def _read_switch(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise SettingsError(f"setting {name!r} is true or false, got {value!r}")


def _read_compile(name: str, value: Any) -> Compile:
    known: dict[str, Compile] = {"auto": "auto", "true": True, "false": False}
    if (text := str(value).lower()) in known:
        return known[text]
    raise SettingsError(f"setting {name!r} is auto, true or false, got {value!r}")


def _read_precision(name: str, value: Any) -> Precision:
    if value in get_args(Precision):
        return value
    raise SettingsError(f"setting {name!r} is {', '.join(get_args(Precision))}; got {value!r}")


def _read_shots(name: str, value: Any) -> int | list[int]:
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)(?:-(\d+))?", value.strip())):
        value = [int(number) for number in match.groups() if number is not None]
        value = value[0] if len(value) == 1 else value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(n, int) for n in value)
        and 0 < value[0] < value[1]
    ):
        return value
    raise SettingsError(f"setting {name!r} is a number such as 3, or a range such as 2-5, got {value!r}")


def _read_columns(name: str, value: Any) -> ColumnMap:
    if not isinstance(value, Mapping):
        raise SettingsError(f"setting {name!r} maps the model's keywords to columns, such as time: Time; got {value!r}")
    return {str(k): [str(c) for c in v] if isinstance(v, list | tuple) else str(v) for k, v in value.items()}


def _read_options(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"setting {name!r} maps options to values, such as num_particles: 10; got {value!r}")
    return {
        str(option): [_parse_scalar(part) for part in entry] if isinstance(entry, list) else _parse_scalar(entry)
        for option, entry in value.items()
    }


_KINDS: dict[Any, Callable[[str, Any], Any]] = {
    str: _read_text,
    int: _read_count,
    bool: _read_switch,
    ColumnMap: _read_columns,
    dict[str, Any]: _read_options,
    int | list[int]: _read_shots,
    int | None: lambda name, value: None if value is None else _read_count(name, value),
    Compile: _read_compile,
    Precision: _read_precision,
}
_READERS = {f.name: _KINDS[f.type] for f in fields(Settings)}
