"""What each process of test_distributed.py runs."""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bmaml_ppl import meta_learn
from bmaml_ppl.distributed import ElsewhereError, World, join_world
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import hmc, laplace, map_estimate, mean_field, platipus, svgd
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.loop import MetaStep
from bmaml_ppl.objectives import Objective, Rollout, chaser, evidence, marginal_nll, query_nll
from bmaml_ppl.outer import MetaGradient, meta_gradient, unconstrain
from bmaml_ppl.runs import fit_prior
from bmaml_ppl.settings import resolve
from bmaml_ppl.types import Inference, Model, Start
from tests.toys import bind, level, level_tasks, line, line_tasks, straight, views_of

Case = tuple[Model, Inference, Start, Any, Callable[..., Any]]

CASES: dict[str, Case] = {
    "svgd prior": (level, svgd(num_particles=4, num_steps=3), "prior", marginal_nll(), level_tasks),
    "svgd free": (line, svgd(num_particles=4, num_steps=3), "free", chaser() + query_nll("mean"), line_tasks),
    "mean_field": (straight, mean_field(num_steps=3), "prior", query_nll("mean"), line_tasks),
    "platipus": (line, platipus(num_steps=2), "free", query_nll("mean"), line_tasks),
    "laplace": (straight, laplace(num_steps=5), "prior", evidence(), line_tasks),
    "implicit": (straight, map_estimate(gradient="implicit", num_steps=20), "prior", marginal_nll(), line_tasks),
    "hmc": (level, hmc(num_warmup=10, num_draws=5), "prior", marginal_nll(), level_tasks),
}
DTYPES = (torch.float32, torch.float64)
NUM_SUPPORT = 3
FIT = {
    "task": "Pig",
    "input": {"time": "Time"},
    "output": {"weight": "Weight"},
    "set": {"num_particles": 3, "num_steps": 2},
    "batch_size": 3,
    "num_steps": 8,
    "checkpoint_every": 2,
    "compile": False,
}


def differentiate(world: World, name: str, dtype: torch.dtype, num_tasks: int) -> MetaGradient:
    """The meta-gradient of a case, over all processes of a world."""
    model, inference, start, objective, make_tasks = CASES[name]
    tasks = make_tasks(num_tasks, 7).to(dtype=dtype)
    adapter = bind(model, tasks, inference, start)
    density = adapter.density.to(dtype=dtype)
    prior = {**density.prior, **adapter.inference.parameters(density.dim)}
    if start == "free":
        with seeded(0, torch.device("cpu")):
            prior["particles"] = torch.randn(adapter.inference.num_particles, density.dim)
    known = LearnedPrior.constraints.fget(adapter)  # type: ignore[attr-defined]
    params = unconstrain({k: v.detach().to(dtype) for k, v in prior.items()}, known)
    gradient = partial(meta_gradient, adapter, objective, known)
    with seeded(1, torch.device("cpu")):
        return world.meta_gradient(gradient, params, views_of(tasks, NUM_SUPPORT))


def learn(*, seed: int = 0, num_steps: int = 6, **more: Any) -> LearnedPrior:
    """A short run of meta-learning."""
    given: dict[str, Any] = {"batch_size": 5, "inference": svgd(num_particles=4, num_steps=3), "compile": False, **more}
    return meta_learn(
        level, level_tasks(8, 7, seed), num_support=3, num_steps=num_steps, seed=seed, progress=False, **given
    )


def describe(prior: LearnedPrior) -> dict[str, Any]:
    """A prior's numbers, exact in JSON, and how its run ended."""
    params = {name: value.tolist() for name, value in prior.params.items()}
    return {"params": params, "loss": prior.history.loss, "stopped": prior.history.stopped}


def tell_gradient(found: MetaGradient) -> dict[str, Any]:
    """A gradient's numbers, exact in JSON."""
    gradients = {name: value.tolist() for name, value in found.gradients.items()}
    return {"gradients": gradients, "loss": found.loss.item(), "counts": [int(found.num_repaired)]}


def ask_to_stop(world: World, number: signal.Signals, info: MetaStep) -> None:
    """A callback by which the last process gets a signal after meta-step 3."""
    if info.step == 3 and world.rank == world.size - 1:
        os.kill(os.getpid(), number)


def stop_by(world: World, number: signal.Signals) -> dict[str, Any]:
    """Where a run ends of which the last process is asked to stop."""
    steps: list[int] = []
    try:
        return describe(learn(callbacks=[partial(ask_to_stop, world, number), lambda info: steps.append(info.step)]))
    except SystemExit as error:
        return {"steps": steps, "exit": error.code}


def break_last_task(world: World) -> dict[str, Any]:
    """A run in which one process alone meets a loss that is not finite."""
    tasks = level_tasks(8, 7)
    tasks.data["y"][0] = 1e18
    inference = svgd(num_particles=4, num_steps=3)
    prior = meta_learn(
        level, tasks, num_support=3, inference=inference, num_steps=30, batch_size=2, compile=False, progress=False
    )
    return describe(prior)


def _fail_last(rollout: Rollout) -> torch.Tensor:
    if os.environ["RANK"] == "1":
        raise ValueError("process 1 cannot")
    return marginal_nll().terms[0][2](rollout)


def refuse(**given: Any) -> str:
    """What is said where processes cannot learn together."""
    try:
        learn(**given)
    except (ValueError, ElsewhereError) as error:
        return str(error)
    return "nothing"


def run_two(world: World, folder: Path) -> dict[str, Any]:
    """All that is tested with two processes."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
    found: dict[str, Any] = {
        f"{name} {dtype}": tell_gradient(differentiate(world, name, dtype, 5)) for name in CASES for dtype in DTYPES
    }
    found["learned"] = describe(learn())
    found["masked"] = describe(learn(batch_size=3, compile="auto", num_steps=20))
    found["interrupted"] = stop_by(world, signal.SIGINT)
    found["terminated"] = stop_by(world, signal.SIGTERM)
    found["broken"] = break_last_task(world)
    found["failed"] = refuse(objective=Objective(((1.0, "fails", _fail_last),)))
    found["refused"] = refuse(seed=world.rank, batch_size=4 - world.rank)
    settings = {**FIT, "model": f"{folder}/model.py:line", "data": f"{folder}/pigs.csv", "out": f"{folder}/whole"}
    found["fit"] = [str(part) for part in fit_prior(resolve(settings), progress=False)]
    return found


def run_three(world: World, folder: Path) -> dict[str, Any]:
    """All that is tested with three processes: parts of unequal size, and of none."""
    found: dict[str, Any] = {
        f"{num_tasks} tasks": tell_gradient(differentiate(world, "svgd prior", torch.float64, num_tasks))
        for num_tasks in (4, 2)
    }
    found["learned"] = describe(learn(batch_size=2))
    return found


def main(folder: Path) -> None:
    """Writes what this process found to found-RANK.json."""
    torch.set_num_threads(1)
    world, _ = join_world()
    found = (run_two if world.size == 2 else run_three)(world, folder)
    (folder / f"found-{world.rank}.json").write_text(json.dumps(found))
