"""Objectives against naive loops and against the settings of the literature."""

import pytest
import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_map

from bmaml_ppl.adaptation import TaskData, one_task
from bmaml_ppl.inference import laplace, map_estimate, svgd
from bmaml_ppl.objectives import Objective, Rollout, chaser, evidence, marginal_nll, query_nll
from bmaml_ppl.types import Inference, Tensors
from tests.toys import bind, level, level_tasks, line, line_tasks, views_of

PLAIN = map_estimate(num_particles=3, num_steps=2, step_size=0.05, preconditioner="none", init="free")
STEIN = svgd(num_particles=3, num_steps=2, step_size=0.05, preconditioner="none", init="free")


def start_line(inference: Inference, first_order: bool = False) -> Rollout:
    views = views_of(line_tasks(1, 8), 3)
    adapter = bind(line, line_tasks(1, 8), inference, "free", first_order)
    particles = torch.randn(inference.num_particles, 2, generator=torch.Generator().manual_seed(1))
    return Rollout(adapter, {"particles": particles}, *views)


def normal_log_prob(y: Tensor, mean: Tensor, sd: float) -> Tensor:
    return torch.distributions.Normal(mean, sd).log_prob(y)


def naive_log_likelihood(z: Tensor, task: TaskData) -> Tensor:
    x, y = task.data["x"][0], task.data["y"][0]
    return torch.stack([normal_log_prob(y[i], z[0] + z[1] * x[i], 0.5) for i in range(len(x))]).sum()


def test_query_nll_is_the_mixture_of_particles() -> None:
    rollout = start_line(STEIN)
    likelihoods = [naive_log_likelihood(z, rollout.query).exp() for z in rollout.follower.particles[0]]
    torch.testing.assert_close(query_nll()(rollout)[0], -torch.stack(likelihoods).mean().log())


def test_query_nll_mean_scores_each_particle_by_itself() -> None:
    rollout = start_line(STEIN)
    each = [-naive_log_likelihood(z, rollout.query) for z in rollout.follower.particles[0]]
    torch.testing.assert_close(query_nll("mean")(rollout)[0], torch.stack(each).mean())


def test_one_particle_makes_mixture_and_mean_the_same() -> None:
    rollout = start_line(map_estimate(num_particles=1, num_steps=2, preconditioner="none", init="free"))
    torch.testing.assert_close(query_nll("mixture")(rollout), query_nll("mean")(rollout))


def test_chaser_leads_on_from_the_followers_end_with_all_data() -> None:
    rollout = start_line(STEIN)
    state = tree_map(lambda value: value[0], rollout.follower)
    for _ in range(2):
        density = rollout.adapter.log_density({}, one_task(rollout.everything))
        state = rollout.adapter.inference.update(state, density)
    distance = (rollout.follower.particles[0] - state.particles).square().sum()
    torch.testing.assert_close(chaser(2)(rollout)[0], distance)


def test_chaser_leaves_sites_out() -> None:
    rollout = start_line(STEIN)
    torch.testing.assert_close(chaser(1, sites=["coef"])(rollout), chaser(1)(rollout))
    with pytest.raises(ValueError, match=r"names \['gamma'\].*\['coef'\]"):
        chaser(1, sites=["gamma"])(rollout)


def test_chaser_stops_the_gradient_at_the_leader() -> None:
    rollout = start_line(STEIN)
    leader = rollout.adapter.run(rollout.follower, {}, rollout.everything, 2).particles

    def frozen(particles: Tensor) -> Tensor:
        return (rollout.adapter.adapt({"particles": particles}, rollout.support).particles - leader).square().sum()

    def loss(particles: Tensor) -> Tensor:
        views = (rollout.support, rollout.query, rollout.everything)
        return chaser(2)(Rollout(rollout.adapter, {"particles": particles}, *views)).sum()

    at = rollout.prior["particles"]
    torch.testing.assert_close(grad(loss)(at), grad(frozen)(at))


