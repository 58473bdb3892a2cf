"""`check`: each question is answered by a model that passes and by one that is made to fail."""

import json
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bmaml_ppl as bp
from bmaml_ppl.diagnostics.check import Verdict, check
from bmaml_ppl.inference import hmc, laplace, map_estimate, svgd
from tests import toys

CHAINS = hmc(num_chains=4, num_warmup=60, num_draws=150, num_leapfrog=4)


def untrained(model: Any, tasks: bp.Tasks, **params: float) -> bp.LearnedPrior:
    """A prior with the given meta-parameters, not learned."""
    prior = bp.meta_learn(model, tasks, num_support=2, num_steps=0, compile=False, progress=False)
    return replace(prior, params={**prior.params, **{k: torch.tensor(v) for k, v in params.items()}})


def two_halves(num_tasks: int, num_observations: int, seed: int = 0) -> tuple[bp.Tasks, bp.Tasks]:
    """Observations to adapt to and to hold out, of the tasks of `toys.level`."""
    tasks = toys.level_tasks(num_tasks, 2 * num_observations, seed)
    halves = tasks.split_observations(num_observations)
    return halves.support, halves.query


def right(num_tasks: int = 40, seed: int = 0) -> tuple[bp.LearnedPrior, bp.Tasks, bp.Tasks]:
    """The truth of `toys.level_tasks` as a prior, with observations seen and held out."""
    support, query = two_halves(num_tasks, 5, seed)
    return untrained(toys.level, support, mean=0.0, sd=1.0, noise=0.5), support, query


@pytest.mark.parametrize("inference", [CHAINS, laplace(), svgd()], ids=lambda inference: inference.name)
def test_a_right_model_is_believed(inference: Any) -> None:
    prior, support, query = right()
    restarts = 1 if inference.num_draws else 2
    verdict = check(prior.adapt(support, inference=inference, num_restarts=restarts), query)
    assert verdict.believe, str(verdict)
    assert {found.level for found in verdict.findings} <= {"pass", "unknown", "warn"}
    assert verdict["coverage"].value == pytest.approx(0.9, abs=0.06)
    assert verdict["finite draws"].level == "pass"
    assert bool(verdict) is verdict.believe


def test_false_alarms_are_rare() -> None:
    # 12 right models of 40 tasks with an exact posterior: none fails; of all their answers at most two warn.
    warnings = 0
    for seed in range(12):
        prior, support, query = right(seed=seed)
        verdict = check(prior.adapt(support, inference=laplace()), query)
        assert verdict.believe, str(verdict)
        warnings += sum(found.level == "warn" for found in verdict.findings)
    assert warnings <= 2


def test_too_little_noise_is_not_believed() -> None:
    prior, support, query = right()
    sure = replace(prior, params={**prior.params, "noise": torch.tensor(0.1)})
    verdict = check(sure.adapt(support, inference=laplace()), query)
    assert not verdict.believe
    assert verdict["coverage"].level == "fail"
    assert "too narrow" in verdict["coverage"].reason
    assert verdict["fit"].level == "fail"
    assert "less likely" in verdict["fit"].reason


def test_too_much_noise_is_not_believed() -> None:
    prior, support, query = right()
    vague = replace(prior, params={**prior.params, "noise": torch.tensor(2.0)})
    verdict = check(vague.adapt(support, inference=laplace()), query)
    assert not verdict.believe
    assert verdict["coverage"].level == "fail"
    assert "too wide" in verdict["coverage"].reason
    assert "more likely" in verdict["fit"].reason


def test_a_misfit_shows_without_held_out_data() -> None:
    prior, support, _ = right()
    sure = replace(prior, params={**prior.params, "noise": torch.tensor(0.15)})
    verdict = check(sure.adapt(support, inference=laplace()))
    assert verdict["fit"].level == "fail"
    assert verdict["coverage"].level == "unknown"
    assert "check(posterior, query)" in verdict["coverage"].reason


def coin(x: Tensor, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Poisson(a.exp()), obs=y)


def test_a_wrong_shape_is_not_believed() -> None:
    # Cauchy noise with normal predictions of the same 90 % interval: coverage alone would not see it.
    support, query = two_halves(60, 8)
    generator = torch.Generator().manual_seed(5)
    level = torch.randn(60, 1, generator=generator)
    y = level + 0.11 * torch.randn(60, 16, generator=generator) / torch.randn(60, 16, generator=generator).abs()
    halves = bp.Tasks({"x": torch.zeros_like(y), "y": y.clamp(-10, 10)}, outputs=("y",)).split_observations(8)
    prior = untrained(toys.level, support, mean=0.0, sd=1.0, noise=0.6)
    verdict = check(prior.adapt(halves.support, inference=laplace()), halves.query)
    assert verdict["coverage"].level != "fail"
    assert verdict["calibration"].level == "fail"


