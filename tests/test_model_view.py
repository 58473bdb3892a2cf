"""The model with learned values is the one that predictions come from; another one shows in its densities."""

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Importance, Predictive
from torch import Tensor, nn

import bmaml_ppl as bp
from bmaml_ppl.inference import map_estimate, svgd
from bmaml_ppl.model_view import fingerprint

network = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
learn = partial(bp.meta_learn, num_support=2, num_steps=1, compile=False, progress=False)


def net(x: Tensor, y: Tensor | None = None) -> None:
    trunk = pyro.module("trunk", network)
    level = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(trunk(x.unsqueeze(-1)).squeeze(-1) + level, 0.5), obs=y)


def level(x: Tensor, y: Tensor | None = None) -> None:
    top = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(top + torch.zeros(x.shape), 0.5), obs=y)


def make_tasks() -> bp.Tasks:
    generator = torch.Generator().manual_seed(0)
    return bp.Tasks({k: torch.randn(4, 5, generator=generator) for k in ("x", "y")}, outputs=("y",))


@pytest.fixture(scope="module")
def prior() -> bp.LearnedPrior:
    learned = learn(net, make_tasks(), inference=svgd(num_particles=5, num_steps=5))
    learned.params.update({k: v + 1.0 for k, v in learned.params.items()})  # far from the initial values
    return learned


def test_pyro_predicts_what_the_posterior_predicts(prior: bp.LearnedPrior) -> None:
    """Gaussian draws: means and variances at 3 inputs, |z| < 4.5 each; false alarms below 5e-5 in all."""
    task, x, num = make_tasks()[0], torch.tensor([-1.0, 0.5, 2.0]), 2000
    posterior = prior.adapt(task, inference=map_estimate(num_steps=3, init="prior"))[0]
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = Predictive(posterior.model, guide=posterior.as_guide(), num_samples=num)(x=x)["obs"]
    ours = posterior.predict(x=x, num_samples=num)["obs"]
    difference = (ours.mean(0) - theirs.mean(0)) / (0.5 * math.sqrt(2 / num))
    ratio = (ours.var(0) / theirs.var(0)).log() / math.sqrt(4 / num)
    assert (difference.abs() < 4.5).all()
    assert (ratio.abs() < 4.5).all()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_particles_and_guide_predict_the_same_moments(prior: bp.LearnedPrior) -> None:
    """The guide keeps particles' mean and, up to its jitter, covariance; means to 4.5 standard errors, alarms 2e-5."""
    posterior, x, num = prior.adapt(make_tasks()[0])[0], torch.tensor([-1.0, 2.0]), 1000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = Predictive(posterior.model, guide=posterior.as_guide(), num_samples=num)(x=x)["obs"]
    level = posterior.sites()["level"]
    exact = level.mean() + _trunk(prior, x)
    error = math.sqrt((level.var(correction=0).item() + 0.25) / num)
    assert ((theirs.mean(0) - exact).abs() < 4.5 * error).all()


def _trunk(prior: bp.LearnedPrior, x: Tensor) -> Tensor:
    weights = {k.removeprefix("trunk$$$"): v for k, v in prior.params.items() if k.startswith("trunk")}
    return torch.func.functional_call(network, weights, (x.unsqueeze(-1),)).squeeze(-1)


def test_importance_weights_are_those_of_the_learned_model(prior: bp.LearnedPrior) -> None:
    task = make_tasks()[0]
    posterior, data = prior.adapt(task)[0], {k: v[0] for k, v in task.data.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        importance = Importance(posterior.model, guide=posterior.as_guide(), num_samples=300).run(**data)
    trace = importance.exec_traces[0]
    level = trace.nodes["level"]["value"]
    expected = dist.Normal(prior.params["mean"], 1.0).log_prob(level)
    expected = expected + dist.Normal(_trunk(prior, data["x"]) + level, 0.5).log_prob(data["y"]).sum()
    assert torch.allclose(trace.log_prob_sum(), expected, rtol=1e-5)
    # Exact: the level given y is normal. Weights have a finite variance: 4.5 standard errors, alarms 7e-6.
    precision = 1 + len(data["y"]) / 0.25
    exact = (prior.params["mean"] + (data["y"] - _trunk(prior, data["x"])).sum() / 0.25) / precision
    weights = importance.get_normalized_weights(log_scale=False)
    levels = torch.stack([t.nodes["level"]["value"] for t in importance.exec_traces])
    error = (weights.square() * (levels - exact).square()).sum().sqrt()
    assert (weights * levels).sum().sub(exact).abs() < 4.5 * error


def test_params_are_hidden_and_the_store_is_left_alone(prior: bp.LearnedPrior) -> None:
    pyro.clear_param_store()
    pyro.param("mean", torch.tensor(7.0))
    trace = pyro.poutine.trace(prior.model).get_trace(torch.zeros(2))
    assert {name for name, node in trace.nodes.items() if node["type"] == "param"} == set()
    assert {"level", "obs"} < set(trace.nodes)
    expected = prior.params["mean"]
    prior_of_level: Any = trace.nodes["level"]["fn"]
    assert torch.equal(prior_of_level.loc, expected)
    assert dict(pyro.get_param_store().items()) == {"mean": torch.tensor(7.0)}
    pyro.clear_param_store()


def test_a_model_of_doubles_stays_one() -> None:
    data = {k: v.double() for k, v in make_tasks().data.items()}
    prior = learn(level, bp.Tasks(data, outputs=("y",)), inference=svgd(num_particles=3, num_steps=2))
    trace = pyro.poutine.trace(prior.model).get_trace(x=torch.zeros(2, dtype=torch.float64))
    value = trace.nodes["obs"]["value"]
    assert value is not None
    assert value.dtype == torch.float64


def test_a_fingerprint_is_of_one_model(prior: bp.LearnedPrior) -> None:
    found = fingerprint(prior.density, prior.params, prior.template)
    assert found == fingerprint(prior.density, dict(prior.params), prior.template)
    assert {name: entry["distribution"] for name, entry in found.items()} == {"level": "Normal", "obs": "Normal"}
    moved = prior.params | {"mean": prior.params["mean"] + 0.1}
    other = fingerprint(prior.density, moved, prior.template)
    assert other["level"]["log_prob"] != found["level"]["log_prob"]
    assert other["obs"] == found["obs"]
