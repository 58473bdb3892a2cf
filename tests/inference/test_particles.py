"""The step rule and draws from particles, by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bmaml_ppl.inference.particles import ParticleState, StepRule, advance, resample, smooth_resample

F64 = torch.float64
SITES: Any = {"a": SimpleNamespace(start=0, stop=1), "b": SimpleNamespace(start=1, stop=4)}


def _state(num: int = 3, dim: int = 4) -> ParticleState:
    generator = torch.Generator().manual_seed(0)
    particles = torch.randn(num, dim, dtype=F64, generator=generator)
    return StepRule(0.1, "none", "none", None).init({"particles": particles})


def _draws(state: ParticleState, num: int) -> torch.Tensor:
    return resample(state, num, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("learned", "shape"), [("scalar", ()), ("site", (2,)), ("parameter", (4,))])
def test_learned_step_sizes_start_at_the_given_one(learned: Any, shape: tuple[int, ...]) -> None:
    parameters = StepRule(0.3, learned, "none", SITES).parameters(4)
    torch.testing.assert_close(parameters["step_size"], torch.full(shape, 0.3))
    assert StepRule(0.3, "none", "none", SITES).parameters(4) == {}


def test_learned_step_sizes_reach_their_own_coordinates() -> None:
    start, direction = _state().particles, torch.ones(3, 4, dtype=F64)
    cases: list[tuple[Any, list[float], list[float]]] = [
        ("site", [0.1, 0.5], [0.1, 0.5, 0.5, 0.5]),
        ("parameter", [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
    ]
    for learned, sizes, expected in cases:
        rule = StepRule(None, learned, "none", SITES)
        state = rule.init({"particles": start, "step_size": torch.tensor(sizes, dtype=F64)})
        moved = advance(rule, state, direction).particles - start
        torch.testing.assert_close(moved, torch.tensor(expected, dtype=F64).expand(3, 4))


def test_auto_preconditions_by_curvature_where_that_is_cheap() -> None:
    rule = StepRule(None, "none", "auto", None)
    assert [rule.kind(dim) for dim in (1, 32, 33, 3403)] == ["curvature", "curvature", "adaptive", "adaptive"]


def test_plain_steps_move_along_the_direction() -> None:
    state, direction = _state(), torch.ones(3, 4, dtype=F64)
    after = advance(StepRule(0.1, "none", "none", None), state, direction)
    torch.testing.assert_close(after.particles, state.particles + 0.1)
    assert after.num_updates == 1


def test_adaptive_steps_are_adagrad_with_decay() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(5, 3, 4, dtype=F64, generator=generator)
    state = _state()
    expected, history = state.particles.clone(), directions[0] ** 2
    for step, direction in enumerate(directions):
        state = advance(StepRule(0.1, "none", "adaptive", None), state, direction)
        history = history if step == 0 else 0.9 * history + 0.1 * direction**2
        expected = expected + 0.1 * direction / (history + 1e-8).sqrt()
        torch.testing.assert_close(state.particles, expected)
    assert state.num_updates == 5


def test_adaptive_steps_stay_smooth_at_a_zero_direction() -> None:
    rule, state = StepRule(0.1, "none", "adaptive", None), _state()
    jacobian = torch.func.jacrev(lambda d: advance(rule, state, d).particles)(torch.zeros(3, 4, dtype=F64))
    assert torch.isfinite(jacobian).all()


def test_every_particle_is_drawn_as_often_as_any_other() -> None:
    state = _state(5)
    drawn = _draws(state, 13)
    counts = torch.stack([(drawn == particle).all(1).sum() for particle in state.particles])
    assert drawn.shape == (13, 4)
    assert sorted(counts.tolist()) == [2, 2, 3, 3, 3]
    assert torch.equal(_draws(state, 13), drawn)


def test_smooth_draws_keep_mean_and_covariance() -> None:
    # 200,000 draws: standard errors are .002 sd for a mean and .003 var for a variance; 1e-2 is 3 to 5 of them.
    state = _state(12, 2)
    drawn = smooth_resample(state, 200_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn.mean(0), state.particles.mean(0), atol=1e-2, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(state.particles.T), atol=1.5e-2, rtol=0)
    assert len(drawn.unique(dim=0)) == 200_000


def test_too_few_particles_to_be_smoothed_are_drawn_as_they_are() -> None:
    state = _state(3, 4)
    assert torch.equal(smooth_resample(state, 6, torch.Generator().manual_seed(1)), _draws(state, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0.1, "none", "newton", None), "preconditioner='newton'"),
        ((0.1, "layer", "none", None), "learn_step_size='layer'"),
        ((0.0, "none", "none", None), "step_size=0.0"),
        ((-1.0, "none", "none", None), "step_size=-1.0"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepRule(*options)
