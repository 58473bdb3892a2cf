"""What every benchmark shares: interleaved timing, fresh processes and their peak memory, and the result file."""

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch

from bmaml_ppl.allocator import freed_memory_kept

__all__ = [
    "RESULTS",
    "ROOT",
    "Row",
    "describe",
    "in_fresh_process",
    "interleave",
    "make_parser",
    "peak_memory",
    "start",
    "summarise",
    "time_of",
    "write",
]

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("bmaml-ppl", "torch", "pyro-ppl", "jax", "jaxlib", "numpyro", "blackjax", "higher", "torchopt", "arviz")

_TOLERANCE = 1e-4

_SETTLE = 0.02
"""Seconds between two variants: idle threads of one library's pool spin for a while and would slow the other's."""


def make_parser(doc: str | None, name: str, rounds: int) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that all runs")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def describe(**more: Any) -> Row:
    """The machine, versions and thread counts."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    versions["torch"] = torch.__version__
    return {
        "machine": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **more,
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def time_of(run: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    began = perf_counter()
    run()
    return perf_counter() - began


def start(variants: Mapping[str, Callable[[], Any]], reference: str) -> dict[str, Row]:
    """Seconds of each variant's first call, and by how much its result differs from the reference's.

    Raises:
        AssertionError: If it differs by more than 1e-4, relative to the norm: not the same computation.
    """
    found, results = {}, {}
    for name, run in variants.items():
        began = perf_counter()
        results[name] = _tensor(run())
        found[name] = {"first_call_s": perf_counter() - began}
    expected = results[reference]
    for name, result in results.items():
        apart = float((result.reshape(expected.shape) - expected).norm() / expected.norm())
        if how := getattr(variants[name], "how", None):
            found[name]["how"] = how
        found[name]["differs_by"] = apart
        print(f"{name:<28} first call {found[name]['first_call_s']:6.2f} s, differs by {apart:.1e}", flush=True)
        assert apart < _TOLERANCE, f"{name} does not compute what {reference} does: differs by {apart:.1e}"
    return found


def _tensor(value: Any) -> torch.Tensor:
    return value.detach().cpu().double() if isinstance(value, torch.Tensor) else torch.tensor(value.tolist()).double()


def interleave(
    variants: Mapping[str, Callable[[], Any]], rounds: int, repeats: int = 1, warm: bool = True
) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round.

    Each round goes once through all variants, so that a slow minute of the machine slows them all. A variant's time
    in a round is the median of `repeats` calls, after one that is not counted where `warm`. The allocator keeps what
    is freed, for all variants, as it does while `meta_learn` runs.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    with freed_memory_kept():
        for _ in range(rounds):
            for name, run in variants.items():
                sleep(_SETTLE)
                if warm:
                    run()
                times[name].append(1e3 * statistics.median(time_of(run) for _ in range(repeats)))
    return times


def summarise(times: Mapping[str, Sequence[float]], ours: str, **more: Any) -> list[Row]:
    """A row per variant: median, quartiles, and how many times faster `ours` is, by the round."""
    rows = []
    for name, each in times.items():
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
        faster = [a / b for a, b in zip(each, times[ours], strict=True)]
        row = {"variant": name, "ms": statistics.median(each), "ms_quartiles": [low, high]}
        rows.append(more | row | {"ours_times_faster": statistics.median(faster)})
        shown = " ".join(f"{key}={value}" for key, value in more.items())
        print(f"{shown}  {name:<34} {rows[-1]['ms']:10.2f} ms   ours x {rows[-1]['ours_times_faster']:.2f}", flush=True)
    return rows


@contextmanager
def peak_memory() -> Iterator[Row]:
    """Fills in `megabytes`, by how much resident memory rose in the block at its highest, and `megabytes_before`."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's: what earlier calls freed would hide a rise
        ctypes.CDLL(None).malloc_trim(0)
    found: Row = {}
    with suppress(OSError):  # forgets the peak so far, where the system can
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    yield found
    found |= {"megabytes": _resident("VmHWM") - before, "megabytes_before": before}


def _resident(what: str) -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def in_fresh_process(module: str, *arguments: str) -> Row:
    """The JSON object that a benchmark, run with these arguments in a process of its own, prints last."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def write(path: Path, about: Row, rows: Sequence[Row], **more: Any) -> None:
    """Keeps a benchmark's rows, rounded to four digits, with what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_round({"about": about, "rows": rows, **more}), indent=2) + "\n")


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _round(each) for key, each in value.items()}
    return [_round(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
