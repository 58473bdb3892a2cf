"""The path of adaptation starts where it starts, ends where `adapt` ends, and is the same whatever its length."""

from typing import Any

import pytest
import torch

import bmaml_ppl as bp
from bmaml_ppl.diagnostics.trajectory import trace_adaptation
from bmaml_ppl.inference import laplace, map_estimate, svgd
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.types import Inference
from tests.toys import level_tasks, line_tasks, straight

TASKS = line_tasks(4, 6)
PARTICLES = svgd(num_particles=5, num_steps=4)


def _prior(inference: Inference = PARTICLES) -> LearnedPrior:
    return bp.meta_learn(
        straight,
        TASKS.standardize(),
        num_support=3,
        inference=inference,
        num_steps=1,
        device="cpu",
        progress=False,
    )


@pytest.mark.parametrize("inference", [PARTICLES, map_estimate(num_steps=3), laplace(num_steps=3)])
def test_last_entry_is_what_adapt_returns(inference: Inference) -> None:
    prior = _prior(inference)
    path = trace_adaptation(prior, TASKS)["coef"]
    assert path.shape == (inference.num_steps + 1, 4, inference.num_particles, 2)
    torch.testing.assert_close(path[-1].transpose(0, 1), prior.adapt(TASKS).sites()["coef"], rtol=1e-4, atol=1e-5)


def test_every_entry_is_where_so_many_steps_lead() -> None:
    prior = _prior()
    path = trace_adaptation(prior, TASKS)["coef"]
    for steps in range(5):
        shorter = prior.adapt(TASKS, num_steps=steps).sites()["coef"].transpose(0, 1)
        torch.testing.assert_close(path[steps], shorter, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(path[0], path[-1], atol=1e-2)


def test_one_task_has_no_task_dimension() -> None:
    prior = _prior()
    one: dict[str, Any] = {name: value[0] for name, value in TASKS.data.items()}
    path = trace_adaptation(prior, **one)["coef"]
    assert path.shape == (5, 5, 2)
    torch.testing.assert_close(path, trace_adaptation(prior, TASKS)["coef"][:, 0], rtol=1e-4, atol=1e-5)


def test_seed_chooses_the_start_and_leaves_the_generator_alone() -> None:
    prior = _prior()
    before = torch.get_rng_state()
    starts = [trace_adaptation(prior, TASKS, num_steps=0, seed=seed)["coef"] for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("given", "more", "told"),
    [
        (TASKS, {"num_steps": -1}, "num_steps"),
        (level_tasks(2, 3), {"z": [1.0]}, "not both"),
        (None, {"x": [1.0, 2.0]}, "missing data"),
    ],
)
def test_what_adapt_refuses_is_refused(given: Any, more: dict[str, Any], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        trace_adaptation(_prior(), given, **more)
