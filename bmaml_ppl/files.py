"""Files that are whole or not there, and whose bytes depend on what they hold alone."""

import errno
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

__all__ = ["clear_partial", "dump_tensors", "write_atomically"]

_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}


def dump_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file in memory, with the metadata first and in the order given.

    Args:
        tensors: By name, on any device; tensors may share memory.
        metadata: What the file's header says besides.
    """
    stored = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    content = safetensors.torch.save(stored)
    size = 8 + int.from_bytes(content[:8], "little")
    # The library writes metadata in an order that differs from one process to the next.
    text = json.dumps({"__metadata__": dict(metadata), **json.loads(content[8:size])}, separators=(",", ":"))
    header = text.encode() + b" " * (-len(text.encode()) % 8)
    return len(header).to_bytes(8, "little") + header + content[size:]


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that, whenever the process or the machine stops, the old or the new one is there, whole."""
    # Not tempfile: its files are readable by their owner alone, and os.replace would keep that.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last, where the system can open and sync folders."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(number)


def clear_partial(folder: Path, pattern: str) -> None:
    """Removes what killed processes left of files whose names match."""
    for path in folder.glob(f".{pattern}.*.partial"):
        path.unlink(missing_ok=True)
