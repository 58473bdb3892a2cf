"""The BMAML meta-gradient beside NumPyro + jax.jit, Pyro eager, and torch.func by hand.

Paper-sized job: network 1-40-40-40-1 with two precisions (D = 3403), T tasks, M = 10 particles, K = 10 support and
10 query points, n follower and s leader steps, scalar-median RBF kernel, chaser loss, second order. All variants get
the same particles and data and must return the same gradient. Their runs are interleaved; medians are reported, and
ratios are medians of ratios within a round.

    python -m benchmarks.bench_meta_gradient [--rounds 15] [--quick] [--out benchmarks/results/meta_gradient.json]
"""

from collections.abc import Callable
from typing import Any

from benchmarks.frame import describe, interleave, make_parser, start, summarise, write
from benchmarks.paper_job import SEED, SIZES, STEP_SIZE, Job
from benchmarks.peers_jax import bmaml

BASE, OURS = "NumPyro model, jax.jit", "bmaml_ppl compiled"


def make_variants(job: Job) -> dict[str, Callable[[], Any]]:
    return {
        BASE: bmaml(SIZES, job.follow, job.lead, STEP_SIZE, job.particles, *job.data),
        "Pyro, torch.func eager": job.by_hand(),
        "Pyro, torch.func compiled": job.by_hand_compiled(),
        "bmaml_ppl eager": job.ours("eager"),
        "bmaml_ppl recorded": job.ours("recorded"),
        OURS: job.ours("compiled"),
    }


def main() -> None:
    options = make_parser(__doc__, "meta_gradient", rounds=15).parse_args()
    jobs = [Job(10, 5, 5), Job(10, 1, 1), Job(100, 1, 1)]
    rounds, jobs = (3, jobs[1:2]) if options.quick else (options.rounds, jobs)
    rows = []
    for job in jobs:
        variants = make_variants(job)
        first = start(variants, BASE)
        times = interleave(variants, rounds, repeats=3 if job.num_tasks == 10 else 1)
        for row in summarise(times, OURS, tasks=job.num_tasks, n=job.follow, s=job.lead):
            rows.append(row | first[row["variant"]])
    write(options.out, describe(seed=SEED, rounds=rounds, quick=options.quick), rows)


if __name__ == "__main__":
    main()
