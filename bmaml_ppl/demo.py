"""The demonstration: growing pigs, predicted from three weighings, by classical and by meta-learned models.

72 pigs were weighed each week (Lauridsen et al. 1999). Most of them train; each of the others is weighed at three
random times, and all its other weights are predicted. `run_demo` compares the methods over several splits of the
pigs, and leaves the learned prior, an ArviZ posterior, figures and the table in a folder.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm.auto import tqdm

from bmaml_ppl.baselines import Gaussian, predict_by_task, predict_mixed, predict_pooled
from bmaml_ppl.datasets.frames import pigs
from bmaml_ppl.evaluation import (
    Forecast,
    Row,
    Split,
    average,
    forecast_gaussian,
    forecast_learned,
    run_jobs,
    score,
    split_tasks,
)
from bmaml_ppl.inference import laplace, map_estimate, svgd
from bmaml_ppl.learned import History, LearnedPrior
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.models import hierarchical_regression, neural_linear
from bmaml_ppl.objectives import chaser, query_nll
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, Model

__all__ = [
    "METHODS",
    "SMOKE",
    "DemoSettings",
    "growth",
    "network",
    "run_demo",
    "split_pigs",
]


@dataclass(frozen=True)
class DemoSettings:
    """What `run_demo` does.

    Attributes:
        seeds: One split of the pigs each; the seed also chooses the weighings that are seen.
        fraction: Of the pigs that train.
        num_support: Weighings seen of each other pig.
        growth_steps: Meta-steps of the growth curve.
        network_steps: Meta-steps of each network.
        workers: Processes side by side; the results do not depend on it, the seconds do.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    fraction: float = 0.7
    num_support: int = 3
    growth_steps: int = 500
    network_steps: int = 200
    workers: int = 2


SMOKE = DemoSettings(seeds=(0,), growth_steps=2, network_steps=1, workers=1)
"""Shows that everything runs, and nothing else."""


def growth(time: Tensor, weight: Tensor | None = None) -> None:
    """One pig's growth: a parabola of its own, whose coefficients vary and covary between pigs."""
    mean = pyro.param("mean", torch.zeros(3))
    scale_tril = pyro.param("scale_tril", 0.5 * torch.eye(3), constraint=dist.constraints.lower_cholesky)
    noise = pyro.param("noise", torch.tensor(0.3), constraint=dist.constraints.positive)
    coef = pyro.sample("coef", dist.MultivariateNormal(mean, scale_tril=scale_tril))
    with pyro.plate("weighings", time.shape[0]):
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * time + coef[2] * time**2, noise), obs=weight)


_perceptron = hierarchical_regression((1, 32, 32, 1))


def network(time: Tensor, weight: Tensor | None = None) -> None:
    """One pig's growth: a network whose 1153 weights and two precisions are the pig's own."""
    _perceptron(time, weight)


_weights = hierarchical_regression((1, 32, 32, 1), center="learned", precisions="learned", activation=torch.tanh)
_basis = neural_linear((1, 16, 8))


def weights(time: Tensor, weight: Tensor | None = None) -> None:
    """One pig's growth: a network whose 1153 weights are the pig's own, with a prior mean and sd of each weight."""
    _weights(time, weight)


def basis(time: Tensor, weight: Tensor | None = None) -> None:
    """One pig's growth: 9 coefficients of its own on features that a network shared by all pigs makes of time."""
    _basis(time, weight)


def split_pigs(tasks: Tasks, seed: int, settings: DemoSettings) -> Split:
    """Training pigs, and the seen and the held-out weighings of all others; all carry the training scaling."""
    return split_tasks(tasks, settings.fraction, settings.num_support, seed)


def _classical(predict: Callable[[Split], Gaussian], split: Split, settings: DemoSettings) -> Forecast:
    return forecast_gaussian(predict(split), split.query, "weight")


def _learned(
    learn: Callable[..., LearnedPrior],
    split: Split,
    settings: DemoSettings,
    linearized: bool = False,
    num_steps: int | None = None,
) -> Forecast:
    prior, scaling = learn(split.train, settings), split.train.scaling
    assert scaling is not None
    return forecast_learned(
        prior, split.support, split.query, "weight", scaling, linearized=linearized, num_steps=num_steps
    )


def _pooled(split: Split) -> Gaussian:
    return predict_pooled(split.train, split.query, "time", "weight")


def _by_task(split: Split) -> Gaussian:
    return predict_by_task(split.train, split.support, split.query, "time", "weight")


def _mixed(split: Split) -> Gaussian:
    return predict_mixed(split.train, split.support, split.query, "time", "weight")


# Chosen on the training pigs of the first split, 30 % of them held out: MAML's RMSE there was 0.64 with adaptive steps,
# 0.12 with one learned step size, 0.10 with one a weight; the mixture query loss of BMAML gave 0.87, the mean one 0.10.
# Raw gradients of a network grow with the noise precision: short steps, one learned for each weight (Meta-SGD).
# A particle's Stein step is about 1/M of its gradient step, since the kernels between particles are small.
_STEPS: dict[str, Any] = {"num_steps": 5, "preconditioner": "none", "learn_step_size": "parameter"}


def _maml(train: Tasks, settings: DemoSettings) -> LearnedPrior:
    inference = map_estimate(step_size=1e-4, **_STEPS)
    return _learn_network(train, settings, inference=inference, objective=query_nll("mean"))