def test_objectives_add_and_scale() -> None:
    rollout = start_line(STEIN)
    both = 0.5 * chaser(2) + query_nll()
    assert isinstance(both, Objective)
    torch.testing.assert_close(both(rollout), 0.5 * chaser(2)(rollout) + query_nll()(rollout))
    assert str(both) == "0.5 chaser(2) + query_nll(mixture)"


def test_objectives_sum_and_multiply_from_both_sides() -> None:
    rollout = start_line(STEIN)
    total = sum([query_nll(), chaser(1)])
    assert isinstance(total, Objective)
    torch.testing.assert_close(total(rollout), (query_nll() + chaser(1))(rollout))
    torch.testing.assert_close((query_nll() * 2)(rollout), (2 * query_nll())(rollout))


@pytest.mark.parametrize("steps", [0, -1])
def test_a_chaser_needs_a_leader(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_leader_steps={steps}.*at least 1"):
        chaser(steps)


@pytest.mark.parametrize("sites", ["coef", []])
def test_a_chasers_sites_are_a_list(sites: object) -> None:
    with pytest.raises(ValueError, match="list of latent sites"):
        chaser(1, sites=sites)  # type: ignore[arg-type]


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"kind='median'.*\"mixture\" or \"mean\""):
        query_nll("median")  # type: ignore[arg-type]


def gradient_of(objective: Objective, rollout: Rollout) -> Tensor:
    def loss(prior: Tensors) -> Tensor:
        return objective(Rollout(rollout.adapter, prior, rollout.support, rollout.query, rollout.everything)).sum()

    return grad(loss)(dict(rollout.prior))["particles"]


def test_no_steps_are_multi_task_pretraining() -> None:
    rollout = start_line(map_estimate(num_particles=1, num_steps=0, init="free"))
    direct = grad(lambda z: -naive_log_likelihood(z, rollout.query))(rollout.prior["particles"][0])
    torch.testing.assert_close(gradient_of(query_nll(), rollout)[0], direct)


def test_first_order_maml_is_the_gradient_at_the_adapted_point() -> None:
    rollout = start_line(
        map_estimate(num_particles=1, num_steps=3, step_size=0.02, preconditioner="none", init="free"), first_order=True
    )
    adapted = rollout.follower.particles[0, 0]
    at_adapted = grad(lambda z: -naive_log_likelihood(z, rollout.query))(adapted)
    torch.testing.assert_close(gradient_of(query_nll(), rollout)[0], at_adapted)


def test_second_order_maml_is_the_closed_form_on_a_quadratic() -> None:
    step, steps = 0.02, 3
    rollout = start_line(
        map_estimate(num_particles=1, num_steps=steps, step_size=step, preconditioner="none", init="free")
    )
    x = rollout.support.data["x"][0]
    design = torch.stack([torch.ones_like(x), x], -1)
    precision = torch.eye(2) + design.T @ design / 0.25
    jacobian = torch.linalg.matrix_power(torch.eye(2) - step * precision, steps)
    at_adapted = grad(lambda z: -naive_log_likelihood(z, rollout.query))(rollout.follower.particles[0, 0])
    torch.testing.assert_close(gradient_of(query_nll(), rollout)[0], jacobian @ at_adapted)


def test_emaml_particles_do_not_interact() -> None:
    together = start_line(PLAIN)
    gradient = gradient_of(query_nll("mean"), together)
    for i in range(3):
        one = start_line(map_estimate(num_steps=2, step_size=0.05, preconditioner="none", init="free"))
        alone = Rollout(
            one.adapter, {"particles": together.prior["particles"][i : i + 1]}, one.support, one.query, one.everything
        )
        torch.testing.assert_close(gradient[i : i + 1], gradient_of(query_nll("mean"), alone) / 3)


