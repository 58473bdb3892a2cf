"""The C library's allocator, told to keep what a loop frees for the loop's next step."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

__all__ = ["freed_memory_kept"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
_USUAL_MMAP = 2**25
"""The most to which glibc itself raises its threshold, 32 MiB, as blocks of that size are freed; older versions refuse
more."""


class _Blocks:
    """How many blocks are entered, by all threads."""

    lock, count = Lock(), 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block glibc's malloc hands nothing that is freed back to the system; after it, all.

    Else it gives tensors of a megabyte back in every step and takes them anew, page by page, which is a tenth to
    a third of a step's time on a CPU. Elsewhere than with glibc, and where the environment sets malloc's options, the
    block is as it is.
    """
    libc = _find_glibc()
    if libc is None:
        yield
        return
    _enter(libc)
    try:
        yield
    finally:
        _leave(libc)


def _enter(libc: Any) -> None:
    with _Blocks.lock:
        _Blocks.count += 1
        if _Blocks.count == 1:
            if not libc.mallopt(_MMAP_THRESHOLD, _LARGEST):
                libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
            libc.mallopt(_TRIM_THRESHOLD, _LARGEST)


def _leave(libc: Any) -> None:
    with _Blocks.lock:
        _Blocks.count -= 1
        if _Blocks.count == 0:
            libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL_MMAP)
            libc.malloc_trim(0)


@cache
def _find_glibc() -> Any:
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
