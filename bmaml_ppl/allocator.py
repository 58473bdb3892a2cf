"""The C library's allocator, told to keep what a loop frees for the loop's next step."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["freed_memory_kept"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
_USUAL_MMAP = 2**25
"""The most to which glibc itself raises its threshold, 32 MiB, as blocks of that size are freed."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block glibc's malloc hands nothing back to the system that is freed, and leaves it as it grows itself.

    Else it gives tensors of a megabyte back in every step and takes them anew, page by page, which is a tenth to
    a third of a step's time on a CPU. Elsewhere than with glibc the block is as it is.
    """
    libc = _find_glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL_MMAP)


@cache
def _find_glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
