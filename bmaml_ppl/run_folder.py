"""The folder of a run: kept apart from runs of other settings, and gone on from where a run of the same was stopped."""

import hashlib
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from bmaml_ppl.settings import Settings, SettingsError, resolve, write_settings

__all__ = ["RunFolder"]

_FREE = frozenset({"out", "compile", "device", "checkpoint_every", "memory", "chunk_size"})
"""Settings that say how a run is computed, not what: it may go on with others; of memory modes, checkpoints decide."""

_RESULTS = ("prior.safetensors", "history.csv", "learning.png")


class RunFolder:
    """The folder of one run of `fit`.

    Args:
        settings: With absolute paths.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.path = Path(settings.out)
        self.prior, self.checkpoints = self.path / "prior.safetensors", self.path / "checkpoints"

    def claim(self, overwrite: bool) -> bool:
        """Notes the settings of the run that begins, or goes on, in the folder.

        Args:
            overwrite: Whether to remove the run that the folder holds.

        Returns:
            Whether the folder holds the finished run of these settings already.

        Raises:
            SettingsError: The folder holds a run of other settings, of another model file or of other data.
        """
        if overwrite:
            self._clear()
        unfinished = self.checkpoints.is_dir()
        if self.prior.is_file() or (unfinished and any(self.checkpoints.iterdir())):
            self._refuse_others("an unfinished" if unfinished else "a finished")
            if not unfinished:
                return True
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_settings({**asdict(self.settings), "files": self._hash_files()}, self.path / "settings.yaml")
        return False

    def finish(self) -> None:
        """Removes the checkpoints of a run whose results are written."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _clear(self) -> None:
        for name in _RESULTS:
            (self.path / name).unlink(missing_ok=True)
        self.finish()

    def _refuse_others(self, which: str) -> None:
        if changes := self._find_changes():
            raise SettingsError(
                f"'{self.settings.out}' holds {which} run of other settings ({'; '.join(changes)}); write --overwrite "
                "to replace it, or another folder (--out)"
            )

    def _find_changes(self) -> list[str]:
        """What is not as it was when the folder was claimed, in words."""
        file = self.path / "settings.yaml"
        try:
            kept = resolve({}, file)
        except (SettingsError, OSError) as error:
            return [f"they cannot be told: {error}"]
        names = [f.name for f in fields(Settings) if f.name not in _FREE]
        names = [name for name in names if getattr(kept, name) != getattr(self.settings, name)]
        changes = [f"{name} was {getattr(kept, name)!r}, is {getattr(self.settings, name)!r}" for name in names]
        hashes: dict[str, Any] = yaml.safe_load(file.read_text()).get("files", {})
        edited = [name for name, found in self._hash_files().items() if hashes.get(name, found) != found]
        return changes + [f"the {name} file has changed" for name in edited if name not in names]

    def _hash_files(self) -> dict[str, str]:
        files = {"model": self.settings.model.rpartition(":")[0], "data": self.settings.data}
        return {
            name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
            for name, file in files.items()
            if Path(file).is_file()
        }