def test_observations_that_err_together_count_as_one() -> None:
    # 12 tasks of 40 held-out rows and one seen: a task's rows are all above or all below, as a right model predicts.
    for seed in range(5):
        tasks = toys.level_tasks(12, 41, seed)
        halves = tasks.split_observations(1)
        prior = untrained(toys.level, halves.support, mean=0.0, sd=1.0, noise=0.5)
        verdict = check(prior.adapt(halves.support, inference=laplace()), halves.query)
        assert verdict.believe, str(verdict)


@pytest.mark.parametrize(("factor", "level"), [(1, "pass"), (4, "fail")])
def test_counts_have_coverage_too(factor: int, level: str) -> None:
    # Four times a Poisson count is four times as variable as the model believes.
    generator = torch.Generator().manual_seed(0)
    rate = torch.randn(60, 1, generator=generator).exp() / factor
    y = factor * torch.poisson(rate.expand(60, 12), generator=generator)
    halves = bp.Tasks({"x": torch.zeros_like(y), "y": y}, outputs=("y",)).split_observations(6)
    verdict = check(untrained(coin, halves.support).adapt(halves.support, inference=laplace()), halves.query)
    assert verdict["coverage"].level == level


def test_a_task_from_elsewhere_is_named() -> None:
    prior, support, _ = right()
    y = support.data["y"].clone()
    y[7] += 8.0
    moved = bp.Tasks({**support.data, "y": y}, outputs=("y",))
    verdict = check(prior.adapt(moved, inference=laplace()))
    assert verdict["prior-data conflict"].level == "warn"
    assert verdict["prior-data conflict"].tasks == ("task 7",)
    assert "task 7" in str(verdict)


def two_modes(x: Tensor, y: Tensor | None = None) -> None:
    """y ~ N(|a|, .1): two answers, far apart."""
    a = pyro.sample("a", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 3.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(a.abs(), 0.1), obs=y)


def modal_tasks() -> bp.Tasks:
    generator = torch.Generator().manual_seed(3)
    y = 3 + 0.1 * torch.randn(4, 6, generator=generator)
    return bp.Tasks({"x": torch.zeros_like(y), "y": y}, outputs=("y",))


def test_chains_in_different_modes_are_not_believed() -> None:
    prior = untrained(two_modes, modal_tasks())
    posterior = prior.adapt(modal_tasks(), inference=CHAINS, seed=2)
    assert len(set(posterior.state.draws[0, :, -1, 0].sign().tolist())) == 2
    verdict = check(posterior)
    assert verdict["agreement of chains"].level == "fail"
    assert verdict["effective sample size"].level != "pass"


def test_restarts_in_different_modes_are_not_believed() -> None:
    prior = untrained(two_modes, modal_tasks())
    inference = laplace(num_particles=2, num_steps=30)
    posterior = prior.adapt(modal_tasks(), inference=inference, num_restarts=4, seed=5)
    found = [tuple(state.particles[0, :, 0].sign().tolist()) for state in posterior.states]
    assert {len(set(signs)) for signs in found} == {1, 2}  # some restarts found one mode, some both
    assert check(posterior)["agreement of restarts"].level == "fail"


def test_one_adaptation_cannot_be_compared() -> None:
    prior, support, _ = right(4)
    found = check(prior.adapt(support, inference=laplace()))["agreement of restarts"]
    assert (found.level, found.value) == ("unknown", None)
    assert "num_restarts=4" in found.reason


def test_identical_starts_say_nothing() -> None:
    # A single Laplace mode starts at the prior's mean each time.
    prior, support, _ = right(4)
    found = check(prior.adapt(support, inference=laplace(), num_restarts=3))["agreement of restarts"]
    assert found.level == "unknown"
    assert "began at the same place" in found.reason


