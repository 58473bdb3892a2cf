"""Laplace's method: many small tasks beside Pyro's AutoLaplaceApproximation, and networks in dual and dense form.

(a) 1,000 tasks of 10 latents (logistic regression, 20 rows each), exact Hessian, all at once; Pyro's takes one task
at a time and is timed on 20 of them. "hessian" is the Gaussian at a given mode; "mode and hessian" starts at zero.
Pyro's mode is found by L-BFGS with strong Wolfe line search on Pyro's own ELBO of a Delta guide, which needs far fewer
evaluations than SVI with Adam; ours by 8 damped Newton steps. Both modes are compared. Runs are interleaved;
medians are reported, and ratios are medians of ratios within a round.

(b) Fisher (here equal to Gauss-Newton) posterior of a 1-40-40-40-1 network with two precisions, D = 3403, 10
observations: 100 tasks at once in dual form, and in dense form for as many as are asked for (--dense-tasks), each in a
process of its own whose peak memory is read from the operating system; 100 draws a task are timed apart. Totals of
100 dense tasks are extrapolated: time by the task, memory as one D x D factor a task kept.

    python benchmarks/bench_laplace.py [--rounds 5] [--part ab] [--out benchmarks/results/laplace.json]
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.infer.autoguide.initialization import init_to_value
from pyro.ops.hessian import hessian
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.adaptation import Adapter, TaskData
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.density import from_model
from bmaml_ppl.inference import laplace
from bmaml_ppl.models.regression import hierarchical_regression

SEED, NUM_TASKS, NUM_LATENTS, NUM_ROWS, NUM_PYRO, NEWTON_STEPS = 0, 1000, 10, 20, 20, 8
NUM_NETWORKS, NUM_DRAWS = 100, 100

Row = dict[str, Any]


def classify(x: Tensor, y: Tensor) -> None:
    coef = pyro.sample("coef", dist.Normal(0.0, 1.0).expand([NUM_LATENTS]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ coef), obs=y)


def make_tasks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(NUM_TASKS, NUM_ROWS, NUM_LATENTS, generator=generator)
    logits = (x @ torch.randn(NUM_TASKS, NUM_LATENTS, 1, generator=generator)).squeeze(-1)
    return {"x": x, "y": (torch.rand(logits.shape, generator=generator) < torch.sigmoid(logits)).float()}


class Ours:
    def __init__(self, data: dict[str, Tensor], recorded: bool) -> None:
        self.tasks = TaskData(data, None)
        density = from_model(classify, {key: value[0] for key, value in data.items()})
        inference = laplace(curvature="exact", num_steps=NEWTON_STEPS, sites=density.sites)
        self.adapter = Adapter(density, inference, "free", mode="recorded" if recorded else "eager")
        self.prior = {"particles": torch.zeros(1, NUM_LATENTS)}
        self.state = self.adapt()
        self.measure()

    @torch.no_grad()
    def adapt(self) -> Any:
        return self.adapter.adapt(self.prior, self.tasks)

    @torch.no_grad()
    def measure(self) -> Any:
        return self.adapter.measure(self.state.point, self.prior, self.tasks)


class Pyros:
    def __init__(self, data: dict[str, Tensor]) -> None:
        self.tasks = [{key: value[i] for key, value in data.items()} for i in range(NUM_PYRO)]
        zero = init_to_value(values={"coef": torch.zeros(NUM_LATENTS)})
        self.guides = [AutoLaplaceApproximation(classify, init_loc_fn=zero) for _ in self.tasks]
        for guide, task in zip(self.guides, self.tasks, strict=True):
            guide(**task)
        self.adapt()

    def adapt(self) -> list[Any]:
        for guide, task in zip(self.guides, self.tasks, strict=True):
            guide.loc.data.zero_()
            find_mode(guide, task)
        return self.measure()

    def measure(self) -> list[Any]:
        return [guide.laplace_approximation(**task) for guide, task in zip(self.guides, self.tasks, strict=True)]

    def differentiate(self) -> list[Tensor]:
        """The Hessian and its factor alone, without the new guide that Pyro sets up around them."""
        factors = []
        for guide, task in zip(self.guides, self.tasks, strict=True):
            loss = Trace_ELBO().differentiable_loss(classify, guide, **task)
            factors.append(torch.linalg.cholesky(hessian(loss, guide.loc)))
        return factors


def find_mode(guide: Any, task: dict[str, Tensor]) -> None:
    search = torch.optim.LBFGS(guide.parameters(), max_iter=60, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value: Tensor = Trace_ELBO().differentiable_loss(classify, guide, **task)
        value.backward()
        return value

    search.step(loss)


def time_of(run: Callable[[], Any]) -> float:
    began = perf_counter()
    run()
    return perf_counter() - began


def small_tasks(rounds: int) -> list[Row]:
    data = make_tasks()
    eager, recorded, theirs = Ours(data, False), Ours(data, True), Pyros(data)
    apart = max(
        (guide.loc.detach() - eager.state.particles[i, 0]).abs().max().item() for i, guide in enumerate(theirs.guides)
    )
    jobs: dict[str, tuple[int, dict[str, Callable[[], Any]]]] = {
        "hessian": (NUM_TASKS, {"bmaml_ppl eager": eager.measure, "bmaml_ppl recorded": recorded.measure}),
        "mode and hessian": (NUM_TASKS, {"bmaml_ppl eager": eager.adapt, "bmaml_ppl recorded": recorded.adapt}),
    }
    pyros: dict[str, dict[str, Callable[[], Any]]] = {
        "hessian": {"AutoLaplaceApproximation": theirs.measure, "pyro.ops.hessian alone": theirs.differentiate},
        "mode and hessian": {"AutoLaplaceApproximation": theirs.adapt},
    }
    rows = []
    for job, (num, variants) in jobs.items():
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, run in variants.items():
                times.setdefault(name, []).append(1e3 * time_of(run) / num)
            for name, run in pyros[job].items():
                times.setdefault(name, []).append(1e3 * time_of(run) / NUM_PYRO)
        base = times["AutoLaplaceApproximation"]
        for name, each in times.items():
            ratio = statistics.median(b / a for a, b in zip(each, base, strict=True))
            rows.append({"job": job, "variant": name, "ms_per_task": statistics.median(each), "times_faster": ratio})
            rows[-1]["modes_differ_by"] = apart
            print(f"{job:<17} {name:<26} {rows[-1]['ms_per_task']:9.4f} ms a task, {ratio:7.1f} times faster")
    return rows


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def network(form: str, num_tasks: int) -> Row:
    """Time and peak memory of one form; for a process of its own."""
    tasks = sinusoid(NUM_NETWORKS, 10, seed=SEED).tasks[:num_tasks]
    example = {key: value[0] for key, value in tasks.data.items()}
    density = from_model(hierarchical_regression((1, 40, 40, 40, 1)), example)
    torch.manual_seed(SEED)
    prior = {**density.prior, "particles": density.initial_particles(1, example)}
    inference = laplace(curvature="fisher", form=form, sites=density.sites)  # type: ignore[arg-type]
    adapter, batch = Adapter(density, inference, "free"), TaskData(tasks.data, None)
    before, began, busy = peak_megabytes(), perf_counter(), process_time()
    state = adapter.measure(adapter.begin(prior, batch), prior, batch)
    seconds, busy, after, began = perf_counter() - began, process_time() - busy, peak_megabytes(), perf_counter()
    draws = vmap(lambda one: inference.sample(one, NUM_DRAWS, None), randomness="different")(state)
    row = {"form": form, "tasks": num_tasks, "dim": density.dim, "seconds": seconds, "cpu_seconds": busy}
    row |= {"peak_mb": after - before, "draw_seconds": perf_counter() - began, "draw_sd": draws.std(1).mean().item()}
    kept = [leaf for leaf in state.precision if isinstance(leaf, Tensor)]
    kept_mb = sum(leaf.numel() * leaf.element_size() for leaf in kept) / 2**20
    return row | {"kept_mb": kept_mb, "log_evidence_of_first": state.log_evidence[0, 0].item()}


def networks(dense_tasks: int) -> list[Row]:
    rows = []
    for form, num in (("dual", NUM_NETWORKS), ("dense", dense_tasks)):
        command = [sys.executable, __file__, "--form", form, "--tasks", str(num)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row["cpu_seconds_of_100"], row["kept_mb_of_100"] = (100 * row[k] / num for k in ("cpu_seconds", "kept_mb"))
        row["extrapolated"] = num != NUM_NETWORKS
        rows.append(row)
        print(
            f"{form:<6} {num:>3} tasks, D = {row['dim']}: {row['seconds']:.2f} s ({row['cpu_seconds']:.2f} s CPU), "
            f"peak {row['peak_mb']:.0f} MB; of 100: {row['cpu_seconds_of_100']:.1f} s CPU, "
            f"{row['kept_mb_of_100']:.0f} MB kept"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["a", "b", "ab"], default="ab")
    parser.add_argument("--dense-tasks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--form", choices=["dual", "dense"], help=argparse.SUPPRESS)
    parser.add_argument("--tasks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "laplace.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.settings.set(module_local_params=True)  # else guides of one class share their parameters by name
    if options.form:
        print(json.dumps(network(options.form, options.tasks)))
        return
    about = {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    about |= {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    about |= {"seed": SEED, "rounds": options.rounds}
    result: dict[str, Any] = {"about": about}
    if "a" in options.part:
        result["small_tasks"] = small_tasks(options.rounds)
    if "b" in options.part:
        result["networks"] = networks(options.dense_tasks)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
