"""Simulation-based calibration: 1,000 simulated tasks fitted at once, beside Pyro's NUTS one task at a time.

The model is a quadratic regression whose noise changes with x: 5 latents, 20 rows a task. `hmc` and `laplace` run the
whole calibration (simulating, recording, fitting, ranking among 99 draws), and so does `svgd` with its 20 particles;
p-values say whether their posteriors are right, which Laplace's and SVGD's need not be, and a figure beside the results
shows it. Pyro's NUTS fits 20 of such tasks, with and without `jit_compile`; times
of 1,000 are extrapolated by the task. A fit is no better than its draws are many: the effective sample size is that of
the unconstrained coordinate that mixes worst, median over tasks, and is also given a second. Laplace's draws are
independent. On the 20 tasks, `hmc`'s posterior means and standard deviations are held against NUTS's. Runs are
interleaved, 20 / rounds of the NUTS tasks a round; medians over rounds are reported, and ratios are medians of ratios
within a round.

    python benchmarks/bench_sbc.py [--rounds 4] [--simulations 1000] [--out benchmarks/results/sbc.json]
"""

import argparse
import json
import platform
import statistics
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from bmaml_ppl import LearnedPrior, Tasks, meta_learn
from bmaml_ppl.diagnostics.calibration import Calibration
from bmaml_ppl.diagnostics.sbc import simulation_based_calibration
from bmaml_ppl.inference import hmc, laplace, svgd
from bmaml_ppl.plots import plot_sbc
from bmaml_ppl.types import Inference

SEED, NUM_ROWS, NUM_NUTS, NUM_RANKED = 0, 20, 20, 99
HMC = {"num_chains": 4, "num_warmup": 200, "num_draws": 150}
NUTS_WARMUP, NUTS_DRAWS = 200, 200
NAMES = {True: "pyro NUTS, jit_compile", False: "pyro NUTS"}

Row = dict[str, Any]


def curve(x: Tensor, y: Tensor | None = None) -> None:
    coef = pyro.sample("coef", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    trend = pyro.sample("trend", dist.Normal(0.0, 0.5))
    mean = torch.stack([torch.ones_like(x), x, x**2], -1) @ coef
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(mean, noise * torch.exp(trend * x)), obs=y)


def simulate(num_tasks: int) -> Tasks:
    generator = torch.Generator().manual_seed(SEED)
    x = 2 * torch.rand(num_tasks, NUM_ROWS, generator=generator) - 1
    coef, log_noise, trend, white = (torch.randn(num_tasks, size, generator=generator) for size in (3, 1, 1, NUM_ROWS))
    mean = coef[:, :1] + coef[:, 1:2] * x + coef[:, 2:] * x**2
    return Tasks({"x": x, "y": mean + white * torch.exp(0.5 * log_noise - 1 + 0.5 * trend * x)}, outputs=("y",))


def calibrate(prior: LearnedPrior, tasks: Tasks, inference: Inference, num_simulations: int) -> tuple[Row, Calibration]:
    began = perf_counter()
    num_draws = None if inference.name == "svgd" else NUM_RANKED  # its particles count once each
    found = simulation_based_calibration(
        prior, tasks, num_simulations=num_simulations, inference=inference, num_draws=num_draws, seed=SEED
    )
    ms = 1e3 * (perf_counter() - began) / num_simulations
    effective = float(found.num_draws) if found.effective_draws is None else found.effective_draws
    row = {"ms_per_fit": ms, "effective_draws": effective, "passed": found.passed, "p_values": found.p_values()}
    return row | {"verdicts": found.verdicts()}, found


def draw(calibrations: dict[str, Calibration], path: Path) -> None:
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    for ax, (name, found) in zip(figure.subplots(1, len(calibrations)), calibrations.items(), strict=True):
        plot_sbc(found.ranks, found.num_draws, ax, names=found.names, title=f"{name}: {len(found.ranks)} simulations")
    figure.savefig(path, dpi=110)


def run_nuts(tasks: Tasks, jit: bool) -> tuple[Row, Tensor]:
    """Time and effective draws of one fit after another, and the draws, (T, S, 5)."""
    draws, effective, began = [], [], perf_counter()
    for task in tasks:
        kernel = NUTS(curve, jit_compile=jit, ignore_jit_warnings=True)
        sampler = MCMC(kernel, num_samples=NUTS_DRAWS, warmup_steps=NUTS_WARMUP, disable_progbar=True)
        sampler.run(task.data["x"][0], task.data["y"][0])
        draws.append(_unconstrain(sampler.get_samples()))
        effective.append(float(effective_sample_size(draws[-1].unsqueeze(0), chain_dim=0, sample_dim=1).min()))
    row = {"ms_per_fit": 1e3 * (perf_counter() - began) / len(tasks), "effective_draws": statistics.median(effective)}
    return row, torch.stack(draws)


