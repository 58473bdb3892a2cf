"""Checkpoints of a run: all that the outer loop needs to go on as if it had never been stopped.

A checkpoint is one safetensors file. Its header holds a SHA-256 of the whole file (taken with zeros in its own place),
as safetensors itself notices neither a flipped bit nor bytes of another file of the same layout.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from bmaml_ppl.files import clear_partial, dump_tensors, write_atomically
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.run_settings import Settings, compare_settings

__all__ = ["CHECKPOINT_VERSION", "CheckpointWarning", "Checkpoints", "Saved", "dump_checkpoint", "parse_checkpoint"]

CHECKPOINT_VERSION = 1
"""Raised whenever an older reader would misread the file."""

_KEPT = 2
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_BLANK = "0" * 64
_PREFIX = b'{"__metadata__":{"format":"bmaml_ppl.checkpoint","sha256":"'
_MOST_DIFFERENCES = 12


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written, or is damaged."""


class _Damaged(ValueError):
    """A file is not a whole checkpoint; the message says why."""


class Saved(NamedTuple):
    """A checkpoint as read.

    Attributes:
        path: Its file.
        step: Meta-steps taken.
        run: Settings of the run it belongs to.
        state: What the loop gave to `Checkpoints.save`, tensors on the CPU.
    """

    path: Path
    step: int
    run: Settings
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in a folder, of which the newest two are kept, and its prior beside them.

    Where several processes learn together, each reads (the folder is shared) and one writes.

    Args:
        folder: Made where it is missing.
        run: What makes the run this one and no other, see `describe_run`; the loop adds its optimiser.
        every: Meta-steps between two checkpoints.
        writes: Whether this process writes.

    Raises:
        OSError: If the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, run: Settings, every: int = 100, writes: bool = True) -> None:
        self.folder, self.run, self.every, self.writes = folder, run, every, writes
        self.prior_path = folder / "prior.safetensors"
        self.refused: dict[Path, str] = {}
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"checkpoint_dir='{folder}' cannot be written to; give another folder")
            for pattern in ("step-*.safetensors", self.prior_path.name):
                clear_partial(folder, pattern)

    def load(self) -> Saved | None:
        """Reads the newest whole checkpoint; None where the folder has none at all.

        Raises:
            ValueError: If no checkpoint is whole, or they belong to another run; the message names each file and
                why, or each setting that differs, what it was and what it is.

        Warns:
            CheckpointWarning: Of each damaged file that was passed over.
        """
        for path in reversed(self._paths()):
            try:
                saved = parse_checkpoint(path)
            except (_Damaged, OSError) as error:
                self.refused[path] = str(error)
                continue
            self._check_run(saved)
            for refused, why in self.refused.items():
                warnings.warn(
                    f"checkpoint '{refused}' is refused: {why}; '{path.name}' is used instead",
                    CheckpointWarning,
                    stacklevel=5,
                )
            return saved
        if self.refused:
            reasons = "; ".join(f"'{path}': {why}" for path, why in self.refused.items())
            raise ValueError(
                f"no checkpoint in '{self.folder}' is whole: {reasons}. Delete them to begin anew, or give another "
                "checkpoint_dir"
            )
        return None

    def save(self, step: int, state: Mapping[str, Any], prior: LearnedPrior) -> None:
        """Writes the prior and then a checkpoint, so that a checkpoint's prior is always there.

        Args:
            step: Meta-steps taken.
            state: Nested dicts, lists and tuples of tensors, numbers, strings and None.
            prior: The current prior.

        Warns:
            CheckpointWarning: If a file could not be written; the run goes on.
        """
        path = self.folder / f"step-{step:08d}.safetensors"
        if self.save_prior(prior):
            try:
                write_atomically(path, dump_checkpoint(step, self.run, state))
                self.refused.pop(path, None)
                self._prune(step)
            except Exception as error:  # whatever it is, the run is worth more
                _warn_unwritten(path, error)

    def save_prior(self, prior: LearnedPrior) -> bool:
        """Writes the prior where this process writes; returns whether all is well, else warns as `save` does."""
        if not self.writes:
            return False
        try:
            prior.save(self.prior_path)
        except Exception as error:  # whatever it is, the run is worth more
            _warn_unwritten(self.prior_path, error)
            return False
        return True

    def _paths(self) -> list[Path]:
        """Checkpoints in the folder, oldest first."""
        found = {path: match for path in self.folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
        return sorted(found, key=lambda path: int(found[path][1]))

    def _check_run(self, saved: Saved) -> None:
        num_steps = self.run["num_steps"]
        # Where no rate depends on the number of steps, a run may be made longer.
        may_grow = not self.run["cosine decay"] and saved.step <= num_steps
        was = {**saved.run, "num_steps": num_steps} if may_grow else saved.run
        lines = compare_settings(was, self.run)
        if self.run["cosine decay"] and was["num_steps"] != num_steps:
            lines.append("(the learning rate falls to zero over num_steps: a longer run differs from its first step)")
        if lines:
            more = f"\n  and {len(lines) - _MOST_DIFFERENCES} more" if len(lines) > _MOST_DIFFERENCES else ""
            shown = "".join(f"\n  {line}" for line in lines[:_MOST_DIFFERENCES])
            raise ValueError(
                f"'{self.folder}' holds checkpoints of another run, the newest after meta-step {saved.step}. What "
                f"differs:{shown}{more}\nWrite it as it was to go on with that run, or give another checkpoint_dir to "
                f"begin a new one; start=load_prior('{self.prior_path}', model) begins it where that run was"
            )

    def _prune(self, step: int) -> None:
        """Removes all but the newest two that can be read; later steps than the one just written cannot."""
        paths = self._paths()
        whole = [p for p in paths if p not in self.refused and int(p.stem.removeprefix("step-")) <= step]
        for path in set(paths) - set(whole[-_KEPT:]):
            path.unlink(missing_ok=True)


def _warn_unwritten(path: Path, error: Exception) -> None:
    warnings.warn(
        f"checkpoint '{path}' could not be written ({type(error).__name__}: {error}); the run goes on, and if it is "
        "stopped it resumes from the last one that could",
        CheckpointWarning,
        stacklevel=6,
    )


def dump_checkpoint(step: int, run: Settings, state: Mapping[str, Any]) -> bytes:
    """A checkpoint as a file's bytes; arguments as those of `Checkpoints` and its `save`.

    Raises:
        TypeError: The state holds something else than tensors, numbers, strings, None, and nested containers of them.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(dict(state), "", tensors)
    text = json.dumps({"version": CHECKPOINT_VERSION, "step": step, "run": run, "state": packed})
    blank = dump_tensors(tensors, {"format": "bmaml_ppl.checkpoint", "sha256": _BLANK, "checkpoint": text})
    assert blank.startswith(_PREFIX, 8)
    return blank.replace(_BLANK.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def parse_checkpoint(path: Path) -> Saved:
    """Reads a checkpoint.

    Raises:
        OSError: It cannot be read.
        ValueError: It is cut short, damaged, of another kind, or of a newer version.
    """
    content = path.read_bytes()
    start = 8 + len(_PREFIX)
    if not content.startswith(_PREFIX, 8):
        raise _Damaged(f"it is no checkpoint, or its beginning is damaged ({len(content)} bytes)")
    digest = hashlib.sha256(content[:start] + _BLANK.encode())
    digest.update(memoryview(content)[start + len(_BLANK) :])
    if content[start : start + len(_BLANK)] != digest.hexdigest().encode():
        raise _Damaged(f"its checksum does not match what it holds, it is cut short or damaged ({len(content)} bytes)")
    size = 8 + int.from_bytes(content[:8], "little")
    found = json.loads(json.loads(content[8:size])["__metadata__"]["checkpoint"])
    if found["version"] > CHECKPOINT_VERSION:
        raise ValueError(
            f"'{path}' has version {found['version']}, this bmaml_ppl reads checkpoints up to {CHECKPOINT_VERSION}: "
            "upgrade it (pip install --upgrade bmaml-ppl), or give another checkpoint_dir"
        )
    state = _unpack(found["state"], safetensors.torch.load(content))
    return Saved(path, found["step"], found["run"], state)


def _pack(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON, its tensors moved to a flat dict under the names of their places."""
    match tree:
        case Tensor():
            name = path
            while name in tensors:
                name += "'"
            tensors[name] = tree
            return {"tensor": name}
        case dict():
            return {"dict": [[k, _pack(v, f"{path}.{k}" if path else str(k), tensors)] for k, v in tree.items()]}
        case list() | tuple():
            kind = "list" if isinstance(tree, list) else "tuple"
            return {kind: [_pack(v, f"{path}.{i}", tensors) for i, v in enumerate(tree)]}
        case None | bool() | int() | float() | str():
            return tree
    raise TypeError(
        f"{path} is {tree!r:.60}, a {type(tree).__name__}; a checkpoint holds tensors, numbers, strings, None, and "
        "dicts, lists and tuples of them. Take another optimizer, or learn without checkpoint_dir"
    )


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "dict":
        return {key: _unpack(value, tensors) for key, value in content}
    items = [_unpack(value, tensors) for value in content]
    return items if kind == "list" else tuple(items)
