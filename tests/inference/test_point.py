"""Gradient ascent against a naive loop, Newton steps against the closed form."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bmaml_ppl.density import from_model
from bmaml_ppl.inference import map_estimate
from bmaml_ppl.inference.derivatives import FirstOrder
from bmaml_ppl.models import hierarchical_regression
from bmaml_ppl.types import Inference, LogDensity

F64 = torch.float64
PRECISION = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 4.0]], dtype=F64)
MODE = torch.tensor([1.0, -2.0, 0.5], dtype=F64)


def quadratic(z: Tensor) -> Tensor:
    return -0.5 * (z - MODE) @ PRECISION @ (z - MODE)


def concave(z: Tensor) -> Tensor:
    return quadratic(z) - torch.logaddexp(z, -z).sum()


def _run(inference: Inference, particles: Tensor, log_density: LogDensity, steps: int) -> Tensor:
    state = inference.init({"particles": particles})
    for _ in range(steps):
        state = inference.update(state, log_density)
    return state.particles


def _naive(start: Tensor, preconditioner: str, step_size: float, steps: int) -> Tensor:
    z, history = start, torch.zeros_like(start)
    for step in range(steps):
        direction = torch.autograd.functional.jacobian(concave, z)
        if preconditioner == "adaptive":
            history = direction**2 if step == 0 else 0.9 * history + 0.1 * direction**2
            direction = direction / (history + 1e-8).sqrt()
        elif preconditioner == "curvature":
            direction = torch.linalg.solve(-torch.autograd.functional.hessian(concave, z), direction)
        z = z + step_size * direction
    return z


@pytest.mark.parametrize("preconditioner", ["none", "adaptive", "curvature"])
def test_steps_are_the_naive_loop(preconditioner: Any) -> None:
    start = torch.randn(4, 3, dtype=F64)
    inference = map_estimate(num_particles=4, step_size=0.1, preconditioner=preconditioner)
    ends = _run(inference, start, concave, 6)
    for begin, end in zip(start, ends, strict=True):
        torch.testing.assert_close(end, _naive(begin, preconditioner, 0.1, 6))


def test_one_step_is_mamls() -> None:
    # Finn, Abbeel and Levine (2017), equation 1, with the loss -log p.
    start = torch.randn(1, 3, dtype=F64)
    inference = map_estimate(step_size=0.1, preconditioner="none", num_steps=1)
    expected = start - 0.1 * (start - MODE) @ PRECISION
    torch.testing.assert_close(_run(inference, start, quadratic, 1), expected)


def test_a_newton_step_solves_a_quadratic() -> None:
    start = 10 * torch.randn(3, 3, dtype=F64)
    end = _run(map_estimate(num_particles=3, preconditioner="curvature"), start, quadratic, 1)
    torch.testing.assert_close(end, MODE.expand(3, 3))
    assert torch.equal(_run(map_estimate(num_particles=3), start, quadratic, 1), end)


@pytest.mark.parametrize("preconditioner", ["none", "adaptive", "curvature"])
def test_first_order_keeps_values_and_passes_the_identity(preconditioner: Any) -> None:
    start = torch.randn(2, 3, dtype=F64)
    inference = map_estimate(num_particles=2, step_size=0.1, preconditioner=preconditioner)
    exact, first = (_run(inference, start, f, 4) for f in (concave, FirstOrder(concave)))
    torch.testing.assert_close(first, exact)
    jacobian = torch.func.jacrev(lambda z: _run(inference, z, FirstOrder(concave), 4))(start)
    torch.testing.assert_close(jacobian.reshape(6, 6), torch.eye(6, dtype=F64))
    second_order = torch.func.jacrev(lambda z: _run(inference, z, concave, 4))(start).reshape(6, 6)
    assert (second_order - torch.eye(6, dtype=F64)).abs().max() > 0.05


@pytest.mark.parametrize("start", [-30.0, -3.0, 0.5, 3.0, 30.0])
def test_newton_steps_climb_where_the_density_is_not_quadratic(start: float) -> None:
    # Bare Newton steps diverge on log cosh from |z| > 1.09.
    def log_cosh(z: Tensor) -> Tensor:
        return -torch.logaddexp(z, -z).sum()

    end = _run(map_estimate(preconditioner="curvature"), torch.tensor([[start]], dtype=F64), log_cosh, 40)
    assert log_cosh(end[0]) >= log_cosh(torch.tensor([start], dtype=F64)) - 1e-9
    if abs(start) <= 3:
        assert end.abs().item() < 1e-6


def test_newton_steps_fit_a_small_network() -> None:
    # Saddles everywhere: undamped steps lost 10^8 nats and became no numbers.
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(5, generator=generator) - 2
    data = {"x": x, "y": torch.sin(x)}
    density = from_model(hierarchical_regression((1, 4, 2, 1), activation=torch.tanh), data)
    start = torch.randn(8, density.dim, generator=generator)
    inference = map_estimate(num_particles=8, preconditioner="curvature")

    def log_density(z: Tensor) -> Tensor:
        return density.log_joint(z, {}, data)

    ends = _run(inference, start, log_density, 40)
    values = torch.func.vmap(log_density)(ends)
    assert torch.isfinite(ends).all()
    assert (values >= torch.func.vmap(log_density)(start)).all()
    assert (torch.func.vmap(torch.func.grad(log_density))(ends).norm(dim=1) < 0.1).sum() >= 6


def test_no_steps_leave_the_start() -> None:
    start = torch.randn(1, 3)
    assert torch.equal(_run(map_estimate(num_steps=0), start, quadratic, 0), start)


def test_bad_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_particles=0"):
        map_estimate(num_particles=0)
    with pytest.raises(ValueError, match="num_steps=-1"):
        map_estimate(num_steps=-1)
