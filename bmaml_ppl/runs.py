"""What the command line's commands do: a model and a CSV file in, a folder of results out."""

import csv
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from traceback import FrameSummary, StackSummary, walk_tb
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bmaml_ppl._columns import check_known
from bmaml_ppl.diagnostics.check import check
from bmaml_ppl.diagnostics.export import save_tree
from bmaml_ppl.distributed import join_world, num_restarts
from bmaml_ppl.learned import History, LearnedPrior
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.posterior import Posterior
from bmaml_ppl.run_folder import RunFolder
from bmaml_ppl.settings import Settings, SettingsError, make_inference, make_memory, make_objective, write_settings
from bmaml_ppl.storage import load_prior, read_schema
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Model

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = [
    "End",
    "adapt_prior",
    "describe_prior",
    "describe_values",
    "find_model_lines",
    "fit_prior",
    "load_model",
    "read_csv",
    "read_tasks",
]

End = Literal["finished", "stopped", "kept"]
"""How a run of `fit` ended: "kept" is one that had been finished before."""

_MODEL_MODULE = "_bmaml_ppl_model"
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def load_model(spec: str) -> Model:
    """Loads a model from a Python file, whose folder it may import from.

    Args:
        spec: FILE.py:NAME.

    Raises:
        SettingsError: The text is of another form, or the file has no such function.
        FileNotFoundError: There is no such file.
    """
    file, colon, name = spec.rpartition(":")
    if not (colon and file.endswith(".py") and name):
        raise SettingsError(f"got the model {spec!r}; write FILE.py:NAME, for example growth.py:growth")
    path = Path(file).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file '{file}'")
    found = importlib.util.spec_from_file_location(_MODEL_MODULE, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    with _importable(path.parent):
        found.loader.exec_module(module)
    if not callable(model := getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == _MODEL_MODULE]
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SettingsError(f"'{path.name}' has no function {name!r}; {hint}It has {', '.join(known) or 'none'}")
    return model


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def find_model_lines(error: BaseException) -> list[str]:
    """Lines of the user's model file that an error went through, innermost first, as text."""
    walked = [(f, n) for f, n in walk_tb(error.__traceback__) if f.f_globals.get("__name__") == _MODEL_MODULE]
    frames: list[FrameSummary] = list(StackSummary.extract(iter(walked)))
    return [f"in {Path(f.filename).name}, line {f.lineno}: {f.line}" for f in reversed(frames)]


def fit_prior(settings: Settings, *, progress: bool = True, overwrite: bool = False) -> tuple[Path, End]:
    """Meta-learns a prior and leaves it, its settings and its history in the folder `settings.out`.

    Goes on where a run of the same settings in that folder was stopped, and does nothing where one is finished.

    Args:
        settings: Of the run.
        progress: Whether to show a progress bar.
        overwrite: Whether to remove what another run left in the folder.

    Returns:
        The file of the prior, and how the run ended.

    Raises:
        SettingsError: The folder holds a run of other settings.
    """
    settings = _with_absolute_paths(settings)
    model, tasks = load_model(settings.model), read_tasks(read_csv(settings.data), settings)
    world, folder = join_world()[0], RunFolder(settings)
    # What torchrun starts again goes on, whatever it was asked at first.
    if world.first(lambda: folder.claim(overwrite and not num_restarts())):
        return folder.prior, "kept"
    prior = _learn(model, tasks, settings, folder, progress)
    finished = world.first(lambda: _write_results(prior, folder))
    return folder.prior, "finished" if finished else "stopped"


def _learn(model: Model, tasks: Tasks, settings: Settings, folder: RunFolder, progress: bool) -> LearnedPrior:
    return meta_learn(
        model,
        tasks.standardize() if settings.standardize else tasks,
        num_support=settings.shots,
        inference=make_inference(settings.inference, settings.set),
        objective=make_objective(settings.objective),
        num_steps=settings.num_steps,
        batch_size=settings.batch_size,
        first_order=settings.first_order,
        device=settings.device,
        progress=progress,
        seed=settings.seed,
        compile=settings.compile,
        memory=make_memory(settings.memory),
        chunk_size=settings.chunk_size,
        precision=settings.precision,
        checkpoint_dir=folder.checkpoints,
        checkpoint_every=settings.checkpoint_every,
    )


def _write_results(prior: LearnedPrior, folder: RunFolder) -> bool:
    """Whether the run is finished, and not stopped early."""
    prior.save(folder.prior)
    if prior.history.loss:
        _write_history(prior.history, folder.path)
    finished = prior.history.stopped is None
    if finished:
        folder.finish()
    return finished


def _with_absolute_paths(settings: Settings) -> Settings:
    """Settings that mean the same from any working directory."""
    file, colon, name = settings.model.rpartition(":")
    model = f"{Path(file).resolve()}:{name}" if colon else settings.model
    return replace(settings, model=model, data=str(Path(settings.data).resolve()))


def read_csv(path: str) -> "DataFrame":
    """Reads a CSV file.

    Raises:
        ImportError: pandas is not installed.
        FileNotFoundError: There is no such file.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError('reading CSV files needs pandas; write: pip install "bmaml-ppl[data]"') from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no data file '{path}'")
    return pandas.read_csv(path)


def read_tasks(frame: "DataFrame", settings: Settings) -> Tasks:
    """Groups the rows of a data frame by the columns that the settings name; errors as `Tasks.from_frame`."""
    return Tasks.from_frame(
        frame,
        task=settings.task,
        inputs=settings.input,
        outputs=settings.output,
        constants=settings.constant,
        min_observations=settings.min_observations,
    )


def _write_history(history: History, folder: Path) -> None:
    from bmaml_ppl.plots import draw_learning

    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "gradient_norm"])
        writer.writerows(zip(range(1, len(history.loss) + 1), history.loss, history.grad_norm, strict=True))
    draw_learning(history).savefig(folder / "learning.png", dpi=150)


def adapt_prior(path: Path, settings: Settings, *, num_samples: int = 1000, seed: int | None = None) -> Path:
    """Adapts a learned prior to the tasks of a CSV file, and writes predictions and the posterior.

    Rows with every output given are adapted to. All rows are predicted, those of tasks without a given output
    from the prior alone.

    Args:
        path: The file of the prior.
        settings: Its model, the data and their columns, and where to write.
        num_samples: Draws S.
        seed: Of particles and draws; None takes the prior's.

    Returns:
        The folder of the results.
    """
    settings = replace(_with_absolute_paths(settings), min_observations=1)
    prior = load_prior(path, load_model(settings.model))
    prior = replace(prior, seed=prior.seed if seed is None else seed)
    frame = read_csv(settings.data)
    outputs = [column for columns in settings.output.values() for column in _as_list(columns)]
    check_known("task", [settings.task], frame.columns)
    frame = frame.reindex(columns=[*frame.columns, *(name for name in outputs if name not in frame)])
    given = frame[outputs].notna().all(axis=1)
    if not given.any():
        raise SettingsError(f"'{settings.data}' gives no value of {outputs}; a task adapts to rows that do")
    posterior = prior.adapt(read_tasks(frame[given], settings))
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    everything = read_tasks(frame, replace(settings, output={}))
    draws = _predict(prior, posterior, everything, num_samples)
    _tabulate_predictions(frame, given, draws, settings, prior).to_csv(folder / "predictions.csv", index=False)
    _tabulate_sites(posterior, num_samples).to_csv(folder / "posterior.csv", index=False)
    save_tree(posterior.to_arviz(num_samples=num_samples), folder / "posterior.nc")
    (folder / "check.json").write_text(json.dumps(check(posterior).to_dict(), indent=2) + "\n")
    columns = {name: getattr(settings, name) for name in ("model", "data", "task", "input", "output", "constant")}
    kept = {"prior": str(path.resolve()), **columns, "num_samples": num_samples, "seed": prior.seed}
    write_settings(kept, folder / "adapt.yaml")
    return folder


def _as_list(columns: str | list[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else columns


def _predict(prior: LearnedPrior, posterior: Posterior, tasks: Tasks, num_samples: int) -> dict[str, dict[str, Tensor]]:
    """Task -> observed site -> draws, (S, N, ...)."""
    draws: dict[str, dict[str, Tensor]] = {}
    adapted = list(posterior.names)
    others = [name for name in tasks.names if name not in set(adapted)]
    for names, source in ((adapted, posterior), (others, prior)):
        if names:
            chosen = tasks[names]
            values = source.predict(chosen, num_samples=num_samples)
            for i, length in enumerate(chosen.num_observations.tolist()):
                draws[names[i]] = {
                    site: value[:, i, :length] for site, value in values.items() if site in prior.density.observed
                }
    return draws


def _tabulate_predictions(
    frame: "DataFrame", given: "Series", draws: dict[str, dict[str, Tensor]], settings: Settings, prior: LearnedPrior
) -> "DataFrame":
    """The frame with whether a row was adapted to, and mean, sd and quantiles of each output column."""
    labels = frame[settings.task].astype(str)
    table = frame.assign(adapted_to=given)
    for site, key in prior.density.observed.items():
        if key not in settings.output:
            continue
        columns = _as_list(settings.output[key])
        for name in labels.unique():
            rows = frame.index[labels == name]
            values = draws[name][site]
            flat = values.reshape(len(values), len(rows), -1)
            for i, column in enumerate(columns):
                for statistic, value in _summarise(flat[:, :, i]).items():
                    table.loc[rows, f"{column}_{statistic}"] = value.numpy()
    return table


def _summarise(draws: Tensor) -> dict[str, Tensor]:
    """Statistics over draws, (S, ...) -> (...) each."""
    draws = draws.double()
    levels = torch.tensor(_QUANTILES, dtype=draws.dtype)
    quantiles = draws.quantile(levels, dim=0)
    named = {f"q{round(100 * level):02d}": value for level, value in zip(_QUANTILES, quantiles, strict=True)}
    return {"mean": draws.mean(0), "sd": draws.std(0), **named}


def _tabulate_sites(posterior: Posterior, num_samples: int) -> "DataFrame":
    """One row a task and coordinate of a latent site."""
    from pandas import DataFrame

    rows = []
    for site, values in posterior.sites(num_samples).items():
        shape = values.shape[2:]
        statistics = {k: v.reshape(len(posterior), -1) for k, v in _summarise(values).items()}
        for t, name in enumerate(posterior.names):
            for i, index in enumerate(product(*map(range, shape))):
                label = f"{site}[{','.join(map(str, index))}]" if index else site
                rows.append({"task": name, "site": label} | {k: v[t, i].item() for k, v in statistics.items()})
    return DataFrame(rows)


def describe_prior(path: Path) -> str:
    """A learned prior in words, from its file alone."""
    schema, tensors = read_schema(path)
    shots = schema["num_support"]
    shots = f"{shots[0]} to {shots[1] - 1}" if isinstance(shots, list) else shots
    inference = schema["inference"]
    options = ", ".join(f"{name}={value}" for name, value in inference["config"].items())
    outputs = schema["template"]["outputs"]
    lines = [
        f"{path}: a learned prior (format {schema['format_version']}, bmaml_ppl {schema['package_version']})",
        f"learned for {shots} observations a task, seed {schema['seed']}, start {schema['start']!r}",
        f"inference: {inference['name']}({options})",
        "data:",
        *(
            f"  {key}{' (output)' if key in outputs else ''}{_describe_units(key, tensors)}"
            for key in schema["template"]["data"]
        ),
        *(f"  {key} (once a task){_describe_units(key, tensors)}" for key in schema["template"]["constants"]),
        "latent sites of a task:",
        *(f"  {name} {_describe_shape(site)}on {_shorten(site['support'])}" for name, site in schema["sites"].items()),
        "observed sites:",
        *(f"  {name} from {site['key']}" for name, site in schema["observed"].items()),
        "learned:",
        *(
            f"  {name} {_describe_shape(entry)}= {describe_values(tensors[f'params.{name}'])}"
            for name, entry in schema["params"].items()
        ),
    ]
    return "\n".join(lines)


def _shorten(support: str) -> str:
    """A constraint without its repetition over coordinates."""
    return re.sub(r"IndependentConstraint\(base_constraint=(.*), reinterpreted_batch_ndims=\d+\)", r"\1", support)


def _describe_shape(entry: dict[str, Any]) -> str:
    return f"({', '.join(map(str, entry['shape']))}) " if entry["shape"] else ""


def _describe_units(key: str, tensors: dict[str, Tensor]) -> str:
    if f"scaling.loc.{key}" not in tensors:
        return ""
    loc, scale = (describe_values(tensors[f"scaling.{part}.{key}"]) for part in ("loc", "scale"))
    return f", standardised: mean {loc}, sd {scale}"


def describe_values(value: Tensor) -> str:
    """Up to twelve numbers, or the range and mean of more, as text."""
    if value.numel() > 12:
        low, mean, high = (f"{x.item():.4g}" for x in (value.min(), value.double().mean(), value.max()))
        return f"{value.numel()} numbers from {low} to {high}, mean {mean}"
    if value.ndim:
        return f"[{', '.join(describe_values(row) for row in value)}]"
    return f"{value.item():.4g}"
