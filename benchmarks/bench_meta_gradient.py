"""The BMAML meta-gradient beside the same computation written by hand with torch.func on Pyro's traced log-joint.

Paper-sized job: network 1-40-40-40-1 with two precisions (D = 3403), T tasks, M = 10 particles, K = 10 support and
10 query points, n follower and s leader steps, scalar-median RBF kernel, chaser loss, second order. Runs of all
variants are interleaved; medians are reported, and ratios are medians of ratios within a round.

    python benchmarks/bench_meta_gradient.py [--rounds 15] [--device cpu] [--out benchmarks/results/meta_gradient.json]
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import pyro
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from bmaml_ppl.adaptation import Adapter
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.density import from_model
from bmaml_ppl.inference import svgd
from bmaml_ppl.models.regression import hierarchical_regression
from bmaml_ppl.objectives import chaser
from bmaml_ppl.outer import Views, episode_views, meta_gradient
from bmaml_ppl.types import Model

SEED, STEP_SIZE = 0, 1e-3


def hand_written(model: Model, dim: int, particles: Tensor, views: Views, follow: int, lead: int) -> Tensor:
    """The same meta-gradient, as one would write it for this model alone."""

    def log_joint(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        values = {"gamma": z[0].exp(), "lam": z[1].exp(), "weights": z[2:]}
        trace = pyro.poutine.trace(pyro.poutine.condition(model, data=values)).get_trace(x=x, y=y)
        return trace.log_prob_sum() + z[0] + z[1]

    def step(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        scores = vmap(grad(log_joint), (0, None, None))(z, x, y)
        squared = (z[:, None] - z[None]).square().sum(-1)
        rows, columns = torch.triu_indices(len(z), len(z), 1, device=z.device)
        h = (squared[rows, columns].median() / torch.log(torch.tensor(len(z) + 1.0))).detach()
        kernel = torch.exp(-squared / h)
        repulsion = 2 / h * (kernel.sum(1, keepdim=True) * z - kernel @ z)
        return z + STEP_SIZE * (kernel @ scores + repulsion) / len(z)

    def loss(z: Tensor, support: dict[str, Tensor], everything: dict[str, Tensor]) -> Tensor:
        for _ in range(follow):
            z = step(z, support["x"], support["y"])
        leader = z
        for _ in range(lead):
            leader = step(leader, everything["x"], everything["y"])
        return (z - leader.detach()).square().sum()

    with pyro.validation_enabled(False):
        return grad_and_value(lambda p: vmap(loss, (None, 0, 0))(p, views[0].data, views[2].data).mean())(particles)[0]


def prepare(
    num_tasks: int, follow: int, lead: int, device: str
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """The variants to time, and by how much their gradients differ from the hand-written one."""
    tasks = sinusoid(num_tasks, 20, seed=SEED).tasks.to(device)
    views = episode_views(tasks.split_observations(10))
    model = hierarchical_regression((1, 40, 40, 40, 1))
    example = {k: v[0] for k, v in views[0].data.items()}
    density = from_model(model, example)
    torch.manual_seed(SEED)
    particles = density.initial_particles(10, example).to(device)
    inference = svgd(num_particles=10, num_steps=follow, step_size=STEP_SIZE, preconditioner="none", structure="joint")
    eager, recorded = (
        partial(meta_gradient, Adapter(density, inference, "free", recorded=recorded), chaser(lead), {})
        for recorded in (False, True)
    )
    variants: dict[str, Callable[[], Tensor]] = {
        "hand-written torch.func": lambda: hand_written(model, density.dim, particles, views, follow, lead),
        "bmaml_ppl eager": lambda: eager({"particles": particles}, views)[0]["particles"],
        "bmaml_ppl recorded": lambda: recorded({"particles": particles}, views)[0]["particles"],
    }
    reference = variants["hand-written torch.func"]()
    errors = {k: ((f() - reference).norm() / reference.norm()).item() for k, f in variants.items()}
    return variants, errors


def interleave(variants: dict[str, Callable[[], Tensor]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            began = perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(1e3 * (perf_counter() - began))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "meta_gradient.json")
    options = parser.parse_args()
    rows = []
    for num_tasks, follow, lead in ((10, 5, 5), (10, 1, 1)):
        variants, errors = prepare(num_tasks, follow, lead, options.device)
        times = interleave(variants, options.rounds, options.device)
        base = times["hand-written torch.func"]
        for name, each in times.items():
            ratio = statistics.median(a / b for a, b in zip(each, base, strict=True))
            row = {"variant": name, "tasks": num_tasks, "n": follow, "s": lead, "ms": statistics.median(each)}
            rows.append(row | {"ratio": ratio, "relative_error": errors[name]})
            print(
                f"T={num_tasks} n={follow} s={lead}  {name:<26} {row['ms']:8.1f} ms  ratio {ratio:5.2f}  "
                f"gradient differs by {errors[name]:.1e}"
            )
    device = torch.cuda.get_device_name() if options.device != "cpu" else platform.processor() or platform.machine()
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "pyro": pyro.__version__}
    about |= {"python": platform.python_version(), "seed": SEED, "rounds": options.rounds}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
