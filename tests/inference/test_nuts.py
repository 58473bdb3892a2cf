"""Pyro's NUTS on our densities: closed forms, the eight schools' reference, statistics, isolation.

Means are compared in Monte Carlo standard errors (MCSE) from the effective sample size. Seeds are fixed; a bound of 4
MCSE would fail once in 16,000 comparisons on other seeds.
"""

import logging
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

import bmaml_ppl as bp
from bmaml_ppl.inference.chains import ChainState
from bmaml_ppl.inference.nuts import _Potential, nuts, run_nuts
from bmaml_ppl.models import eight_schools, eight_schools_data
from bmaml_ppl.task_density import TaskDensity
from tests.toys import level, level_tasks

F64 = torch.float64
SETTINGS: dict[str, Any] = {"num_warmup": 100, "num_draws": 300, "num_chains": 2, "seed": 0}
SHORT: dict[str, Any] = {"num_warmup": 10, "num_draws": 15, "num_chains": 2, "seed": 0}


def counts(y: Tensor | None = None) -> None:
    """Counts of a rate with a Gamma prior: nothing to learn but the start."""
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("data", 5):
        pyro.sample("obs", dist.Poisson(rate), obs=y)


def _untrained(model: Any, tasks: bp.Tasks, dtype: torch.dtype = F64) -> bp.LearnedPrior:
    return bp.meta_learn(model, tasks, num_support=2, num_steps=0, device="cpu", progress=False).to(dtype=dtype)


def _level_prior(standardised: bool = False) -> bp.LearnedPrior:
    tasks = level_tasks(4, 6)
    return _untrained(level, tasks.standardize(["y"]) if standardised else tasks)


def _task() -> dict[str, Any]:
    return {key: value[2].double() for key, value in level_tasks(4, 6).data.items()}


def _deviations(draws: Tensor, mean: float, sd: float) -> tuple[float, float]:
    """How far the mean and the mean square of draws, (C, S), are from exact ones, in Monte Carlo standard errors."""
    found = []
    for values, exact in ((draws, mean), ((draws - mean) ** 2, sd**2)):
        error = values.std() / effective_sample_size(values, 0, 1).sqrt()
        found.append(float((values.mean() - exact) / error))
    return found[0], found[1]


@pytest.mark.parametrize("standardised", [False, True])
def test_a_normal_level_is_its_closed_form(standardised: bool) -> None:
    prior, task = _level_prior(standardised), _task()
    posterior = nuts(prior, **SETTINGS, **task)
    y = task["y"] if prior.scaling is None else prior.scaling.apply({"y": task["y"]})["y"]
    precision = 1 / 0.5**2 + len(y) / 1.0**2
    mean = float((0.5 / 0.5**2 + y.sum()) / precision)
    draws = posterior.sites(600)["a"].reshape(2, 300)
    assert max(map(abs, _deviations(draws, mean, precision**-0.5))) < 4
    assert split_gelman_rubin(draws, 0, 1) < 1.05


def test_a_rate_is_its_closed_form_on_its_support() -> None:
    y = torch.tensor([[3.0, 0.0, 2.0, 4.0, 1.0], [1.0, 1.0, 0.0, 2.0, 0.0]])
    posterior = nuts(_untrained(counts, bp.Tasks({"y": y}, outputs=("y",))), **SETTINGS, y=y[0])
    shape, rate = 2 + 10, 1 + 5
    draws = posterior.sites(600)["rate"].reshape(2, 300)
    assert max(map(abs, _deviations(draws, shape / rate, shape**0.5 / rate))) < 4