def heavy(x: Tensor, y: Tensor | None = None) -> None:
    """Ten latents with Cauchy tails, which a Gaussian does not reach."""
    a = pyro.sample("a", dist.StudentT(1.0, pyro.param("mean", torch.zeros(10)), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(a[0] + 0 * x, 1.0), obs=y)


def test_a_gaussian_for_heavy_tails_has_a_large_khat() -> None:
    y = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    tasks = bp.Tasks({"x": torch.zeros_like(y), "y": y}, outputs=("y",))
    prior = untrained(heavy, tasks)
    posterior = prior.adapt(tasks, inference=laplace())
    found = check(posterior)["importance weights"]
    assert found.level == "fail"
    assert found.value is not None
    assert found.value > 0.7


def test_a_point_is_not_a_posterior() -> None:
    prior, support, _ = right(4)
    found = check(prior.adapt(support, inference=map_estimate()))["spread"]
    assert found.level == "fail"


def test_collapsed_particles_are_not_believed() -> None:
    prior, support, _ = right(8)
    posterior = prior.adapt(support, inference=svgd())
    state = posterior.state
    centre = state.particles.mean(1, keepdim=True)
    narrow = replace(posterior, state=state._replace(particles=centre + 0.2 * (state.particles - centre)))
    assert check(posterior)["spread"].level == "pass"
    assert check(narrow)["spread"].level == "fail"
    assert check(narrow)["spread"].value == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize(("factor", "level"), [(0.25, "fail"), (0.5, "warn"), (1.0, "pass"), (4.0, "fail")])
def test_a_gaussian_of_the_wrong_width_is_seen(factor: float, level: str) -> None:
    tasks = toys.line_tasks(20, 8)
    prior = untrained(toys.straight, tasks)
    posterior = prior.adapt(tasks, inference=laplace())
    precision = posterior.state.precision
    wrong = precision._replace(factor=precision.factor * factor**-0.5)
    verdict = check(replace(posterior, state=posterior.state._replace(precision=wrong)))
    assert verdict["spread"].level == level
    assert verdict["location"].level == "pass"


def test_particles_aside_of_the_posterior_are_not_believed() -> None:
    prior, support, _ = right(8)
    posterior = prior.adapt(support, inference=svgd())
    sd = posterior.state.particles.std(1, keepdim=True)
    moved = posterior.state._replace(particles=posterior.state.particles + 1.5 * sd)
    assert check(posterior)["location"].level == "pass"
    found = check(replace(posterior, state=moved))["location"]
    assert found.level == "fail"
    assert found.value == pytest.approx(1.5, abs=0.4)


def test_other_things_are_refused() -> None:
    prior, support, _ = right(4)
    with pytest.raises(TypeError, match=r"got a LearnedPrior; give what prior\.adapt"):
        check(prior)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="were adapted to"):
        check(prior.adapt(support), support)


def test_many_latents_are_compared_by_their_density() -> None:
    def wide(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(130), pyro.param("sd", torch.ones(130))).to_event(1))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(a.sum() / 130**0.5 + 0 * x, 0.5), obs=y)

    tasks = toys.level_tasks(2, 3)
    verdict = check(untrained(wide, tasks).adapt(tasks, inference=CHAINS))
    assert verdict["agreement of chains"].value == pytest.approx(1.0, abs=0.2)


def test_broken_draws_fail() -> None:
    prior, support, _ = right(4)
    posterior = prior.adapt(support, inference=svgd())
    state = posterior.state
    broken = state.particles.clone()
    broken[2] = torch.inf
    verdict = check(replace(posterior, state=state._replace(particles=broken)))
    assert verdict["finite draws"].level == "fail"
    assert verdict["finite draws"].tasks == ("task 2",)


def test_a_verdict_is_json_and_a_table() -> None:
    prior, support, query = right(4)
    verdict = check(prior.adapt(support, inference=laplace()), query)
    assert isinstance(verdict, Verdict)
    again = json.loads(json.dumps(verdict.to_dict()))
    assert again["believe"] is verdict.believe
    assert [row["name"] for row in again["findings"]] == [found.name for found in verdict.findings]
    for found in verdict.findings:
        assert found.name in str(verdict)
        assert found.level == "pass" or found.reason in str(verdict)


def test_one_task_and_keyword_data() -> None:
    prior, support, query = right(4)
    x, y = support.data["x"][0], support.data["y"][0]
    posterior = prior.adapt(x=x, y=y, inference=laplace())
    assert check(posterior, x=query.data["x"][0], y=query.data["y"][0])["coverage"].value is not None
    with pytest.raises(ValueError, match="task"):
        check(prior.adapt(support), toys.level_tasks(3, 2))


def test_names_that_are_not_there_are_refused() -> None:
    prior, support, _ = right(4)
    with pytest.raises(KeyError, match="finite draws"):
        check(prior.adapt(support, inference=laplace()))["trust"]
