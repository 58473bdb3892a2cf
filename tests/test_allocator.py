"""Freed memory is kept where the C library can be told to, and nothing else changes."""

import subprocess
import sys

import pytest
import torch

from bmaml_ppl import allocator
from bmaml_ppl.allocator import freed_memory_kept

_COUNT_FAULTS = """
import resource
import torch
from bmaml_ppl.allocator import freed_memory_kept

def count() -> int:
    for _ in range(3):
        torch.ones(100 * 2**20, dtype=torch.uint8)  # more than glibc keeps of its own accord
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(100 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = count()
with freed_memory_kept():
    kept = count()
print(plain, kept, count())
"""


@pytest.mark.skipif(allocator._find_glibc() is None, reason="needs glibc")
def test_memory_is_taken_from_the_system_once() -> None:
    """In a process of its own, whose heap holds nothing that is free."""
    done = subprocess.run([sys.executable, "-c", _COUNT_FAULTS], capture_output=True, text=True, check=True)
    plain, kept, after = map(int, done.stdout.split())
    assert plain >= 50  # pages may be as large as 2 MiB
    assert kept < plain // 20
    assert after >= 50


@pytest.mark.skipif(allocator._find_glibc() is None, reason="needs glibc")
def test_an_inner_block_does_not_end_the_outer() -> None:
    with freed_memory_kept():
        with freed_memory_kept():
            assert allocator._Blocks.count == 2
        assert allocator._Blocks.count == 1
    assert allocator._Blocks.count == 0


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_find_glibc", lambda: None)
    with freed_memory_kept():
        assert torch.ones(3).sum() == 3