def test_eight_schools_are_the_reference() -> None:
    columns = {key: value[None] for key, value in eight_schools_data().items()}
    tasks = bp.Tasks({**columns, "school": torch.arange(8)[None]}, outputs=("y",))
    posterior = nuts(_untrained(eight_schools(), tasks, torch.float32), tasks, **SETTINGS)
    sites = {name: value[:, 0] for name, value in posterior.sites(600).items()}
    found = {"mu": sites["mu"], "tau": sites["tau"], "theta[1]": sites["mu"] + sites["tau"] * sites["eta"][:, 0]}
    # posteriordb: mean and sd of 10,000 nearly independent draws.
    for name, mean, sd in (("mu", 4.41, 3.31), ("tau", 3.60, 3.20), ("theta[1]", 6.15, 5.62)):
        draws = found[name].reshape(2, 300)
        size = effective_sample_size(draws, 0, 1)
        error = (draws.var() / size + sd**2 / 10_000).sqrt()
        assert abs(draws.mean() - mean) < 4 * error, name
        assert size > 100, name
        assert split_gelman_rubin(draws, 0, 1) < 1.05, name
    assert posterior.state.diverging.float().mean() < 0.02


def test_the_potential_is_the_density_recorded() -> None:
    prior, task = _level_prior(), _task()
    density = TaskDensity(prior.density, prior.params, task)
    potential = _Potential(density)
    z = torch.tensor([0.3], dtype=F64, requires_grad=True)
    for _ in range(3):
        value = potential({"z": z})
        (slope,) = torch.autograd.grad(value, z)
    exact = -density(z)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(slope, torch.autograd.grad(exact, z)[0])
    assert None not in potential.slope.graphs.values()
    assert len(potential.slope.graphs) == 1


def test_statistics_are_those_of_each_transition() -> None:
    prior, task = _level_prior(), _task()
    posterior = nuts(prior, **{**SHORT, "num_draws": 200}, **task)
    state = posterior.state
    assert isinstance(state, ChainState)
    shapes = {"particles": (1, 2, 1), "draws": (1, 2, 200, 1)}
    assert {n: tuple(v.shape) for n, v in state._asdict().items()} == {
        name: shapes.get(name, (1, 2, 200)) for name in ChainState._fields
    }
    density = TaskDensity(prior.density, prior.params, task)
    torch.testing.assert_close(state.log_density[0], torch.func.vmap(torch.func.vmap(density))(state.draws[0]))
    assert torch.equal(state.draws[:, :, -1], state.particles)
    # The energy at a transition's start is kinetic energy, half a chi-squared of one degree, above the last position's.
    kinetic = (state.energy[0, :, 1:] + state.log_density[0, :, :-1]).flatten()
    assert (kinetic >= 0).all()
    assert abs(kinetic.mean() - 0.5) < 4 * (0.5 / len(kinetic)) ** 0.5
    assert ((state.acceptance_rate >= 0) & (state.acceptance_rate <= 1)).all()
    assert state.acceptance_rate.std() > 0.01
    assert (state.step_size == state.step_size[..., :1]).all()
    assert not state.diverging.any()


def test_divergences_are_marked_where_they_are() -> None:
    def funnel(z: Tensor) -> Tensor:
        return -(z[0] ** 2) / 18 - 0.5 * (z[1:] ** 2).sum() * torch.exp(-z[0]) - 2 * z[0]

    starts = torch.zeros(1, 5)
    fixed: dict[str, Any] = {"num_warmup": 60, "num_draws": 150, "num_chains": 1, "max_tree_depth": 6, "seed": 0}
    loose = run_nuts(funnel, starts, target_accept=0.6, **fixed)
    assert 0 < loose.diverging.sum() < 75
    # A trajectory that diverges at once goes nowhere, and was not to be accepted.
    assert loose.acceptance_rate[loose.diverging].mean() < loose.acceptance_rate[~loose.diverging].mean()


