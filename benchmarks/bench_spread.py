"""How much of the posterior's spread SVGD keeps: standard deviations of particles over the posterior's, by coordinate.

(a) kernels: the fixed point of each kernel on a standard normal, with bandwidths by the median rule: one for all
coordinates (RBF, the papers'; IMQ), one for each site of 10 coordinates, one for each coordinate. Steps are divided by
the kernel's mass, which leaves fixed points and reaches them in 300 steps from twice the spread. Above
D = 100 there are fewer M, and kernels of many blocks only where they are cheap.

(b) defaults: `svgd()` as it is and as it was (up to 32 coordinates a kernel per coordinate in whitened coordinates,
above AdaGrad steps of 0.01 with a kernel per site), M particles, on posteriors of known standard deviations:
"normal", standard; "rotated", normal with standard deviations from 0.1 to 1 along random axes; "linear", regression on
10 observations with a standard normal prior and noise of 0.1; "logistic", regression on 2 D observations;
"noise", regression on 2 D with the log of the noise latent. Moments of the last two are those of 40,000 draws of
Hamiltonian Monte Carlo, 200 chains (standard errors of ratios are about 0.01).
Starts: draws from the prior ("prior"; three times too wide for "normal"), and the same times 0.05 ("narrow").
Ratios are also given along 50 directions in which the posterior is narrow, H v with v standard normal: coordinates may
be right and what data say of their sums wrong. Draws are those of the posterior (`sample`), 4,000 of them.

    python benchmarks/bench_spread.py [--quick] [--part ab] [--out benchmarks/results/spread.json]
"""

import argparse
import json
import platform
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from bmaml_ppl.inference import map_estimate, svgd
from bmaml_ppl.inference.curvature import exact_hessian
from bmaml_ppl.inference.kernels import BANDWIDTHS, stein_direction
from bmaml_ppl.inference.kernels import KERNELS as RADIAL
from bmaml_ppl.types import Inference, LogDensity

SEED, DTYPE = 0, torch.float64
DIMS, COUNTS, LARGEST_DENSE = (1, 2, 5, 10, 20, 33, 50, 100, 300, 1000, 3403), (5, 10, 20, 50, 100), 100
KERNEL_STEPS, NUM_STEPS, NUM_OBSERVED, NUM_DIRECTIONS, NUM_DRAWS = 300, (10, 20), 10, 50, 4000
NUM_CHAINS, NUM_WARM, NUM_KEPT = 200, 100, 200
KERNELS = {
    "rbf joint": ("rbf", "joint"),
    "imq joint": ("imq", "joint"),
    "rbf sites of 10": ("rbf", "site"),
    "rbf coordinate": ("rbf", "coordinate"),
}
MEDIAN = BANDWIDTHS["median"]

Row = dict[str, Any]


class Target(NamedTuple):
    log_density: LogDensity
    mean: Tensor
    covariance: Tensor
    prior_sd: float


def _generator(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(mean: Tensor, covariance: Tensor, prior_sd: float) -> Target:
    precision = torch.linalg.inv(covariance)
    return Target(lambda z: -0.5 * (z - mean) @ precision @ (z - mean), mean, covariance, prior_sd)


@cache
def make_target(name: str, dim: int) -> Target:
    generator = _generator()
    zero, eye = torch.zeros(dim, dtype=DTYPE), torch.eye(dim, dtype=DTYPE)
    if name == "normal":
        return Target(lambda z: -0.5 * z @ z, zero, eye, 3.0)
    if name == "rotated":
        axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=DTYPE)).Q
        return _normal(zero, axes * torch.logspace(0, -2, dim, dtype=DTYPE) @ axes.T, 1.0)
    num = NUM_OBSERVED if name == "linear" else max(20, 2 * dim)
    x = torch.randn(num, dim, generator=generator, dtype=DTYPE) * (1 if name == "linear" else 3) / dim**0.5
    mean = x @ torch.randn(dim, generator=generator, dtype=DTYPE)
    noise = torch.randn(num, generator=generator, dtype=DTYPE)
    if name == "linear":
        covariance = torch.linalg.inv(eye + x.T @ x / 0.01)
        return _normal(covariance @ x.T @ (mean + 0.1 * noise) / 0.01, covariance, 1.0)
    density = _noise(x, mean + 0.4 * noise) if name == "noise" else _logistic(x, (noise < mean).to(DTYPE))
    return Target(density, *sample_moments(density, dim), 1.0)


