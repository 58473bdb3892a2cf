"""Peak memory and time of a meta-gradient through 5 to 100 adaptation steps: checkpointed beside fully unrolled.

The paper's job (see `bench_meta_gradient.py`), s = 1. Memory: each number of steps in a fresh process, whose peak
resident memory above what was there before the call is read from the operating system, at the second call: the first
loads and records all code. Time: both ways in one process, in interleaved rounds; ratios are medians within a round.

    python -m benchmarks.bench_memory [--rounds 5] [--quick] [--out benchmarks/results/memory.json]
"""

import json
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.frame import Row, describe, in_fresh_process, interleave, make_parser, peak_memory, start, write
from benchmarks.paper_job import SEED, Job
from bmaml_ppl.allocator import freed_memory_kept
from bmaml_ppl.memory import Memory, checkpointed, full

STEPS, NUM_TASKS = (5, 10, 20, 50, 100), 10
STEP_SIZE = 1e-5
"""Short: at the paper's, a hundred steps magnify float32's rounding errors to a thousandth of the gradient."""

WAYS: dict[str, Callable[[], Memory]] = {"full": full, "checkpointed": checkpointed}


def measure(way: str, steps: int) -> Row:
    """Peak memory of one way; for a process of its own."""
    run = Job(NUM_TASKS, steps, 1, step_size=STEP_SIZE).ours("recorded", WAYS[way]())
    with freed_memory_kept():
        run()
        with peak_memory() as peak:
            run()
    return peak


def time_both(steps: int, rounds: int) -> Row:
    """Milliseconds of both ways, and how many times longer checkpointing takes."""
    job = Job(NUM_TASKS, steps, 1, step_size=STEP_SIZE)
    variants: dict[str, Callable[[], Any]] = {way: job.ours("recorded", memory()) for way, memory in WAYS.items()}
    apart = start(variants, "full")["checkpointed"]["differs_by"]
    times = interleave(variants, rounds, warm=False)
    ratio = statistics.median(a / b for a, b in zip(times["checkpointed"], times["full"], strict=True))
    medians = {f"{way}_ms": statistics.median(each) for way, each in times.items()}
    return {"steps": steps, **medians, "time_ratio": ratio, "differs_by": apart}


def main() -> None:
    parser = make_parser(__doc__, "memory", rounds=5)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "STEPS"), help="one run, printed as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    rounds, counts = (2, STEPS[:2]) if options.quick else (options.rounds, STEPS)
    rows = []
    for steps in counts:
        row = time_both(steps, rounds)
        for way in WAYS:
            found = in_fresh_process("benchmarks.bench_memory", "--one", way, str(steps))
            row[f"{way}_megabytes"] = found["megabytes"]
        rows.append(row)
        print({key: float(f"{value:.4g}") for key, value in row.items()}, flush=True)
    peaks = [row["checkpointed_megabytes"] for row in rows]
    summary = {"peak_ratio": max(peaks) / peaks[0], "time_ratio": max(row["time_ratio"] for row in rows)}
    print(summary)
    write(options.out, describe(seed=SEED, rounds=rounds, quick=options.quick), rows, summary=summary)


if __name__ == "__main__":
    main()