def _emaml(train: Tasks, settings: DemoSettings) -> LearnedPrior:
    inference = map_estimate(num_particles=10, step_size=1e-4, **_STEPS)
    return _learn_network(train, settings, inference=inference, objective=query_nll("mean"))


def _bmaml(train: Tasks, settings: DemoSettings) -> LearnedPrior:
    inference = svgd(num_particles=10, step_size=1e-3, **_STEPS)
    objective = chaser(sites=["weights"]) + query_nll("mean")
    return _learn_network(train, settings, inference=inference, objective=objective)


def _learn_network(train: Tasks, settings: DemoSettings, model: Model = network, **how: Any) -> LearnedPrior:
    steps, shots = settings.network_steps, settings.num_support
    return meta_learn(model, train, num_support=shots, num_steps=steps, device="cpu", progress=False, **how)


def _dual(train: Tasks, settings: DemoSettings) -> LearnedPrior:
    return _learn_network(train, settings, model=weights, inference=laplace(num_steps=10))


def _neural_linear(train: Tasks, settings: DemoSettings) -> LearnedPrior:
    # One Newton step is exact, since the posterior is Gaussian; others polish it in single precision.
    settings = replace(settings, network_steps=settings.growth_steps)
    return _learn_network(train, settings, model=basis, inference=laplace(num_steps=3))


def _growth(train: Tasks, settings: DemoSettings, inference: Inference | None = None) -> LearnedPrior:
    steps, shots = settings.growth_steps, settings.num_support
    return meta_learn(
        growth, train, num_support=shots, inference=inference, num_steps=steps, device="cpu", progress=False
    )


GROWTH = "BMAML (growth curve)"

METHODS: dict[str, Callable[[Split, DemoSettings], Forecast]] = {
    "pooled regression": partial(_classical, _pooled),
    "per-pig least squares": partial(_classical, _by_task),
    "linear mixed model": partial(_classical, _mixed),
    "MAML": partial(_learned, _maml),
    "EMAML": partial(_learned, _emaml),
    "BMAML (hierarchical network)": partial(_learned, _bmaml),
    GROWTH: partial(_learned, _growth),
    "Laplace (growth curve)": partial(_learned, partial(_growth, inference=laplace(num_steps=3))),
    "Laplace (network, dual GGN)": partial(_learned, _dual, linearized=True, num_steps=50),
    "neural linear": partial(_learned, _neural_linear),
}
"""Every row of the table, by name."""


class Result(NamedTuple):
    """One method on one split.

    Attributes:
        seed: Of the split.
        row: Its scores.
        history: Of meta-learning, or None.
    """

    seed: int
    row: Row
    history: History | None


def evaluate(method: str, seed: int, settings: DemoSettings, folder: Path) -> Result:
    """Fits a method on the training pigs of one split and scores it on the held-out weighings of the others.

    The growth curve's prior of the first split is saved in the folder as `growth.safetensors`.
    """
    split = split_pigs(pigs(), seed, settings)
    began = perf_counter()
    forecast = METHODS[method](split, settings)
    seconds = perf_counter() - began
    if method == GROWTH and forecast.prior is not None and seed == settings.seeds[0]:
        forecast.prior.save(folder / "growth.safetensors")
    history = None if forecast.prior is None else forecast.prior.history
    return Result(seed, score(method, forecast, split.query.scaled(), "weight", seconds), history)


def run_demo(folder: str | Path, settings: DemoSettings | None = None, *, progress: bool = True) -> list[Row]:
    """Runs the demonstration and leaves everything in a folder.

    It writes `metrics.json`, `growth.safetensors` (the prior of the first split), `posterior.nc` (of its held-out
    pigs, for ArviZ), and the figures `prior.png`, `pigs.png` and `learning.png`.

    Args:
        folder: Made where it does not exist.
        settings: None takes the defaults.
        progress: Whether to show a progress bar.

    Returns:
        The table: each method's mean over the splits.

    Raises:
        ImportError: If the packages of `pip install "bmaml-ppl[data]"` are missing.
    """
    from bmaml_ppl.demo_report import write_report

    settings, folder = settings or DemoSettings(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Of the slow methods the slowest come first, so that no process waits for the last one alone.
    order = [*list(METHODS)[:3], *reversed(list(METHODS)[3:])]
    jobs = [(method, seed, settings, folder) for method in order for seed in settings.seeds]
    with tqdm(total=len(jobs), disable=not progress, desc="demo", unit="fit") as bar:
        results = []
        for result in run_jobs(evaluate, jobs, settings.workers):
            results.append(result)
            bar.update()
            bar.set_postfix_str(f"{result.row.method}, split {result.seed}: {result.row.seconds:.0f} s")
    results.sort(key=lambda result: (settings.seeds.index(result.seed), list(METHODS).index(result.row.method)))
    rows = [average([r.row for r in results if r.row.method == method]) for method in METHODS]
    per_split = [{"seed": result.seed, **result.row._asdict()} for result in results]
    metrics = {"rows": [row._asdict() for row in rows], "settings": asdict(settings), "splits": per_split}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    history = next(r.history for r in results if r.row.method == GROWTH and r.history is not None)
    write_report(folder, split_pigs(pigs(), settings.seeds[0], settings), settings, history)
    return rows
