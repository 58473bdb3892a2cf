"""PLATIPUS against a naive loop and the closed form of a linear-Gaussian task."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bmaml_ppl.adaptation import Adapter, TaskData
from bmaml_ppl.inference import ALGORITHMS, platipus
from bmaml_ppl.types import Inference
from tests.toys import bind, finite_differences, level, level_tasks, views_of

F64 = torch.float64
TASKS = level_tasks(3, 6).to(dtype=F64)


def bound_level(
    inference: Inference, first_order: bool = False, recorded: bool = False
) -> tuple[Adapter, dict[str, Tensor]]:
    adapter = bind(level, TASKS, inference, "prior", first_order, recorded)
    params = {**adapter.density.prior, **adapter.inference.parameters(1)}
    return adapter, {name: value.double() for name, value in params.items()}


def adapt(adapter: Adapter, prior: dict[str, Tensor], task: TaskData) -> Any:
    torch.manual_seed(0)
    return adapter.adapt(prior, task)


def naive(prior: dict[str, Tensor], y: Tensor, noise: Tensor, alpha: float, steps: int) -> Tensor:
    """Algorithm 2 for a level: theta ~ N(mu - gamma_p grad L(mu), sigma^2), then gradient steps on L."""

    def loss(a: Tensor) -> Tensor:
        return -torch.distributions.Normal(a, prior["noise"]).log_prob(y).sum()

    def slope(a: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(loss, a)

    theta = prior["mean"] - prior["log_gamma_p"].exp() * slope(prior["mean"]) + prior["sd"] * noise
    for _ in range(steps):
        theta = torch.stack([one - alpha * slope(one) for one in theta])
    return theta


def test_it_is_the_papers_algorithm_2() -> None:
    inference = platipus(num_particles=4, num_steps=3, step_size=0.05, preconditioner="none", rate=0.02)
    adapter, prior = bound_level(inference)
    support = views_of(TASKS, 3)[0]
    state = adapt(adapter, prior, support)
    assert torch.equal(state.noise[0], state.noise[1])
    for index in range(len(TASKS)):
        y = support.data["y"][index]
        expected = naive(prior, y, state.noise[index, :, 0], 0.05, 3)
        torch.testing.assert_close(state.particles[index, :, 0], expected)


def test_draws_start_at_the_shifted_prior() -> None:
    adapter, prior = bound_level(platipus(num_particles=5000, num_steps=0, rate=0.1))
    support = views_of(TASKS, 3)[0]
    state = adapt(adapter, prior, support)
    center = prior["mean"] + 0.1 * (support.data["y"] - prior["mean"]).sum(1) / prior["noise"] ** 2
    torch.testing.assert_close(state.center[:, 0], center)
    torch.testing.assert_close(state.scale[:, 0], prior["sd"].expand(3))
    # 5,000 draws: a mean within 4.5 standard errors but for 2 in 100,000 seeds.
    torch.testing.assert_close(state.particles[..., 0].mean(1), center, atol=4.5 * 0.5 / 5000**0.5, rtol=0)


def test_steps_see_the_likelihood_alone() -> None:
    # A Newton step on the likelihood ends at its maximum, the mean of the support, whatever the prior.
    adapter, prior = bound_level(platipus(num_particles=3, num_steps=1, preconditioner="curvature"))
    support = views_of(TASKS, 3)[0]
    particles = adapt(adapter, prior, support).particles[..., 0]
    torch.testing.assert_close(particles, support.data["y"].mean(1, keepdim=True).expand(3, 3))


@pytest.mark.parametrize(("preconditioner", "recorded"), [("none", False), ("none", True), ("adaptive", False)])
def test_gradients_reach_the_prior_and_the_rate(preconditioner: Any, recorded: bool) -> None:
    inference = platipus(num_particles=3, num_steps=2, step_size=0.05, preconditioner=preconditioner, rate=0.02)
    adapter, prior = bound_level(inference, recorded=recorded)
    support = views_of(TASKS, 3)[0]
    weights = torch.randn(3, 3, 1, dtype=F64)
    names = ["mean", "sd", "noise", "log_gamma_p"]

    def end(values: Tensor) -> Tensor:
        changed = {name: value.reshape(prior[name].shape) for name, value in zip(names, values, strict=True)}
        return (adapt(adapter, prior | changed, support).particles * weights).sum()

    at = torch.stack([prior[name].reshape(()) for name in names])
    slopes = torch.autograd.grad(end(at.requires_grad_()), at)[0]
    torch.testing.assert_close(slopes, finite_differences(end, at.detach()), rtol=1e-5, atol=1e-6)
    assert (slopes.abs() > 1e-4).all()


def test_first_order_keeps_values() -> None:
    ends = []
    for first_order in (False, True):
        adapter, prior = bound_level(platipus(preconditioner="none", step_size=0.05), first_order)
        ends.append(adapt(adapter, prior, views_of(TASKS, 3)[0]).particles)
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "rate=0.0 must be positive"),
        ({"posterior_scale": -1.0}, "posterior_scale=-1.0 must be positive"),
        ({"preconditioner": "gauss_newton"}, 'gauss_newton.*"curvature"'),
        ({"num_steps": -1}, "num_steps=-1"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALGORITHMS["platipus"](**settings)
