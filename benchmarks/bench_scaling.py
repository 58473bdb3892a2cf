"""How the cost of a meta-gradient grows with tasks, particles, observations, latents and steps.

The paper's job (see `bench_meta_gradient.py`), one quantity varied at a time. "kernel" is the kernel term of one step
alone (distances, bandwidth, drive and repulsion, without gradients of the model) against M. Sizes of a sweep are timed
in interleaved rounds; the exponent of the cost is the slope of a least-squares line through the logarithms of the upper
half of the range, where fixed costs no longer hide it.

    python -m benchmarks.bench_scaling [--rounds 5] [--quick] [--mode recorded] [--out benchmarks/results/scaling.json]
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch

from benchmarks.frame import Row, describe, interleave, make_parser, write
from benchmarks.paper_job import SEED, SIZES, Job
from bmaml_ppl.compile import Mode
from bmaml_ppl.inference.kernels import BANDWIDTHS, KERNELS, stein_direction
from bmaml_ppl.plots.style import BLUE, ORANGE

matplotlib.use("Agg")


class Sweep(NamedTuple):
    """One quantity, and what is timed at each of its values.

    Attributes:
        title: What varies, and what stays.
        label: Of the axis.
        limit: Largest exponent asked for.
        values: In rising order.
        job: What to time; None is the kernel term.
    """

    title: str
    label: str
    limit: float
    values: Sequence[int]
    job: Callable[[int], Job] | None


def _count_latents(width: int) -> int:
    return Job(sizes=(1, width, width, width, 1)).density.dim


SWEEPS: Mapping[str, Sweep] = {
    "T": Sweep("tasks (M = 10, K = 10)", "tasks T", 1, (5, 10, 20, 40, 80, 160), lambda t: Job(t)),
    "M": Sweep("particles (T = 2)", "particles M", 2, (5, 10, 20, 40, 80, 160), lambda m: Job(2, num_particles=m)),
    "kernel": Sweep("kernel term alone (D = 3403)", "particles M", 2, (10, 20, 40, 80, 160, 320), None),
    "N": Sweep(
        "observations (T = 2)", "support points K", 1, (20, 40, 80, 160, 320, 640), lambda n: Job(2, num_support=n)
    ),
    "D": Sweep(
        "latents (T = 2)",
        "latents D",
        1,
        (10, 20, 40, 80, 160, 320),
        lambda width: Job(2, sizes=(1, width, width, width, 1)),
    ),
    "steps": Sweep("steps (n = s, T = 2)", "follower steps n", 1, (1, 2, 4, 8, 16, 32), lambda n: Job(2, n, n)),
}


def kernel_term(num_particles: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(SEED)
    particles, scores = (torch.randn(num_particles, 3403, generator=generator) for _ in range(2))
    options: dict[str, Any] = {"kernel": KERNELS["rbf"], "bandwidth": BANDWIDTHS["median"], "repulsion": 1.0}
    return lambda: stein_direction(particles, scores, blocks=[slice(0, 3403)], **options)


def sweep(name: str, rounds: int, quick: bool, mode: Mode) -> Row:
    """Median milliseconds at each value, and the exponent."""
    what = SWEEPS[name]
    values = what.values[:4] if quick else what.values
    runs = {str(v): kernel_term(v) if what.job is None else what.job(v).ours(mode) for v in values}
    for run in runs.values():
        run()  # records
    times = interleave(runs, rounds, repeats=1 if what.job else 20, warm=what.job is None)
    at = [_count_latents(v) for v in values] if name == "D" else list(values)
    row: Row = {"sweep": name, "values": at, "ms": [statistics.median(times[str(v)]) for v in values]}
    row |= {"exponent": fit(at, row["ms"])[0], "asked": what.limit}
    shown = ", ".join(f"{ms:.1f}" for ms in row["ms"])
    print(f"{name:<7} exponent {row['exponent']:5.2f} (asked: {what.limit})   {at}: {shown} ms", flush=True)
    return row


def fit(values: Sequence[int], ms: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of log ms over the logarithms of the upper half of the values."""
    half = len(values) // 2
    x, y = [log(v) for v in values[half:]], [log(v) for v in ms[half:]]
    line = statistics.linear_regression(x, y)
    return line.slope, line.intercept


def draw(rows: Sequence[Row], about: Row, path: Path) -> None:
    """All sweeps, time against size on logarithmic axes, and the fitted lines."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogFormatter, NullLocator

    figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for row, ax in zip(rows, axes.flat, strict=True):
        what, (slope, intercept) = SWEEPS[row["sweep"]], fit(row["values"], row["ms"])
        upper = row["values"][len(row["values"]) // 2 :]
        ax.loglog(row["values"], row["ms"], "o", color=BLUE, label="measured, median")
        ax.loglog(upper, [exp(intercept + slope * log(v)) for v in upper], color=ORANGE, label="line fitted to them")
        ax.set(title=what.title, xlabel=what.label, ylabel="time (ms)", xticks=row["values"])
        ax.set_ylim(min(row["ms"]) / 1.5, max(row["ms"]) * 2)
        ax.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value / 1000:.3g}k")
        )
        ax.xaxis.set_minor_locator(NullLocator())
        for axis_format in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis_format(LogFormatter(minor_thresholds=(1.5, 0.5)))
        label = f"exponent {slope:.2f}\nasked: at most {what.limit}"
        ax.text(0.04, 0.96, label, transform=ax.transAxes, va="top", color=ORANGE)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    threads = about["torch_threads"]
    figure.suptitle(
        f"Cost of one meta-gradient; {threads} thread{'s' * (threads > 1)}, {about['rounds']} interleaved rounds"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def make_options() -> argparse.Namespace:
    parser = make_parser(__doc__, "scaling", rounds=5)
    parser.add_argument("--mode", choices=("eager", "recorded", "compiled"), default="recorded")
    return parser.parse_args()


def main() -> None:
    options = make_options()
    rounds = 2 if options.quick else options.rounds
    rows = [sweep(name, rounds, options.quick, options.mode) for name in SWEEPS]
    about = describe(seed=SEED, rounds=rounds, quick=options.quick, mode=options.mode, network=SIZES)
    write(options.out, about, rows)
    draw(rows, about, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
