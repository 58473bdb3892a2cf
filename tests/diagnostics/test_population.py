"""What sequential Monte Carlo says of itself: by task."""

import warnings

import pytest
import torch

import bmaml_ppl as bp
from bmaml_ppl.diagnostics.population import UnevenWeights, check_population, describe_population
from bmaml_ppl.inference import smc, svgd
from bmaml_ppl.inference.smc import SMCState
from tests.toys import level

TASKS = bp.Tasks(
    {"x": torch.zeros(3, 2), "y": torch.tensor([[0.4, 0.6], [9.0, 9.2], [0.0, 0.1]])},
    outputs=("y",),
    names=("near", "far", "close"),
)


@pytest.fixture(scope="module")
def prior() -> bp.LearnedPrior:
    inference = smc(num_particles=200, num_steps=12, num_moves=1)
    return bp.meta_learn(level, TASKS, num_support=1, inference=inference, num_steps=0, progress=False)


def test_tasks_report_their_populations(prior: bp.LearnedPrior) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = prior.adapt(TASKS, compile=False)
    found, state = posterior.diagnostics(), posterior.state
    assert list(found) == ["smallest_ess", "acceptance_rate", "log_evidence"]
    for name, value in found.items():
        assert torch.equal(value, getattr(state, name))
        assert value.shape == (3,)
    assert (found["smallest_ess"] > 0.49).all()
    assert (found["acceptance_rate"] > 0.05).all()
    # A level N(0.5, 0.5) with noise 1: the mean of two values has variance 0.75 around 0.5, half their difference 0.5.
    y = TASKS.data["y"]
    between = torch.distributions.Normal(0.5, 0.75**0.5).log_prob(y.mean(1))
    within = torch.distributions.Normal(0.0, 0.5**0.5).log_prob((y[:, 0] - y[:, 1]) / 2)
    exact = between + within - torch.tensor(2.0).log()  # the Jacobian of mean and half difference
    assert ((found["log_evidence"] - exact).abs() < torch.tensor([0.2, 1.0, 0.2])).all()
    assert posterior["far"].diagnostics()["log_evidence"] == found["log_evidence"][1]


def test_tasks_with_uneven_weights_are_named_and_told_what_to_do(prior: bp.LearnedPrior) -> None:
    said = r"of 1 of 3 tasks fell below 5% of the particles: 'far' \(0\.0\d+\); take more steps: num_steps=\.\.\."
    with pytest.warns(UnevenWeights, match=said):
        found = prior.adapt(TASKS, num_steps=0).diagnostics()
    assert (found["smallest_ess"] < 0.05).tolist() == [False, True, False]


def test_restarts_are_looked_at_too(prior: bp.LearnedPrior) -> None:
    with pytest.warns(UnevenWeights) as told:
        prior.adapt(TASKS, num_steps=0, num_restarts=2)
    assert len(told) == 2


def test_a_posterior_that_is_not_known_counts_as_uneven() -> None:
    shares = torch.tensor([torch.nan, 0.0, 0.5, 0.05])
    zero = torch.zeros(4)
    state = SMCState(torch.zeros(4, 6, 1), zero, zero, shares, zero, zero, zero)
    with pytest.warns(UnevenWeights, match=r"2 of 4 tasks .*'a' \(nan\), 'b' \(0\)"):
        check_population(state, ("a", "b", "c", "d"))


def test_others_report_nothing() -> None:
    inference = svgd(num_particles=3)
    posterior = bp.meta_learn(level, TASKS, num_support=1, inference=inference, num_steps=0, progress=False).adapt(
        TASKS, num_steps=1
    )
    assert describe_population(posterior.state) == {}
    assert posterior.diagnostics() == {}
