"""What Laplace's method says of itself: by task and site."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bmaml_ppl.diagnostics.curvature import NotConverged, RepairedCurvature
from bmaml_ppl.inference import laplace, svgd
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.loop import StoppedEarly
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, Model
from tests.toys import line, line_tasks

TASKS = Tasks(
    {"x": torch.zeros(3, 2), "y": torch.tensor([[0.1, 0.2], [3.0, 3.2], [0.0, -0.1]])},
    outputs=("y",),
    names=("low", "high", "none"),
)


def learn(model: Model, inference: Inference) -> LearnedPrior:
    return meta_learn(model, TASKS, num_support=1, inference=inference, num_steps=0, progress=False)


def saddle(x: Tensor, y: Tensor | None = None) -> None:
    """The sign of b is not known: at b = 0, where a start at the prior's mean stays, the density may curve upward."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    b = pyro.sample("b", dist.Normal(torch.zeros(()), scale))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(b**2, 1.0), obs=y)


def unused(x: Tensor, y: Tensor | None = None) -> None:
    """Nothing says where `lost` is: an improper prior, and no data."""
    a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
    lost = pyro.sample("lost", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(a + 0.0 * lost, 1.0), obs=y)


def slow(x: Tensor, y: Tensor | None = None) -> None:
    """A log-rate far from its prior's mean takes Newton several steps."""
    spread = pyro.param("spread", torch.tensor(5.0), constraint=dist.constraints.positive)
    a = pyro.sample("a", dist.Normal(torch.zeros(()), spread))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Exponential(torch.exp(a)), obs=None if y is None else y.abs() + 0.1)


def test_repaired_tasks_are_named_and_sized() -> None:
    prior = learn(saddle, laplace(init="prior"))
    with pytest.warns(RepairedCurvature, match=r"1 of 3 tasks .* 'high'"):
        posterior = prior.adapt(TASKS)
    found = posterior.diagnostics()
    assert found["repaired"].tolist() == [False, True, False]
    # There -d2 log p = 1 - 2 sum(y) = -11.4 becomes 11.4, in units where it is 1.
    assert found["repair"][1].item() == pytest.approx(2.0, rel=1e-4)
    assert found["repair"][[0, 2]].max().item() == 0
    sd = posterior.sites(4000)["b"].std(0)
    torch.testing.assert_close(sd[1].item(), 11.4**-0.5, rtol=0.05, atol=0)


def test_repairs_are_counted_in_the_history() -> None:
    prior = meta_learn(saddle, TASKS, num_support=1, inference=laplace(), num_steps=2, batch_size=3, progress=False)
    assert prior.history.num_repaired == [1, 1]


def test_flat_direction_names_task_and_site() -> None:
    prior = learn(unused, laplace(init="free"))
    with pytest.raises(ValueError, match=r"task 'low' is flat along site 'lost' \(3 of 3 tasks\)"):
        prior.adapt(TASKS)


def test_optimiser_that_stops_short_names_task_and_site() -> None:
    prior = learn(slow, laplace(init="prior"))
    with pytest.warns(NotConverged, match=r"3 of 3 tasks .*'low' \(site 'a'"):
        found = prior.adapt(TASKS, num_steps=1).diagnostics()
    assert not found["converged"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prior.adapt(TASKS).diagnostics()["converged"].all()


def test_short_optimisers_are_counted_in_training_and_told_once() -> None:
    with pytest.warns(NotConverged, match=r"in the last 20 meta-steps \d+ of 60 adaptations stopped short") as told:
        prior = meta_learn(
            slow, TASKS, num_support=1, inference=laplace(num_steps=1), num_steps=20, batch_size=3, progress=False
        )
    assert len(told) == 1
    assert prior.history.num_unconverged[:2] == [3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = meta_learn(slow, TASKS, num_support=1, inference=laplace(), num_steps=2, batch_size=3, progress=False)
    assert prior.history.num_unconverged == [0, 0]


def laplacian(x: Tensor, y: Tensor | None = None) -> None:
    """Its log-likelihood is linear on each side of the datum."""
    mean = pyro.param("mean", torch.tensor(0.5))
    a = pyro.sample("a", dist.Normal(mean, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Laplace(a, 1.0), obs=y)


@pytest.mark.parametrize("curvature", ["exact", "ggn"])
def test_likelihood_without_a_second_derivative_is_named(curvature: Any) -> None:
    with pytest.raises(ValueError, match=r"observed site 'obs' has no second derivative.*write curvature=\"fisher\""):
        learn(laplacian, laplace(curvature=curvature))
    learn(laplacian, laplace(curvature="fisher"))


def test_unrolled_steps_need_not_converge() -> None:
    prior = learn(slow, laplace(init="prior", gradient="unrolled"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not prior.adapt(TASKS, num_steps=1).diagnostics()["converged"].all()


def test_particles_report_nothing() -> None:
    tasks = line_tasks(2, 6)
    prior = meta_learn(line, tasks, num_support=3, inference=svgd(num_particles=3), num_steps=0, progress=False)
    assert prior.adapt(tasks).diagnostics() == {}


def test_a_singular_hessian_stops_the_outer_loop_at_the_last_good_prior() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.param("mean", torch.tensor(0.5))
        a = pyro.sample("a", dist.Normal(mean, 1.0))
        pyro.sample("lost", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(a, 1.0), obs=y)

    with pytest.warns(StoppedEarly, match="gradient norm nan"):
        prior = meta_learn(
            model, TASKS, num_support=1, inference=laplace(init="free"), num_steps=2, compile=False, progress=False
        )
    assert prior.params["mean"].item() == pytest.approx(0.5)
