"""What `bmaml-ppl fit` left in a folder, read back."""

import csv
import inspect
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from bmaml_ppl.learned import History, LearnedPrior
from bmaml_ppl.runs import load_model
from bmaml_ppl.settings import Settings, SettingsError, resolve
from bmaml_ppl.storage import load_prior
from bmaml_ppl.types import Model

__all__ = ["Run", "read_run"]

_MOST_LINES = 300


@dataclass(frozen=True)
class Run:
    """One run of `bmaml-ppl fit`.

    Attributes:
        folder: Where it is.
        settings: Of the run.
        versions: Of what ran, by name.
        prior: What was learned.
        source: Text of the model's file, or of its function alone where the file is long.
        history: What the outer loop saw; empty where no step was made.
        learned_at: When the prior was written.
    """

    folder: Path
    settings: Settings
    versions: dict[str, str]
    prior: LearnedPrior
    source: str
    history: History
    learned_at: datetime

    @property
    def outputs(self) -> dict[str, list[str]]:
        """Columns of each output of the model."""
        return {
            key: [columns] if isinstance(columns, str) else columns for key, columns in self.settings.output.items()
        }

    @property
    def shots(self) -> int:
        """Observations that the prior was learned to adapt to, the most where it is a range."""
        shots = self.prior.num_support
        return shots if isinstance(shots, int) else shots[-1]

    @property
    def shown_shots(self) -> str:
        """The same as text, with the range."""
        shots = self.prior.num_support
        return str(shots) if isinstance(shots, int) else f"{shots[0]} to {shots[-1]}"


def read_run(folder: Path) -> Run:
    """Reads a run.

    Raises:
        FileNotFoundError: The folder, or a file of it, is missing.
        SettingsError: The folder is of another command.
        ValueError: The model is no longer the one that was learned with.
    """
    settings_file, prior_file = folder / "settings.yaml", folder / "prior.safetensors"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder '{folder}'; give the folder that `bmaml-ppl fit --out` wrote")
    if (folder / "adapt.yaml").is_file() and not settings_file.is_file():
        raise SettingsError(
            f"'{folder}' is a folder of `bmaml-ppl adapt`; give the folder of `bmaml-ppl fit`, and other tasks by "
            "--data FILE.csv"
        )
    for file in (settings_file, prior_file):
        if not file.is_file():
            raise FileNotFoundError(f"there is no '{file}'; give the folder that `bmaml-ppl fit --out` wrote")
    settings = resolve({}, settings_file)
    model = load_model(settings.model)
    kept: dict[str, Any] = yaml.safe_load(settings_file.read_text())
    return Run(
        folder,
        settings,
        {str(name): str(value) for name, value in kept.get("versions", {}).items()},
        load_prior(prior_file, model),
        _read_source(settings, model),
        _read_history(folder / "history.csv"),
        datetime.fromtimestamp(prior_file.stat().st_mtime, UTC),
    )


def _read_source(settings: Settings, model: Model) -> str:
    text = Path(settings.model.rpartition(":")[0]).read_text()
    return text if len(text.splitlines()) <= _MOST_LINES else inspect.getsource(model)


def _read_history(path: Path) -> History:
    if not path.is_file():
        return History()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return History([float(row["loss"]) for row in rows], [float(row["gradient_norm"]) for row in rows])
