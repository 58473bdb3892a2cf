"""Mean-field inference against closed forms: Gaussian targets, the model's own prior, its gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.adaptation import Adapter
from bmaml_ppl.inference import ALGORITHMS, mean_field
from bmaml_ppl.inference.derivatives import FirstOrder
from bmaml_ppl.inference.mean_field import MeanFieldState, entropy, log_prob, sample
from bmaml_ppl.types import Inference, LogDensity
from tests.toys import bind, finite_differences, level, level_tasks, line_tasks, straight, views_of

F64 = torch.float64
PRECISION = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 4.0]], dtype=F64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=F64)


def quadratic(z: Tensor) -> Tensor:
    return -0.5 * (z - MEAN) @ PRECISION @ (z - MEAN)


def concave(z: Tensor) -> Tensor:
    return quadratic(z) - torch.logaddexp(z, -z).sum()


def run(inference: Inference, log_density: LogDensity, steps: int, dim: int = 3) -> MeanFieldState:
    learned = {k: v.to(F64) for k, v in inference.parameters(dim).items()}
    state: MeanFieldState = inference.init(
        {**learned, "particles": torch.ones(inference.num_particles, dim, dtype=F64)}
    )
    for _ in range(steps):
        state = inference.update(state, log_density)
    return state


@pytest.mark.parametrize("num_particles", [6, 7, 10])
@pytest.mark.parametrize(
    ("preconditioner", "step_size", "steps"), [("none", 0.2, 200), ("natural", 0.4, 100), ("curvature", None, 2)]
)
def test_a_gaussian_gets_its_mean_and_the_inverse_of_its_precisions_diagonal(
    num_particles: int, preconditioner: Any, step_size: float | None, steps: int
) -> None:
    inference = mean_field(num_particles=num_particles, preconditioner=preconditioner, step_size=step_size)
    state = run(inference, quadratic, steps)
    torch.testing.assert_close(state.loc, MEAN)
    torch.testing.assert_close((-2 * state.log_scale).exp(), PRECISION.diagonal())


def test_adaptive_steps_end_within_one_step_of_it() -> None:
    state = run(mean_field(preconditioner="adaptive", step_size=0.005), quadratic, 2000)
    torch.testing.assert_close(state.loc, MEAN, atol=0.005, rtol=0)
    torch.testing.assert_close(state.log_scale, -0.5 * PRECISION.diagonal().log(), atol=0.005, rtol=0)


def test_steps_climb_the_bound() -> None:
    # Blundell et al. (2015), section 3.2: the gradient of the ELBO on common random numbers, by autograd.
    inference = mean_field(num_particles=4, preconditioner="none", step_size=0.05, noise="common")
    state = run(inference, concave, 0)
    loc, log_scale = (v.clone().requires_grad_() for v in (state.loc, state.log_scale))
    bound = torch.stack([concave(loc + log_scale.exp() * eps) for eps in state.noise]).mean() + log_scale.sum()
    slopes = torch.autograd.grad(bound, (loc, log_scale))
    moved = inference.update(state, concave)
    torch.testing.assert_close(moved.loc, loc.detach() + 0.05 * slopes[0])
    torch.testing.assert_close(moved.log_scale, log_scale.detach() + 0.05 * slopes[1])
    assert moved.noise is state.noise


@pytest.mark.parametrize("num_particles", [2, 5, 6, 40])
def test_noise_has_the_promised_moments(num_particles: int) -> None:
    dim = 3
    noise = run(mean_field(num_particles=num_particles), quadratic, 0, dim).noise
    torch.testing.assert_close(noise.mean(0), torch.zeros(dim, dtype=F64))
    second = noise.mT @ noise / num_particles
    torch.testing.assert_close(second.diagonal(), torch.ones(dim, dtype=F64))
    if num_particles >= 2 * dim:
        torch.testing.assert_close(second, torch.eye(dim, dtype=F64))


def test_a_draw_of_zero_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw_zeros(*shape: int, **options: Any) -> Tensor:
        return torch.zeros(*shape, **options)

    monkeypatch.setattr(torch, "randn", draw_zeros)
    noise = run(mean_field(num_particles=2), quadratic, 0).noise
    torch.testing.assert_close(noise, torch.tensor([[1.0] * 3, [-1.0] * 3], dtype=F64))


def test_noise_comes_anew_where_it_must_be_correlated() -> None:
    for num_particles, is_new in ((6, False), (4, True)):
        inference = mean_field(num_particles=num_particles)
        state = run(inference, quadratic, 0)
        assert torch.equal(inference.update(state, quadratic).noise, state.noise) is not is_new


def test_density_entropy_and_draws_are_those_of_one_gaussian() -> None:
    state = run(mean_field(), concave, 3)
    q = torch.distributions.Normal(state.loc, state.log_scale.exp())
    z = torch.randn(5, 3, dtype=F64)
    torch.testing.assert_close(vmap(lambda one: log_prob(state, one))(z), q.log_prob(z).sum(-1))
    torch.testing.assert_close(entropy(state.log_scale), q.entropy().sum())
    # 10,000 draws: the mean of each coordinate is within 4.5 standard errors but for 2 in 100,000 seeds.
    drawn = sample(state, 10_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close((drawn.mean(0) - state.loc) / q.scale, torch.zeros(3, dtype=F64), atol=0.045, rtol=0)
    torch.testing.assert_close(drawn.std(0) / q.scale, torch.ones(3, dtype=F64), atol=0.035, rtol=0)


@pytest.mark.parametrize("preconditioner", ["none", "adaptive", "curvature"])
def test_first_order_keeps_values(preconditioner: Any) -> None:
    ends = []
    for density in (concave, FirstOrder(concave)):
        torch.manual_seed(0)
        ends.append(run(mean_field(preconditioner=preconditioner, step_size=0.1), density, 4).particles)
    torch.testing.assert_close(*ends)


def bound_level(inference: Inference) -> tuple[Adapter, dict[str, Tensor]]:
    adapter = bind(level, level_tasks(4, 6).to(dtype=F64), inference, "prior")
    return adapter, {name: value.double() for name, value in adapter.density.prior.items()}


def test_no_step_is_the_models_prior() -> None:
    adapter, prior = bound_level(mean_field(num_steps=0))
    state = adapter.adapt(prior, views_of(level_tasks(4, 6).to(dtype=F64), 3)[0])
    torch.testing.assert_close(state.loc, prior["mean"].expand(4, 1))
    torch.testing.assert_close(state.log_scale.exp(), prior["sd"].expand(4, 1))


@pytest.mark.parametrize("kl_weight", [1.0, 0.25])
def test_a_level_gets_its_exact_posterior_its_likelihood_counted_by_weight(kl_weight: float) -> None:
    tasks = level_tasks(4, 6).to(dtype=F64)
    adapter, prior = bound_level(mean_field(num_steps=2, kl_weight=kl_weight))
    support = views_of(tasks, 3)[0]
    state = adapter.adapt(prior, support)
    of_noise = prior["noise"] ** -2 / kl_weight
    precision = prior["sd"] ** -2 + 3 * of_noise
    mean = (prior["mean"] * prior["sd"] ** -2 + support.data["y"].sum(1) * of_noise) / precision
    torch.testing.assert_close(state.loc[:, 0], mean)
    torch.testing.assert_close(state.log_scale[:, 0].exp(), precision.rsqrt().expand(4))


@pytest.mark.parametrize(
    ("preconditioner", "recorded"), [("none", False), ("natural", True), ("adaptive", False), ("curvature", False)]
)
def test_gradients_reach_the_models_prior(preconditioner: Any, recorded: bool) -> None:
    tasks = line_tasks(2, 6).to(dtype=F64)
    inference = mean_field(num_particles=4, num_steps=3, preconditioner=preconditioner, step_size=0.05, noise="common")
    adapter = bind(straight, tasks, inference, "prior", recorded=recorded)
    support = views_of(tasks, 4)[0]
    prior = {name: value.double() for name, value in adapter.density.prior.items()}
    weights = torch.randn(2, 4, 2, dtype=F64)

    def end(values: Tensor) -> Tensor:
        torch.manual_seed(0)
        tril = torch.stack([torch.stack([values[2], values[2] * 0]), values[3:5]])
        state = adapter.adapt({"mean": values[:2], "scale_tril": tril, "noise": values[5]}, support)
        return (state.particles * weights).sum() + (state.log_scale * weights[:, 0]).sum()

    tril = prior["scale_tril"]
    at = torch.cat([prior["mean"] + 0.3, torch.stack([tril[0, 0], tril[1, 0] + 0.4, tril[1, 1]]), prior["noise"][None]])
    slopes = torch.autograd.grad(end(at.requires_grad_()), at)[0]
    torch.testing.assert_close(slopes, finite_differences(end, at.detach()), rtol=1e-5, atol=1e-6)
    assert (slopes.abs() > 1e-4).all()


def test_a_free_start_learns_its_scale() -> None:
    free, fixed = mean_field(init="free", initial_scale=0.3), mean_field(initial_scale=0.3)
    assert set(free.parameters(2)) == {"start_log_scale"}
    assert set(fixed.parameters(2)) == set()
    for inference in (free, fixed):
        state = run(inference, quadratic, 0)
        torch.testing.assert_close(state.log_scale.exp(), torch.full((3,), 0.3, dtype=F64))
        torch.testing.assert_close(state.loc, torch.ones(3, dtype=F64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "none"}, "noise='none'.*\"common\""),
        ({"initial_scale": 0.0}, "initial_scale=0.0 must be positive"),
        ({"kl_weight": 0}, "kl_weight=0 must be positive"),
        ({"preconditioner": "gauss_newton"}, "gauss_newton.*laplace"),
        ({"num_particles": 0}, "num_particles=0"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALGORITHMS["mean_field"](**settings)
