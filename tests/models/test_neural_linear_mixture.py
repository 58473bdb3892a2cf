"""A mixture of neural linear regressions against its closed form, and what learning makes of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.func import vmap

import bmaml_ppl as bp
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.inference import laplace
from bmaml_ppl.inference.laplace import log_mass
from bmaml_ppl.models import neural_linear_mixture
from bmaml_ppl.objectives import evidence
from bmaml_ppl.tasks import Tasks

F64 = torch.float64
SIZES = (1, 8, 5)
MANY = laplace(num_particles=40, num_steps=20, preconditioner="curvature", init="prior")


def _prior() -> bp.LearnedPrior:
    """A prior of kinds that differ in weight, whose scale is all but known."""
    prior = bp.meta_learn(
        neural_linear_mixture(SIZES, num_components=3, rank=2, initial_scale=2.0, initial_noise=0.4),
        sinusoid(4, 8, seed=0).tasks,
        num_support=5,
        inference=MANY,
        objective=evidence(),
        num_steps=0,
        progress=False,
    )
    prior = prior.to(dtype=F64)
    logits = torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=F64)
    known = torch.tensor(1e-4, dtype=F64)
    return replace(prior, params={**prior.params, "scale_sd": known, "kind_logits": logits})


def _closed_form(prior: bp.LearnedPrior, x: Tensor, y: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Log evidence of each kind with a scale of exp(m), (G,), and each kind's predictive mean, (G, N')."""

    def design(x: Tensor) -> Tensor:
        hidden = x.unsqueeze(-1)
        for layer in range(2):
            weight, bias = (prior.params[f"features$$${kind}.{layer}"] for kind in ("weights", "biases"))
            hidden = torch.tanh(hidden @ weight.T + bias)
        return torch.cat([torch.ones(len(x), 1, dtype=F64), hidden], 1)

    scale = prior.params["scale_loc"].exp()
    noise = prior.params["noise_ratio"] * scale
    values, means = [], []
    kind_weights = 0.9 * prior.params["kind_logits"].softmax(0) + 0.1 / 3
    for weight, basis in zip(kind_weights, prior.params["basis"], strict=True):
        here, there = scale * design(x) @ basis, scale * design(new) @ basis
        covariance = here @ here.T + noise**2 * torch.eye(len(x), dtype=F64)
        values.append(weight.log() + MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y))
        means.append(there @ here.T @ torch.linalg.solve(covariance, y))
    return torch.stack(values), torch.stack(means)


@pytest.mark.parametrize("num_points", [2, 8])
def test_evidence_and_predictions_are_those_of_the_enumerated_kinds(num_points: int) -> None:
    prior = _prior()
    data = sinusoid(4, 12, seed=3).tasks.data
    x, y, new = data["x"][:, :num_points].double(), data["y"][:, :num_points].double() / 3, data["x"][:, 8:].double()
    posterior = prior.adapt(Tasks({"x": x, "y": y}, outputs=("y",)))
    found = vmap(log_mass)(posterior.state).logsumexp(1)
    z = posterior.draws(4000)
    for task in range(4):
        values, means = _closed_form(prior, x[task], y[task], new[task])
        torch.testing.assert_close(found[task], values.logsumexp(0), rtol=0, atol=2e-3)
        weights = values.softmax(0)
        kinds = z[:, task, 0].round()
        shares = torch.stack([(kinds == k).double().mean() for k in range(3)])
        # Stratified: shares are exact up to one draw of 4,000 and the atol of the evidence.
        torch.testing.assert_close(shares, weights, rtol=0, atol=2e-3)


def test_it_learns_kinds_that_no_single_linear_regression_holds() -> None:
    """Half of the tasks are waves, half lines: with one kind of rank 1 the evidence is far lower than with two."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(60, 10, generator=generator) - 1
    size = torch.randn(60, 1, generator=generator)
    kind = (torch.arange(60) % 2).unsqueeze(1)
    curve = torch.where(kind == 0, torch.sin(3 * x), x.square())
    y = size * (curve + 0.02 * torch.randn(60, 10, generator=generator))
    losses = []
    for num in (1, 2):
        prior = bp.meta_learn(
            neural_linear_mixture((1, 16, 8), num_components=num, rank=1, seed=1),
            Tasks({"x": x, "y": y}, outputs=("y",)),
            num_support=5,
            inference=laplace(num_particles=4 * num, num_steps=12, preconditioner="curvature", init="prior"),
            objective=evidence(),
            num_steps=60,
            batch_size=10,
            optimizer=lambda params: torch.optim.Adam(params, lr=0.03),
            progress=False,
        )
        losses.append(sum(prior.history.loss[-20:]) / 20)
    assert losses[1] < losses[0] - 3, "two kinds gain more than 3 nats a task"


@pytest.mark.parametrize("option", ["num_components", "rank", "initial_scale", "initial_noise"])
def test_options_are_checked(option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=f"{option}=0 must be positive"):
        neural_linear_mixture(SIZES, **options)


def test_features_and_outputs_are_checked() -> None:
    model = neural_linear_mixture(torch.nn.Flatten(0))
    with pytest.raises(ValueError, match=r"output has shape \(4,\); give features \(4, H\)"):
        model(torch.randn(4, 1))
