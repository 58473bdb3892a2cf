"""HMC: transitions by hand, what warm-up learns, closed-form posteriors, and chains kept in order."""

from math import log
from typing import Any

import pytest
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.func import grad, vmap

import bmaml_ppl as bp
from bmaml_ppl.adaptation import Adapter, as_task_data
from bmaml_ppl.inference import hmc
from bmaml_ppl.inference.chains import thin
from bmaml_ppl.objectives import Objective, chaser, marginal_nll, query_nll
from tests import toys

F64 = torch.float64
MEAN = torch.tensor([3.0, -1.0, 0.0], dtype=F64)
COVARIANCE = torch.tensor([[4.0, 1.0, 0.0], [1.0, 0.5, 0.001], [0.0, 0.001, 0.0001]], dtype=F64)
PRECISION = torch.linalg.inv(COVARIANCE)


def gaussian(z: Tensor) -> Tensor:
    return -0.5 * (z - MEAN) @ PRECISION @ (z - MEAN)


def run(inference: Any, log_density: Any, start: Tensor, seed: int = 0) -> Any:
    """Final state before collection, and every visit with a leading step dimension."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state, visits = inference.init({"particles": start}), []
        for _ in range(inference.num_steps):
            state = inference.update(state, log_density)
            visits.append(inference.visit(state))
    return state, type(visits[0])(*(torch.stack(kept) for kept in zip(*visits, strict=True)))


def test_one_transition_is_leapfrog_and_metropolis_by_hand() -> None:
    inference = hmc(num_chains=2, num_warmup=0, num_draws=1, num_leapfrog=3)
    start = torch.tensor([[3.1, -0.9, 0.01], [2.0, -1.5, 0.0]], dtype=F64)
    state, visits = run(inference, gaussian, start, seed=4)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        torch.rand(2, dtype=F64)
        momentum, chance = torch.randn(2, 3, dtype=F64), torch.rand(2, dtype=F64)
    step = 0.1
    for i in range(2):
        z, p = start[i], momentum[i]
        before = 0.5 * p @ p - gaussian(z)
        for _ in range(3):
            p = p + 0.5 * step * grad(gaussian)(z)
            z = z + step * p
            p = p + 0.5 * step * grad(gaussian)(z)
        rate = torch.exp(torch.clamp(before - (0.5 * p @ p - gaussian(z)), max=0.0))
        torch.testing.assert_close(visits.acceptance_rate[0, i], rate)
        torch.testing.assert_close(visits.energy[0, i], before)
        torch.testing.assert_close(state.particles[i], z if chance[i] < rate else start[i])
    torch.testing.assert_close(visits.log_density[0], vmap(gaussian)(state.particles))


@pytest.mark.parametrize(("mass_matrix", "scale"), [("dense", torch.linalg.cholesky(COVARIANCE)), ("diagonal", None)])
def test_warmup_learns_the_mass_matrix(mass_matrix: Any, scale: Tensor | None) -> None:
    inference = hmc(num_chains=16, num_warmup=150, num_draws=1, mass_matrix=mass_matrix)
    start = torch.randn(16, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    state, _ = run(inference, gaussian, start)
    found = state.warmup.scale
    if scale is None:
        torch.testing.assert_close(found, COVARIANCE.diagonal().sqrt(), rtol=0.3, atol=0)
    else:
        # In whitened coordinates the estimate is close to I: about 1,000 draws, five sd of their correlation is .16.
        white = torch.linalg.solve_triangular(scale, found, upper=False)
        torch.testing.assert_close(white @ white.T, torch.eye(3, dtype=F64), rtol=0, atol=0.25)


def test_dual_averaging_reaches_its_target() -> None:
    # A funnel-like density bends too much for long steps, so that the target binds.
    def bent(z: Tensor) -> Tensor:
        return -0.5 * z[0].square() / 9 - 0.5 * (z[1:].square() * torch.exp(-z[0])).sum() - z[0]

    inference = hmc(
        num_chains=4, num_warmup=300, num_draws=200, num_leapfrog=1, target_accept=0.7, mass_matrix="identity"
    )
    _, visits = run(inference, bent, torch.zeros(4, 3, dtype=F64))
    assert visits.acceptance_rate[300:].mean().item() == pytest.approx(0.7, abs=0.12)


def test_nothing_adapts_after_warmup() -> None:
    inference = hmc(num_chains=2, num_warmup=60, num_draws=40)
    state, visits = run(inference, gaussian, torch.zeros(2, 3, dtype=F64))
    again = inference.update(state, gaussian)
    for before, after in zip(state.warmup, again.warmup, strict=True):
        assert torch.equal(before, after)
    assert (visits.step_size[60:] <= state.warmup.log_step.exp() + 1e-12).all()


def test_a_gaussian_is_recovered() -> None:
    # Mean and sd over 16 x 300 nearly independent draws: .014 and .01 sd of standard error; five of them.
    inference = hmc(num_chains=16, num_warmup=150, num_draws=300)
    start = 2 * torch.randn(16, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    state, visits = run(inference, gaussian, start)
    chain = inference.collect(state, type(visits)(*(value[150:] for value in visits)))  # type: ignore[misc]
    draws = chain.draws
    sd = COVARIANCE.diagonal().sqrt()
    assert draws.shape == (16, 300, 3)
    torch.testing.assert_close((draws.mean((0, 1)) - MEAN) / sd, torch.zeros(3, dtype=F64), rtol=0, atol=0.07)
    torch.testing.assert_close(draws.flatten(0, 1).std(0) / sd, torch.ones(3, dtype=F64), rtol=0, atol=0.05)
    correlation = torch.corrcoef(draws.flatten(0, 1).T)
    torch.testing.assert_close(correlation, COVARIANCE / sd / sd.unsqueeze(1), rtol=0, atol=0.065)
    assert effective_sample_size(draws, 0, 1).min() > 2400
    assert split_gelman_rubin(draws, 0, 1).max() < 1.01


def test_a_chain_leaves_a_start_of_zero_density() -> None:
    def bounded(z: Tensor) -> Tensor:
        return torch.where((z > -1).all(), -0.5 * z.square().sum(), -torch.inf + z.sum())

    inference = hmc(num_chains=2, num_warmup=0, num_draws=1)
    state, visits = run(inference, bounded, torch.tensor([[-1.001], [0.0]], dtype=F64))
    assert not visits.diverging[0, 1]
    assert state.particles[1].isfinite().all()


def test_divergences_are_reported_and_refused() -> None:
    inference = hmc(num_chains=2, num_warmup=0, num_draws=1, num_leapfrog=2)
    start = torch.tensor([[1e3, 0.0, 0.0]] * 2, dtype=F64)
    state, visits = run(inference, lambda z: -z[0].pow(4), start)
    assert visits.diverging.all()
    assert torch.equal(state.particles, start)


@pytest.fixture(scope="module")
def prior() -> bp.LearnedPrior:
    tasks = toys.level_tasks(20, 5)
    return bp.meta_learn(toys.level, tasks, num_support=2, num_steps=1, compile=False, progress=False)


def test_a_task_does_not_depend_on_the_others(prior: bp.LearnedPrior) -> None:
    tasks = toys.level_tasks(3, 4, seed=1)
    inference = hmc(num_chains=2, num_warmup=20, num_draws=10)
    together, alone = prior.adapt(tasks, inference=inference), prior.adapt(tasks[1:2], inference=inference)
    torch.testing.assert_close(together.state.draws[1], alone.state.draws[0])


def test_tasks_can_have_draws_of_their_own(prior: bp.LearnedPrior) -> None:
    same = as_task_data(toys.level_tasks(2, 4, seed=1))
    twin = same._replace(data={name: value[:1].expand_as(value) for name, value in same.data.items()})
    inference = hmc(num_chains=2, num_warmup=5, num_draws=5, sites=prior.density.sites)
    for randomness, equal in (("same", True), ("different", False)):
        torch.manual_seed(0)
        state = Adapter(prior.density, inference, "prior", randomness=randomness).adapt(prior.params, twin)  # type: ignore[arg-type]
        assert torch.equal(state.draws[0], state.draws[1]) is equal


def test_the_level_model_is_exact(prior: bp.LearnedPrior) -> None:
    # 50 tasks x 4 x 500 draws; errors of a task's mean are .02 sd, the largest of 50 below 4.5 of them.
    tasks = toys.level_tasks(50, 4, seed=2)
    mean, sd, noise = (prior.params[name] for name in ("mean", "sd", "noise"))
    precision = sd**-2 + 4 * noise**-2
    exact = (mean * sd**-2 + tasks.data["y"].sum(1) * noise**-2) / precision
    draws = prior.adapt(tasks, inference=hmc()).sites(2000)["a"]
    assert ((draws.mean(0) - exact) * precision.sqrt()).abs().max() < 0.1
    assert (draws.std(0) * precision.sqrt() - 1).abs().max() < 0.1


def test_draws_are_every_kept_position_chain_by_chain(prior: bp.LearnedPrior) -> None:
    posterior = prior.adapt(toys.level_tasks(2, 4), inference=hmc(num_chains=2, num_warmup=10, num_draws=6))
    every = posterior.draws(12)
    assert torch.equal(every[:, 1], posterior.state.draws[1].flatten(0, 1))
    assert torch.equal(posterior.draws(4)[:, 1], every[::3, 1])
    assert torch.equal(thin(torch.arange(6).reshape(2, 3), 12), torch.arange(6).repeat_interleave(2))
    assert posterior["task 1"].as_guide()(**{k: v[0] for k, v in toys.level_tasks(1, 4).data.items()})["a"].isfinite()


def test_meta_learning_with_hmc_is_stochastic_em(prior: bp.LearnedPrior) -> None:
    tasks = toys.level_tasks(40, 6)
    learned = bp.meta_learn(
        toys.level, tasks, num_support=3, num_steps=60, batch_size=40, progress=False,
        inference=hmc(num_chains=4, num_warmup=20, num_draws=1, num_leapfrog=3),
    )  # fmt: skip
    # noise .5 and sd 1 generated the tasks; the start is 1 and .5.
    assert learned.params["noise"].item() == pytest.approx(0.5, abs=0.1)
    assert learned.params["sd"].log().item() == pytest.approx(log(1.0), abs=0.35)


@pytest.mark.parametrize("objective", [query_nll(), chaser() + marginal_nll()], ids=str)
def test_objectives_that_need_gradients_through_draws_are_refused(objective: Objective) -> None:
    with pytest.raises(ValueError, match=r"write objective=marginal_nll\(\)"):
        bp.meta_learn(
            toys.level, toys.level_tasks(4, 4), num_support=2, num_steps=1, objective=objective, inference=hmc()
        )


def test_a_free_start_has_nothing_to_learn_of_hmc() -> None:
    prior = bp.meta_learn(
        toys.level, toys.level_tasks(6, 6), num_support=3, num_steps=3, compile=False, progress=False,
        inference=hmc(num_chains=2, num_warmup=5, num_draws=2, num_leapfrog=2, init="free"),
    )  # fmt: skip
    assert prior.history.grad_norm[0] > 0
    assert prior.params["mean"] != 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 0}, "num_chains"),
        ({"num_draws": 0}, "num_draws"),
        ({"target_accept": 1.0}, "target_accept=1.0 is a probability"),
        ({"mass_matrix": "round"}, "mass_matrix='round' is not known"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hmc(**settings)


def test_steps_are_refused_where_they_would_change_the_draws(prior: bp.LearnedPrior) -> None:
    with pytest.raises(ValueError, match=r"write inference=hmc\(num_warmup"):
        prior.adapt(toys.level_tasks(1, 3), inference=hmc(), num_steps=10)