def _unconstrain(sites: dict[str, Tensor]) -> Tensor:
    return torch.cat([sites["coef"], sites["noise"].log().unsqueeze(-1), sites["trend"].unsqueeze(-1)], -1)


def compare(prior: LearnedPrior, tasks: Tasks, reference: Tensor) -> Row:
    """How far HMC's moments are from NUTS's on the same tasks."""
    posterior = prior.adapt(tasks, inference=hmc(**HMC), seed=SEED)  # type: ignore[arg-type]
    ours = _unconstrain(posterior.sites(HMC["num_chains"] * HMC["num_draws"])).transpose(0, 1)
    sd = reference.std(1)
    shift = ((ours.mean(1) - reference.mean(1)) / sd).abs()
    ratio = ours.std(1) / sd
    return {"mean_shift_in_sd": shift.mean().item(), "median_sd_ratio": ratio.median().item()}


def benchmark(rounds: int, num_simulations: int, figure: Path) -> tuple[list[Row], Row]:
    tasks = simulate(NUM_NUTS)
    prior = meta_learn(curve, tasks, num_support=5, inference=laplace(), num_steps=0, progress=False)
    ours: dict[str, Inference] = {"hmc": hmc(**HMC), "laplace": laplace(), "svgd": svgd(init="prior")}  # type: ignore[arg-type]
    calibrations: dict[str, Calibration] = {}
    runs: dict[str, list[Row]] = {}
    draws = []
    for turn in range(rounds):
        for name, inference in ours.items():
            row, calibrations[name] = calibrate(prior, tasks, inference, num_simulations)
            runs.setdefault(name, []).append(row)
        part = tasks[list(range(turn, NUM_NUTS, rounds))]
        for jit, name in NAMES.items():
            row, found = run_nuts(part, jit)
            runs.setdefault(name, []).append(row)
        draws.append((part, found))
    draw(calibrations, figure)
    checks = [compare(prior, part, found) for part, found in draws]
    check = {key: statistics.mean(each[key] for each in checks) for key in checks[0]}
    return [summarise(name, each, runs, num_simulations) for name, each in runs.items()], check


def summarise(name: str, each: list[Row], runs: dict[str, list[Row]], num_simulations: int) -> Row:
    row: Row = {"variant": name, "ms_per_fit": statistics.median(r["ms_per_fit"] for r in each)}
    row["effective_draws"] = statistics.median(r["effective_draws"] for r in each)
    row["effective_draws_per_second"] = statistics.median(1e3 * r["effective_draws"] / r["ms_per_fit"] for r in each)
    row["seconds_of_1000"] = row["ms_per_fit"]
    row["extrapolated"] = "passed" not in each[0] or num_simulations != 1000
    fastest = [min(runs[nuts][turn]["ms_per_fit"] for nuts in NAMES.values()) for turn in range(len(each))]
    row["times_faster_a_fit"] = statistics.median(b / r["ms_per_fit"] for r, b in zip(each, fastest, strict=True))
    rate = [
        max(runs[nuts][turn]["effective_draws"] / runs[nuts][turn]["ms_per_fit"] for nuts in NAMES.values())
        for turn in range(len(each))
    ]
    row["times_faster_an_effective_draw"] = statistics.median(
        r["effective_draws"] / r["ms_per_fit"] / b for r, b in zip(each, rate, strict=True)
    )
    row |= {key: each[0][key] for key in ("passed", "p_values", "verdicts") if key in each[0]}
    print(
        f"{name:<24} {row['ms_per_fit']:9.2f} ms a fit ({row['times_faster_a_fit']:7.1f} x), "
        f"{row['effective_draws']:5.0f} effective draws, {row['effective_draws_per_second']:9.0f} a second "
        f"({row['times_faster_an_effective_draw']:7.1f} x)" + (f", passed: {row['passed']}" if "passed" in row else "")
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sbc.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    pyro.set_rng_seed(SEED)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows, check = benchmark(options.rounds, options.simulations, options.out.with_suffix(".png"))
    about = {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    about |= {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    about |= {"seed": SEED, "rounds": options.rounds, "simulations": options.simulations, "nuts_tasks": NUM_NUTS}
    about |= {"hmc": HMC, "nuts": {"num_warmup": NUTS_WARMUP, "num_draws": NUTS_DRAWS}, "ranked_draws": NUM_RANKED}
    print(f"hmc beside NUTS: {check}")
    options.out.write_text(json.dumps({"about": about, "fits": rows, "hmc_beside_nuts": check}, indent=2) + "\n")


if __name__ == "__main__":
    main()