def test_seeds_give_the_same_chains_and_chains_differ() -> None:
    prior, task = _level_prior(), _task()
    first, again, other = (nuts(prior, **{**SHORT, "seed": seed}, **task).state.draws for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_global_state_is_left_alone() -> None:
    prior, task = _level_prior(), _task()
    pyro.param("z", torch.tensor([50.0]))
    pyro.enable_validation(True)
    logger = logging.getLogger("pyro.infer.mcmc")
    before = dict(pyro.get_param_store().items()), torch.get_rng_state(), list(logger.handlers), logger.level
    with pyro.poutine.trace() as traced, torch.no_grad():
        nuts(prior, **SHORT, **task)
        assert not torch.is_grad_enabled()
    assert list(traced.trace.nodes) == ["_INPUT"] or not traced.trace.nodes
    assert dict(pyro.get_param_store().items()) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (logger.handlers, logger.level) == before[2:]
    with pytest.raises(ValueError, match="constraint"):  # validation is still on
        dist.Normal(0.0, -1.0)
    assert all(value.grad is None for value in prior.params.values())


def test_the_result_is_an_ordinary_posterior() -> None:
    prior, task = _level_prior(standardised=True), _task()
    posterior = nuts(prior, **SHORT, **task)
    assert "nuts, 2 particles" in repr(posterior)
    assert torch.equal(posterior.draws(30), posterior.state.draws[0].flatten(0, 1))
    assert posterior.predict(num_samples=7, x=torch.zeros(3))["obs"].shape == (7, 3)
    assert posterior.log_likelihood(num_samples=30)["obs"].shape == (30, 6)
    tree = posterior.to_arviz(num_samples=30)
    assert tree["posterior"]["a"].size == 30
    assert tree["log_likelihood"]["obs"].sizes["obs_id"] == 6


def test_a_task_of_ragged_ones_is_taken_by_name() -> None:
    rows: list[dict[str, Any]] = [{"x": torch.zeros(n, dtype=F64), "y": torch.randn(n, dtype=F64)} for n in (3, 5, 4)]
    tasks = bp.Tasks.from_list(rows, outputs=("y",), names=("a", "b", "c"))
    prior = _untrained(level, tasks)
    named = nuts(prior, tasks["c"], **SHORT)
    assert named.names == ("c",)
    assert torch.equal(named.state.draws, nuts(prior, **SHORT, **rows[2]).state.draws)


def test_networks_are_sampled_with_their_weights() -> None:
    net = torch.nn.Linear(1, 1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        bias = pyro.sample("bias", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(net(x.unsqueeze(-1)).squeeze(-1) + bias, 0.5), obs=y)

    x, y = torch.randn(2, 5), torch.randn(2, 5)
    prior = _untrained(model, bp.Tasks({"x": x, "y": y}, outputs=("y",)))
    x, y = x.double(), y.double()
    posterior = nuts(prior, **SETTINGS, x=x[0], y=y[0])
    weight, offset = prior.params["net$$$weight"].squeeze(), prior.params["net$$$bias"].squeeze()
    precision = 1 + 5 / 0.25
    mean = float(((y[0] - weight * x[0] - offset) / 0.25).sum() / precision)
    assert max(map(abs, _deviations(posterior.sites(600)["bias"].reshape(2, 300), mean, precision**-0.5))) < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(2, 6), "y": torch.zeros(2, 6)}, r"got 2 tasks, but nuts serves one"),
        ({"num_draws": 0}, "num_draws=0"),
        ({"num_warmup": -1}, "num_warmup=-1"),
        ({"num_chains": 0}, "num_chains=0"),
        ({"max_tree_depth": 0}, "max_tree_depth=0"),
        ({"target_accept": 1.0}, r"target_accept=1.0 is a probability"),
        ({"y": torch.full((6,), 1e200, dtype=F64)}, "finite log density"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nuts(_level_prior(), **{**SHORT, **_task(), **options})


def test_the_batch_is_refused() -> None:
    posterior = nuts(_level_prior(), **SHORT, **_task())
    for function in (posterior.inference.init, posterior.inference.update):
        with pytest.raises(ValueError, match="nuts runs one task at a time"):
            function({"particles": torch.zeros(1, 1)}, None)  # type: ignore[call-arg, arg-type]
    with pytest.raises(TypeError, match="num_draws=1.5"):
        nuts(_level_prior(), num_draws=1.5, **_task())  # type: ignore[arg-type]
