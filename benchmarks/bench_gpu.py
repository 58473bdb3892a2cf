"""Meta-steps a second on a GPU, and what fraction of its roofline they reach.

The paper's job (see `bench_meta_gradient.py`): T = 10, M = 10, n = s = 1, as a bare meta-gradient and as `meta_learn`
runs it (batch, gradient, clipping, Adam); and T = 1,000 tasks at once. Operations are counted as two a multiplication
and addition of every matrix product and one an element of every other result; bytes as what the matrix products read
and write, which no fusion of kernels saves. Ceilings are measured on the same device: a large float32 matrix product
and a large copy. The roofline's time is the longer of operations / ceiling and bytes / ceiling; the fraction is that
over the measured time.

Without a GPU the same code runs on small sizes of the CPU. Results go to `results/gpu_<device>.json`. No result
of a GPU has been kept yet: this was written, and only dry-run, on machines without one.

    python -m benchmarks.bench_gpu [--device cuda] [--rounds 10] [--quick]
"""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from benchmarks.frame import RESULTS, Row, describe, make_parser, time_of, write
from benchmarks.paper_job import SEED, STEP_SIZE, Job
from bmaml_ppl.compile import Mode
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.inference import svgd
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.objectives import chaser

PAPER_STEPS = 100_000


class _Count(TorchDispatchMode):
    """Counts operations, and bytes that matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        results = [x for x in tree_flatten(found)[0] if isinstance(x, Tensor)]
        if count_product := flop_registry.get(func.overloadpacket):
            given = [x for x in tree_flatten(args)[0] if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in (*given, *results))
            self.operations += count_product(*args, **(kwargs or {}), out_val=found)
        elif not func.is_view:
            self.operations += sum(x.numel() for x in results)
        return found


def count(job: Job) -> Row:
    """Operations and bytes of one meta-gradient."""
    run = job.ours("recorded")
    run()
    with _Count() as counted:
        run()
    return {"operations": counted.operations, "bytes": counted.bytes}


class Timer:
    """Times calls that return before the device is done."""

    def __init__(self, device: str) -> None:
        self.device = device

    def seconds(self, run: Callable[[], Any], calls: int, rounds: int) -> float:
        """Median seconds of one call, of so many in a row."""

        def several() -> None:
            for _ in range(calls):
                run()
            if self.device != "cpu":
                torch.cuda.synchronize()

        several()
        return statistics.median(time_of(several) for _ in range(rounds)) / calls


def measure_ceilings(timer: Timer, quick: bool) -> Row:
    """Operations and bytes a second of a large matrix product and a large copy."""
    size, length = (512, 2**22) if quick else (8192, 2**28)
    a, b = (torch.randn(size, size, device=timer.device) for _ in range(2))
    source = torch.randn(length, device=timer.device)
    target = torch.empty_like(source)
    product = timer.seconds(partial(torch.mm, a, b), 3, 5)
    copy = timer.seconds(partial(target.copy_, source), 3, 5)
    return {"operations_per_second": 2 * size**3 / product, "bytes_per_second": 8 * length / copy}


def measure_gradient(job: Job, mode: Mode, timer: Timer, ceilings: Row, rounds: int) -> Row:
    """Meta-gradients a second of one job, and the fraction of the roofline."""
    seconds = timer.seconds(job.ours(mode), 20 if job.num_tasks <= 10 else 3, rounds)
    counted = count(job)
    bound = max(
        counted["operations"] / ceilings["operations_per_second"], counted["bytes"] / ceilings["bytes_per_second"]
    )
    row = {"job": "meta-gradient", "mode": mode, "tasks": job.num_tasks, "ms": 1e3 * seconds, "per_second": 1 / seconds}
    row |= {"tasks_per_second": job.num_tasks / seconds, **counted, "fraction_of_roofline": bound / seconds}
    return row


def measure_learning(mode: Mode, device: str, num_steps: int) -> Row:
    """Meta-steps a second of `meta_learn`, the first half of the run left out, where it compiles."""
    tasks = sinusoid(1000, 20, seed=SEED).tasks
    inference = svgd(
        num_particles=10, num_steps=1, step_size=STEP_SIZE, preconditioner="none", structure="joint", init="free"
    )
    options: dict[str, Any] = {"inference": inference, "objective": chaser(1), "num_steps": num_steps, "device": device}
    prior = meta_learn(Job().model, tasks, num_support=10, compile=mode == "compiled", progress=False, **options)
    late = prior.history.tasks_per_second[num_steps // 2 :]
    per_second = len(late) / sum(10 / rate for rate in late)
    return {"job": "meta_learn", "mode": mode, "tasks": 10, "per_second": per_second}


def main() -> None:
    parser = make_parser(__doc__, "gpu", rounds=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = "cuda" if options.device.startswith("cuda") else "cpu"
    quick = options.quick or device == "cpu"
    timer, rounds = Timer(device), 2 if quick else options.rounds
    ceilings = measure_ceilings(timer, quick)
    rows = []
    for num_tasks in (10,) if quick else (10, 1000):
        job = replace(Job(), num_tasks=num_tasks, device=device)
        modes: tuple[Mode, ...] = ("recorded",) if quick else ("recorded", "compiled")
        for mode in modes:
            rows.append(measure_gradient(job, mode, timer, ceilings, rounds))
    rows.append(measure_learning("eager" if quick else "compiled", device, 20 if quick else 4000))
    for row in rows:
        row["minutes_of_the_papers_run"] = PAPER_STEPS / row["per_second"] / 60 if row["tasks"] == 10 else None
        print({k: float(f"{v:.4g}") if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()})
    about = describe(seed=SEED, rounds=rounds, quick=quick, device=device)
    about["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    write(_result_path(options.out, device), about, rows, ceilings=ceilings)


def _result_path(out: Path, device: str) -> Path:
    if out != RESULTS / "gpu.json":
        return out
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return RESULTS / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', name)}.json"


if __name__ == "__main__":
    main()