def _logistic(x: Tensor, y: Tensor) -> LogDensity:
    return lambda z: -0.5 * z @ z + (y * (x @ z) - torch.nn.functional.softplus(x @ z)).sum()


def _noise(x: Tensor, y: Tensor) -> LogDensity:
    def log_density(z: Tensor) -> Tensor:
        misfit = (y - x[:, 1:] @ z[1:]).square().sum() * torch.exp(-2 * z[0])
        return -0.5 * z[1:] @ z[1:] - 0.5 * (z[0] + 1) ** 2 - len(y) * z[0] - 0.5 * misfit

    return log_density


def sample_moments(log_density: LogDensity, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance by Hamiltonian Monte Carlo in coordinates whitened at the mode."""
    search, generator = map_estimate(num_steps=60, preconditioner="curvature"), _generator()
    *_, (_, found, _) = run(search, torch.zeros(1, dim, dtype=DTYPE), log_density, (60,))
    mode = found.particles[0]
    root = torch.linalg.inv(torch.linalg.cholesky(exact_hessian(log_density, mode)))
    value, slope = (
        vmap(f) for f in (lambda w: log_density(mode + w @ root), grad(lambda w: log_density(mode + w @ root)))
    )
    w, kept, step = torch.randn(NUM_CHAINS, dim, generator=generator, dtype=DTYPE), [], 0.8 * dim**-0.25
    for i in range(NUM_WARM + NUM_KEPT):
        p = torch.randn(w.shape, generator=generator, dtype=DTYPE)
        start, before = w, value(w) - 0.5 * p.square().sum(1)
        for _ in range(int(torch.randint(2, 7, (), generator=generator))):
            p = p + 0.5 * step * slope(w)
            w = w + step * p
            p = p + 0.5 * step * slope(w)
        change = value(w) - 0.5 * p.square().sum(1) - before
        taken = torch.rand(NUM_CHAINS, generator=generator, dtype=DTYPE).log() < change
        w = torch.where(taken.unsqueeze(1), w, start)
        kept += [w] if i >= NUM_WARM else []
    draws = mode + torch.cat(kept) @ root
    return draws.mean(0), torch.atleast_2d(torch.cov(draws.T))


def ratios(points: Tensor, target: Target) -> Row:
    """Of standard deviations: median, smallest and largest over coordinates, and (D <= 100) over narrow directions."""
    found = {"coordinates": points.std(0) / target.covariance.diagonal().sqrt()}
    if len(target.mean) <= LARGEST_DENSE:
        v = torch.randn(len(target.mean), NUM_DIRECTIONS, generator=_generator(), dtype=DTYPE)
        along = torch.linalg.solve(target.covariance, v)
        found["narrow"] = (points @ along).std(0) / (along * v).sum(0).sqrt()
    return {name: [round(float(x), 3) for x in (r.median(), r.min(), r.max())] for name, r in found.items()}


def start_at(target: Target, num: int, narrow: bool) -> Tensor:
    draws = torch.randn(num, len(target.mean), generator=_generator(1), dtype=DTYPE)
    return draws * target.prior_sd * (0.05 if narrow else 1.0)


def run(inference: Inference, start: Tensor, log_density: LogDensity, stops: tuple[int, ...]) -> Iterator[Any]:
    """States after so many steps, and milliseconds of CPU a step so far."""
    state, began = inference.init({"particles": start}), process_time()
    for step in range(1, max(stops) + 1):
        state = inference.update(state, log_density)
        if step in stops:
            yield step, state, round(1e3 * (process_time() - began) / step, 2)


def compare_kernels(quick: bool) -> list[Row]:
    rows = []
    for dim in DIMS[2::3] if quick else DIMS:
        sites = [slice(i, min(i + 10, dim)) for i in range(0, dim, 10)]
        for num in (20,) if quick else COUNTS if dim <= LARGEST_DENSE else (5, 20, 100):
            spreads = {}
            for name, (kernel, structure) in KERNELS.items():
                if structure != "joint" and num * num * dim > 2 * 10**6:
                    continue
                blocks = {"joint": [slice(0, dim)], "site": sites}.get(structure)
                z = 2 * torch.randn(num, dim, generator=_generator(1))
                for _ in range(KERNEL_STEPS):
                    z = z + 0.2 * stein_direction(
                        z, -z, kernel=RADIAL[kernel], bandwidth=MEDIAN, repulsion=1.0, blocks=blocks, normalise=True
                    )
                spreads[name] = round(float(z.std(0).median()), 3)
            rows.append({"dim": dim, "particles": num, **spreads})
            print(rows[-1], flush=True)
    return rows


def before(num: int, dim: int) -> Inference:
    """The default as it was."""
    if dim > 32:
        return svgd(num_particles=num, preconditioner="adaptive", structure="site")
    return svgd(num_particles=num, preconditioner="curvature", structure="moments" if num > dim + 1 else "coordinate")


def follow(name: str, dim: int, num: int, version: str, narrow: bool) -> Iterator[Row]:
    """What one default has kept of one posterior after each of a few numbers of steps."""
    target = make_target(name, dim)
    inference = svgd(num_particles=num) if version == "after" else before(num, dim)
    start = start_at(target, num, narrow)
    for step, state, ms in run(inference, start, target.log_density, NUM_STEPS):
        row: Row = {"version": version, "target": name, "start": "narrow" if narrow else "prior"}
        row |= dict[str, Any](dim=dim, particles=num, steps=step)
        row |= {"cpu_ms_a_step": ms} if step == NUM_STEPS[0] else {}
        row |= ratios(state.particles, target)
        drawn = ratios(inference.sample(state, NUM_DRAWS, _generator()), target)
        yield row | {"draws": drawn["coordinates"]}


def compare_defaults(quick: bool) -> list[Row]:
    rows = []
    for dim in DIMS[3::3] if quick else DIMS:
        names = ["normal", "rotated", "linear", "logistic", "noise"] if dim <= LARGEST_DENSE else ["normal"]
        for num in (20,) if quick or dim > LARGEST_DENSE else COUNTS:
            versions = ("after", "before") if num == 20 else ("after",)
            for name, version, narrow in product(names, versions, (False, True)):
                if name == "noise" and dim < 5:
                    continue
                rows += (found := list(follow(name, dim, num, version, narrow)))
                said = [" ".join(f"{x:.2f}" for x in row["coordinates"]) for row in found[:2]]
                print(
                    f"{name:<8} D = {dim:<5} M = {num:<4} {version:<7} {found[0]['start']:<7} {' | '.join(said)}",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few dimensions, 20 particles")
    parser.add_argument("--part", choices=["a", "b", "ab"], default="ab")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "spread.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about: dict[str, Any] = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    about |= {"python": platform.python_version(), "seed": SEED, "quick": options.quick}
    result: dict[str, Any] = {"about": about}
    if "a" in options.part:
        result["kernels"] = compare_kernels(options.quick)
    if "b" in options.part:
        result["defaults"] = compare_defaults(options.quick)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        f'"{name}": [\n  ' + ",\n  ".join(map(json.dumps, result[name])) + "\n ]" for name in result if name != "about"
    ]
    options.out.write_text(f'{{"about": {json.dumps(about)},\n ' + ",\n ".join(parts) + "}\n")


if __name__ == "__main__":
    main()
