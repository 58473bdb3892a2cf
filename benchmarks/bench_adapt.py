"""10,000 new tasks adapted in one call, beside Pyro's SVGD and NUTS one task at a time, and blackjax's NUTS vmapped.

"growth": a quadratic in time and latent noise, 4 latents, 8 observations, by the default `svgd()` (20 particles), by
`laplace()` and by `hmc()` (4 chains of 150 draws after 200 steps of warm-up). "network": 1-40-40-40-1 with two
precisions, 3403 latents, 10 observations, by `svgd(num_particles=10)`. Pyro's SVGD takes as many particles as ours, and
as many steps or the 500 of its documentation; its NUTS, recorded by its `jit_compile`, and blackjax's (window
adaptation) 200 steps of warm-up and 200 draws; of a network NUTS takes a tenth of both, times ten.

Each run is a fresh process, whose peak resident memory above what was there before the call is read from the operating
system. Ours is the first call; what is compiled, blackjax too, is timed at its second. Whatever takes fewer tasks is
extrapolated by the task. Processes of all variants take turns; ratios are medians of ratios within a round (networks
have one round). How far
posteriors are right is measured on the first tasks against `hmc`: by how many of its standard deviations means are off,
in the mean over coordinates and tasks, and the geometric mean of the ratios of standard deviations.

    python -m benchmarks.bench_adapt [--rounds 2] [--quick] [--out benchmarks/results/adapt.json]
"""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.frame import Row, describe, in_fresh_process, make_parser, peak_memory, time_of, write
from benchmarks.paper_job import SEED, SIZES
from benchmarks.peers_jax import blackjax_nuts
from benchmarks.peers_torch import pyro_nuts, pyro_svgd
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.inference import hmc, laplace, svgd
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.models.regression import hierarchical_regression
from bmaml_ppl.posterior import Posterior
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference

NUM_TASKS, NUM_ROWS, NUM_WARMUP, NUM_DRAWS = 10_000, 8, 200, 200
NUM_COMPARED = 20
MEAN, SCALE = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 0.8, 0.4])


def growth(time: Tensor, weight: Tensor | None = None) -> None:
    mean = pyro.param("mean", torch.zeros(3))
    scale = pyro.param("scale", torch.ones(3), constraint=dist.constraints.positive)
    curve(mean, scale, time, weight)


def fixed_growth(time: Tensor, weight: Tensor | None = None) -> None:
    curve(MEAN, SCALE, time, weight)


def curve(mean: Tensor, scale: Tensor, time: Tensor, weight: Tensor | None) -> None:
    coef = pyro.sample("coef", dist.Normal(mean, scale).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    basis = torch.stack([time**0, time, time**2], -1)
    with pyro.plate("data", time.shape[0]):  # a sum, not a product: Pyro's SVGD gives coef leading dimensions
        pyro.sample("obs", dist.Normal((basis * coef).sum(-1), noise), obs=weight)


def growth_tasks(num_tasks: int) -> Tasks:
    generator = torch.Generator().manual_seed(SEED)
    coef = MEAN + SCALE * torch.randn(NUM_TASKS, 3, generator=generator)
    time = 2 * torch.rand(NUM_TASKS, NUM_ROWS, generator=generator) - 1
    noise = 0.2 * torch.randn(time.shape, generator=generator)
    weight = torch.stack([time**0, time, time**2], -1).matmul(coef[..., None])[..., 0] + noise
    return Tasks({"time": time, "weight": weight}, outputs=("weight",))[:num_tasks]


def growth_prior(inference: Inference) -> LearnedPrior:
    """A prior that knows the truth: how it was learned is no matter of this benchmark."""
    prior = meta_learn(growth, growth_tasks(20), num_support=4, inference=inference, num_steps=0, progress=False)
    return replace(prior, params=prior.params | {"mean": MEAN, "scale": SCALE})


def network_tasks(num_tasks: int) -> Tasks:
    return sinusoid(NUM_TASKS, 10, seed=SEED).tasks[:num_tasks]


def network_prior(inference: Inference) -> LearnedPrior:
    model = hierarchical_regression(SIZES)
    return meta_learn(model, network_tasks(10), num_support=5, inference=inference, num_steps=0, progress=False)


def batched_network(x: Tensor, y: Tensor | None = None) -> None:
    """The model of `hierarchical_regression`, for a vector of particles in front, as Pyro's SVGD asks."""
    gamma = pyro.sample("gamma", dist.Gamma(2.0, 0.2))
    lam = pyro.sample("lam", dist.Gamma(2.0, 2.0))
    pairs = list(pairwise(SIZES))
    zeros = torch.zeros(sum((d_in + 1) * d_out for d_in, d_out in pairs))
    weights = pyro.sample("weights", dist.Normal(zeros, lam.rsqrt().unsqueeze(-1)).to_event(1))
    parts = iter(weights.split([size for d_in, d_out in pairs for size in (d_in * d_out, d_out)], -1))
    hidden = x[:, None]
    for layer, (d_in, d_out) in enumerate(pairs):
        matrix = next(parts)
        hidden = hidden @ matrix.reshape(*matrix.shape[:-1], d_out, d_in).mT + next(parts).unsqueeze(-2)
        hidden = hidden.relu() if layer + 1 < len(pairs) else hidden
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(hidden[..., 0].reshape(*gamma.shape[:-1], len(x)), gamma.rsqrt()), obs=y)