def test_marginal_nll_has_the_gradient_of_the_log_evidence() -> None:
    """Exact on a Gaussian as far as particles hold its two moments: within 2 % of each partial derivative."""
    tasks = level_tasks(1, 6)
    adapter = bind(level, tasks, svgd(num_particles=50, num_steps=40, init="prior"), "prior")
    task = views_of(tasks, 2)[2]
    y = task.data["y"][0]

    def evidence(prior: Tensors) -> Tensor:
        cov = prior["sd"] ** 2 * torch.ones(6, 6) + prior["noise"] ** 2 * torch.eye(6)
        return -torch.distributions.MultivariateNormal(prior["mean"].expand(6), cov).log_prob(y)

    prior = {"mean": torch.tensor(0.3), "sd": torch.tensor(0.8), "noise": torch.tensor(0.6)}
    got = grad(lambda p: marginal_nll()(Rollout(adapter, p, task, task, task)).sum())(prior)
    wanted = grad(evidence)(prior)
    for name in prior:
        torch.testing.assert_close(got[name], wanted[name], rtol=0.02, atol=0.02)


def test_evidence_is_the_marginal_likelihood_of_all_observations() -> None:
    tasks = level_tasks(3, 5)
    prior = {"mean": torch.tensor(0.2), "sd": torch.tensor(0.7), "noise": torch.tensor(0.4)}
    rollout = Rollout(bind(level, tasks, laplace(), "prior"), prior, *views_of(tasks, 2))
    covariance = 0.7**2 * torch.ones(5, 5) + 0.4**2 * torch.eye(5)
    exact = torch.distributions.MultivariateNormal(torch.full((5,), 0.2), covariance).log_prob(tasks.data["y"])
    torch.testing.assert_close(evidence()(rollout), -exact)


def test_evidence_of_the_query_is_ml_laplace() -> None:
    tasks = level_tasks(3, 5)
    prior = {"mean": torch.tensor(0.2), "sd": torch.tensor(0.7), "noise": torch.tensor(0.4)}
    rollout = Rollout(bind(level, tasks, laplace(), "prior"), prior, *views_of(tasks, 2))
    support, query = tasks.data["y"][:, :2], tasks.data["y"][:, 2:]
    adapted = (0.2 / 0.7**2 + support.sum(1) / 0.4**2) / (1 / 0.7**2 + 2 / 0.4**2)
    nll = -normal_log_prob(query, adapted[:, None], 0.4).sum(1)
    log_det = torch.tensor(1 / 0.7**2 + 3 / 0.4**2).log()
    torch.testing.assert_close(evidence("query", 0.3)(rollout), nll + 0.3 * log_det)
    torch.testing.assert_close(evidence("query", 0.0)(rollout), query_nll()(rollout))
    assert str(evidence("query", 0.3)) == "evidence(query, 0.3)"


def test_evidence_needs_a_curvature() -> None:
    with pytest.raises(ValueError, match=r"needs the curvature of inference=laplace\(...\), got svgd"):
        evidence()(start_line(STEIN))
    with pytest.raises(ValueError, match="'other'"):
        evidence("other")  # type: ignore[arg-type]


def test_a_task_that_is_repaired_in_any_adaptation_counts_once() -> None:
    tasks = level_tasks(3, 5)
    prior = {"mean": torch.tensor(0.2), "sd": torch.tensor(0.7), "noise": torch.tensor(0.4)}
    rollout = Rollout(bind(level, tasks, laplace(), "prior"), prior, *views_of(tasks, 2))
    (evidence() + evidence("query"))(rollout)
    assert (len(rollout.states), len(rollout.measured), int(rollout.repaired.sum())) == (2, 1, 0)
    assert not rollout.unconverged.any()
    rollout.states[0] = rollout.states[0]._replace(repair=torch.tensor([[0.0], [1.0], [2.0]]))
    rollout.states[1] = rollout.states[1]._replace(repair=torch.tensor([[0.0], [0.0], [2.0]]))
    assert rollout.repaired.sum() == 2
    rollout.measured[0] = rollout.measured[0]._replace(repair=torch.tensor([[0.5], [0.0], [0.0]]))
    assert rollout.repaired.sum() == 3