def one_by_one(tasks: Tasks) -> list[dict[str, Tensor]]:
    return [{key: value[i] for key, value in tasks.data.items()} for i in range(len(tasks))]


@dataclass(frozen=True)
class Variant:
    """What one process does.

    Attributes:
        tasks: Makes so many tasks.
        num_tasks: How many it takes.
        prepare: The call to time, from the tasks.
        is_peer: Whether it is somebody else's.
        warm: Whether a call goes before the one that is timed.
        scale: How many times as long the whole would take.
    """

    tasks: Callable[[int], Tasks]
    num_tasks: int
    prepare: Callable[[Tasks], Callable[[], Any]]
    is_peer: bool = False
    warm: bool = False
    scale: float = 1.0


def _svgd_in_pyro(num_steps: int) -> Callable[[Tasks], Callable[[], Any]]:
    return lambda tasks: lambda: pyro_svgd(fixed_growth, one_by_one(tasks), svgd().num_particles, num_steps)


def _nuts_in_pyro(tasks: Tasks) -> Callable[[], Any]:
    return lambda: pyro_nuts(fixed_growth, one_by_one(tasks), NUM_WARMUP, NUM_DRAWS)


def _nuts_in_jax(tasks: Tasks) -> Callable[[], Any]:
    return blackjax_nuts(MEAN, SCALE, tasks.data["time"], tasks.data["weight"], NUM_WARMUP, NUM_DRAWS)


def _networks_in_pyro(tasks: Tasks) -> Callable[[], Any]:
    return lambda: pyro_svgd(batched_network, one_by_one(tasks), num_particles=10, num_steps=10)


def _nuts_of_networks_in_pyro(tasks: Tasks) -> Callable[[], Any]:
    return lambda: pyro_nuts(batched_network, one_by_one(tasks), NUM_WARMUP // 10, NUM_DRAWS // 10)


def _growth_by(inference: Inference, num_tasks: int = NUM_TASKS, *, compile: bool = False) -> Variant:
    def prepare(tasks: Tasks) -> Callable[[], Any]:
        prior = growth_prior(inference)
        return lambda: prior.adapt(tasks, compile=compile or "auto")

    return Variant(growth_tasks, num_tasks, prepare, warm=compile)


def _networks_by(inference: Inference, num_tasks: int, *, compile: bool = False) -> Variant:
    def prepare(tasks: Tasks) -> Callable[[], Any]:
        prior = network_prior(inference)
        return lambda: prior.adapt(tasks, compile=compile or "auto")

    return Variant(network_tasks, num_tasks, prepare, warm=compile)


VARIANTS: Mapping[str, Mapping[str, Variant]] = {
    "growth": {
        "svgd": _growth_by(svgd()),
        "svgd, compiled": _growth_by(svgd(), compile=True),
        "laplace": _growth_by(laplace()),
        "hmc": _growth_by(hmc(), 1000),
        "hmc, compiled": _growth_by(hmc(), 1000, compile=True),
        "Pyro SVGD, as many steps": Variant(growth_tasks, 10, _svgd_in_pyro(svgd().num_steps), True, True),
        "Pyro SVGD, 500 steps": Variant(growth_tasks, 3, _svgd_in_pyro(500), True),
        "Pyro NUTS": Variant(growth_tasks, 2, _nuts_in_pyro, True),
        "blackjax NUTS": Variant(growth_tasks, 1000, _nuts_in_jax, True, True),
    },
    "network": {
        "svgd": _networks_by(svgd(num_particles=10, num_steps=10), NUM_TASKS),
        "svgd, compiled": _networks_by(svgd(num_particles=10, num_steps=10), 2000, compile=True),
        "Pyro SVGD, as many steps": Variant(network_tasks, 10, _networks_in_pyro, True, True),
        "Pyro NUTS": Variant(network_tasks, 1, _nuts_of_networks_in_pyro, True, scale=10.0),
    },
}


def measure(job: str, name: str, num_tasks: int) -> Row:
    """Times a variant's call; for a process of its own."""
    variant = VARIANTS[job][name]
    run = variant.prepare(variant.tasks(num_tasks))
    before = time_of(run) if variant.warm else None
    with peak_memory() as peak:
        began = perf_counter()
        result = run()
        seconds = perf_counter() - began
    moments = None if job == "network" else summarise_draws(result)
    return {"seconds": seconds, "first_call_s": before, **peak, "moments": moments}


def summarise_draws(result: Any) -> list[Any]:
    """Means and standard deviations of coefficients and log noise of the first tasks, (T, 2, 4)."""
    if isinstance(result, Posterior):
        sites = result.sites(200)
        z = torch.cat([sites["coef"], sites["noise"].log().unsqueeze(-1)], -1)[:, :NUM_COMPARED].transpose(0, 1)
    elif isinstance(result, list):
        z = torch.stack([torch.cat([d["coef"].reshape(-1, 3), d["noise"].reshape(-1, 1).log()], -1) for d in result])
    else:
        z = torch.as_tensor(result[:NUM_COMPARED].copy())
    moments: list[Any] = torch.stack([z.mean(1), z.std(1)], 1).tolist()
    return moments


def compare(found: list[Any], reference: list[Any]) -> Row:
    """How far posteriors are from the reference's, over the tasks that both have."""
    num = min(len(found), len(reference))
    (mean, sd), (true_mean, true_sd) = (torch.tensor(each[:num]).unbind(1) for each in (found, reference))
    off = ((mean - true_mean).abs() / true_sd).mean().item()
    return {"means_off_by_sds": off, "sd_ratio": (sd / true_sd).log().mean().exp().item(), "tasks_compared": num}


def summarise(job: str, runs: Mapping[str, list[Row]], counts: Mapping[str, int], num_tasks: int) -> list[Row]:
    """A row per variant: medians, and for a peer how many times faster a task each of ours is."""
    rows = []
    for name, each in runs.items():
        seconds = [run["seconds"] * VARIANTS[job][name].scale for run in each]
        row: Row = {"job": job, "variant": name, "tasks": counts[name], "seconds": statistics.median(seconds)}
        row[f"seconds_of_{num_tasks}"] = row["seconds"] * num_tasks / counts[name]
        row["megabytes"] = statistics.median(run["megabytes"] for run in each)
        row["first_call_s"] = each[0]["first_call_s"]
        if VARIANTS[job][name].is_peer:
            for ours in (other for other in runs if not VARIANTS[job][other].is_peer):
                pairs = zip(seconds, (run["seconds"] for run in runs[ours]), strict=True)
                faster = statistics.median(them / us for them, us in pairs) * counts[ours] / counts[name]
                row[f"{ours}_times_faster"] = faster
        if each[0]["moments"] is not None and name != "hmc":
            row |= compare(each[0]["moments"], runs["hmc"][0]["moments"])
        rows.append(row)
        print({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    return rows


def main() -> None:
    parser = make_parser(__doc__, "adapt", rounds=2)
    parser.add_argument("--one", nargs=3, metavar=("JOB", "VARIANT", "TASKS"), help="one run, printed as JSON")
    options = parser.parse_args()
    if options.one:
        job, name, count = options.one
        print(json.dumps(measure(job, name, int(count))))
        return
    num_tasks, rounds = (200, 1) if options.quick else (NUM_TASKS, options.rounds)
    rows = []
    for job, variants in VARIANTS.items():
        runs: dict[str, list[Row]] = {name: [] for name in variants}
        counts = {name: min(each.num_tasks, num_tasks) for name, each in variants.items()}
        for _ in range(1 if job == "network" else rounds):
            for name in variants:
                runs[name].append(in_fresh_process("benchmarks.bench_adapt", "--one", job, name, str(counts[name])))
        rows += summarise(job, runs, counts, num_tasks)
    write(options.out, describe(seed=SEED, rounds=rounds, quick=options.quick), rows)


if __name__ == "__main__":
    main()
