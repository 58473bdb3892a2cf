"""Simulation-based calibration: right posteriors pass, wrong ones fail, and nothing depends on what it should not."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bmaml_ppl.diagnostics.calibration import Calibration
from bmaml_ppl.diagnostics.sbc import simulation_based_calibration
from bmaml_ppl.inference import hmc, laplace, map_estimate, svgd
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, Model

# Right posteriors fail a calibration with a probability of at most .05, once, at a fixed seed; alpha=1e-3 below.


def line(x: Tensor, y: Tensor | None = None) -> None:
    """Linear-normal, so that Laplace's Gaussian is the posterior."""
    mean = pyro.param("mean", torch.tensor([0.5, -1.0]))
    coef = pyro.sample("coef", dist.Normal(mean, 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * x, 0.5), obs=y)


def noisy_line(x: Tensor, y: Tensor | None = None) -> None:
    coef = pyro.sample("coef", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    precision = pyro.sample("precision", dist.Gamma(3.0, 1.0))
    powers = torch.stack([torch.ones_like(x), x, x**2], -1)
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(powers @ coef, precision.rsqrt()), obs=y)


def clicks(x: Tensor, y: Tensor | None = None) -> None:
    rate = pyro.sample("rate", dist.Beta(2.0, 3.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Bernoulli(rate), obs=y)


def shapes(x: Tensor, y: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(level.sum() + factor[1, 0] * x, 1.0), obs=y)


def logged(x: Tensor, y: Tensor | None = None) -> None:
    coef = pyro.sample("coef", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(coef * x, 0.5), obs=None if y is None else y.log())


def improper(x: Tensor, y: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(level, 1.0), obs=y)


def _tasks(num: int = 7, rows: int = 6, ragged: bool = False) -> Tasks:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num, rows, generator=generator)
    y = torch.rand(num, rows, generator=generator) + 0.5
    mask = (
        torch.arange(rows) < torch.arange(num)[:, None] % 4 + 2 if ragged else torch.ones(num, rows, dtype=torch.bool)
    )
    return Tasks({"x": x * mask, "y": y * mask}, mask=mask, outputs=("y",))


@cache
def _prior(model: Model = line) -> LearnedPrior:
    return meta_learn(model, _tasks(), num_support=3, inference=laplace(), num_steps=0, progress=False)


def _wrong(spread: float, shift: float = 0.0) -> LearnedPrior:
    """The exact posterior's draws, around their mean with another spread, and moved."""
    prior = _prior()
    right = prior.inference.sample

    def sample(state: Any, num_samples: int, generator: torch.Generator | None) -> Tensor:
        mode = state.particles[0]
        return mode + spread * (right(state, num_samples, generator) - mode) + shift

    return _with(prior, sample=sample)


def _with(prior: LearnedPrior, **changes: Any) -> LearnedPrior:
    return replace(prior, inference=prior.inference._replace(**changes))


def _calibrate(prior: LearnedPrior, num_simulations: int = 600, **options: Any) -> Calibration:
    return simulation_based_calibration(prior, _tasks(), num_simulations=num_simulations, alpha=1e-3, **options)


def test_laplace_is_exact_on_a_linear_normal_model() -> None:
    found = _calibrate(_prior(), 2000)
    assert found.passed
    assert found.names == ("coef[0]", "coef[1]", "log_joint")
    assert found.ranks.shape == (2000, 3)
    assert (found.num_failed, found.num_draws, found.effective_draws) == (0, 99, None)


@pytest.mark.parametrize("model", [line, noisy_line], ids=["linear-normal", "four parameters"])
def test_hmc_passes(model: Model) -> None:
    inference = hmc(num_chains=2, num_warmup=120, num_draws=120, num_leapfrog=6)
    found = _calibrate(_prior(model), 300, inference=inference, num_draws=49)
    assert found.passed
    assert found.effective_draws is not None
    assert found.effective_draws > 49
    if model is noisy_line:
        assert found.names == ("coef[0]", "coef[1]", "coef[2]", "precision", "log_joint")


@pytest.mark.parametrize(
    ("spread", "shift", "verdict"),
    [(0.5**0.5, 0.0, "too narrow"), (2**0.5, 0.0, "too wide"), (1.0, 0.3, "too high"), (1.0, -0.3, "too low")],
    ids=["half the variance", "twice the variance", "too high", "too low"],
)
def test_a_wrong_posterior_fails(spread: float, shift: float, verdict: str) -> None:
    found = _calibrate(_wrong(spread, shift))
    assert not found.passed
    assert found.p_values()["coef[0]"] < 1e-4
    assert found.verdicts()["coef[0]"] == verdict
    assert verdict in str(found)
    assert "FAILED" in str(found)


def test_a_posterior_that_forgets_the_data_fails_by_its_joint_density() -> None:
    mean = torch.tensor([0.5, -1.0])
    forgetful = _with(_prior(), sample=lambda state, num, generator: mean + torch.randn(num, 2))
    found = _calibrate(forgetful)
    assert found.verdicts() == {"coef[0]": "ok", "coef[1]": "ok", "log_joint": found.verdicts()["log_joint"]}
    assert found.p_values()["log_joint"] < 1e-12


@pytest.mark.parametrize(
    ("inference", "num"), [(None, 4000), (hmc(num_chains=1, num_warmup=60, num_draws=99, num_leapfrog=4), 1000)]
)
def test_tasks_have_their_own_random_numbers(inference: Inference | None, num: int) -> None:
    # With no data to speak of all posteriors are the prior: shared draws would make the ranks' ECDF that of 99 draws,
    # off by .05 and more, where 1,000 independent ranks allow .03.
    prior = _prior(flat)
    found = simulation_based_calibration(prior, _tasks(), num_simulations=num, inference=inference, alpha=1e-3)
    assert found.passed


def flat(x: Tensor, y: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(level, 1e4), obs=y)


def test_custom_quantities_are_ranked() -> None:
    quantities = {"sum": lambda sites: sites["coef"].sum(), "first": lambda sites: sites["coef"][0]}
    found = _calibrate(_prior(), quantities=quantities)
    assert found.passed
    assert found.names == ("coef[0]", "coef[1]", "sum", "first", "log_joint")
    torch.testing.assert_close(found.ranks[:, 3], found.ranks[:, 0])
    assert not torch.equal(found.ranks[:, 2], found.ranks[:, 0])


def test_ties_are_broken_at_random() -> None:
    found = _calibrate(_prior(), quantities={"sign": lambda sites: sites["coef"][0].sign()})
    assert found.p_values()["sign"] > 1e-3
    assert int(found.ranks[:, 2].max()) == 99


def test_ranks_by_naive_loop() -> None:
    # One draw of each task, and a quantity that tells it: the truth's rank is whether that draw lies below it.
    low = _with(_prior(), sample=lambda state, num, generator: torch.full((num, 2), -100.0))
    assert bool((_calibrate(low, 20).ranks[:, :2] == 99).all())
    high = _with(_prior(), sample=lambda state, num, generator: torch.full((num, 2), 100.0))
    assert bool((_calibrate(high, 20).ranks[:, :2] == 0).all())
    half = _with(
        _prior(), sample=lambda state, num, generator: torch.cat([torch.full((30, 2), -9.0), torch.full((69, 2), 9.0)])
    )
    assert bool((_calibrate(half, 20).ranks[:, :2] == 30).all())


@pytest.mark.parametrize("inference", [None, hmc(num_chains=1, num_warmup=9, num_draws=9, num_leapfrog=2)])
def test_the_same_seed_gives_the_same_ranks(inference: Inference | None) -> None:
    first, again = (_calibrate(_prior(), 30, seed=4, inference=inference, num_draws=9) for _ in range(2))
    assert torch.equal(first.ranks, again.ranks)
    if inference is None:
        assert not torch.equal(first.ranks, _calibrate(_prior(), 30, seed=5, num_draws=9).ranks)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    _calibrate(_prior(), 10)
    assert torch.equal(before, torch.random.get_rng_state())


def test_chunks_cover_every_simulation() -> None:
    whole, parts = _calibrate(_prior(), 50), _calibrate(_prior(), 50, chunk_size=8)
    assert whole.ranks.shape == parts.ranks.shape == (50, 3)
    # The same truths and data, whose draws differ: ranks are strongly related.
    together = torch.stack([whole.ranks[:, 0], parts.ranks[:, 0]]).double()
    assert float(torch.corrcoef(together)[0, 1]) > 0.9


def test_ragged_and_standardised_tasks_pass() -> None:
    tasks = _tasks(num=9, ragged=True).standardize()
    assert tasks.mask is not None
    prior = meta_learn(line, tasks, num_support=2, inference=laplace(), num_steps=0, progress=False)
    found = simulation_based_calibration(prior, tasks, num_simulations=1500, alpha=1e-3)
    assert found.passed


def test_outputs_are_not_looked_at() -> None:
    tasks = _tasks()
    without = Tasks({"x": tasks.data["x"]})
    other = Tasks({"x": tasks.data["x"], "y": -tasks.data["y"]}, outputs=("y",))
    ranks = [simulation_based_calibration(_prior(), t, num_simulations=40).ranks for t in (tasks, without, other)]
    assert torch.equal(ranks[0], ranks[1])
    assert torch.equal(ranks[0], ranks[2])


def test_integer_outputs_stay_integers() -> None:
    x = torch.zeros(5, 6)
    tasks = Tasks({"x": x, "y": (torch.arange(30).reshape(5, 6) % 3 == 0).long()}, outputs=("y",))
    prior = meta_learn(clicks, tasks, num_support=3, inference=laplace(), num_steps=0, progress=False)
    inference = hmc(num_chains=1, num_warmup=100, num_draws=150, num_leapfrog=4)
    found = simulation_based_calibration(
        prior, tasks, num_simulations=400, inference=inference, num_draws=24, alpha=1e-3
    )
    assert found.passed
    assert found.names == ("rate", "log_joint")


def test_coordinates_are_named_and_fixed_ones_left_out() -> None:
    found = _calibrate(
        _prior(shapes), 60, inference=hmc(num_chains=1, num_warmup=2, num_draws=5, num_leapfrog=1), num_draws=5
    )
    assert found.names == ("level[0,0]", "level[1,0]", "factor[1,0]", "factor[1,1]", "log_joint")


def test_particles_count_once_each() -> None:
    found = _calibrate(_prior(), 30, inference=svgd(num_particles=5, num_steps=3, init="prior"))
    assert found.num_draws == 5
    assert int(found.ranks.max()) <= 5


def test_failures_are_counted_and_left_out() -> None:
    right = _prior().inference.sample

    def sample(state: Any, num_samples: int, generator: torch.Generator | None) -> Tensor:
        draws = right(state, num_samples, generator)
        return torch.where(state.particles[0, 0] > 1.5, torch.nan, draws)

    found = _calibrate(_with(_prior(), sample=sample), 300)
    assert 10 < found.num_failed < 150
    assert len(found.ranks) == 300 - found.num_failed
    assert not found.passed
    assert f"{found.num_failed} failed" in str(found)
    every = _with(_prior(), sample=lambda state, num, generator: torch.full((num, 2), torch.nan))
    with pytest.raises(ValueError, match="all 300 simulations failed"):
        _calibrate(every, 300)


def test_one_failure_in_a_hundred_is_borne() -> None:
    ranks = torch.arange(1000).unsqueeze(1) % 100
    assert Calibration(ranks, ("a",), 99, 10, "laplace").passed
    assert not Calibration(ranks, ("a",), 99, 11, "laplace").passed


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "too many draws of chains": (
        lambda: _calibrate(_prior(), inference=hmc(num_chains=1, num_draws=10), num_draws=11),
        "hmc gives 10 draws",
    ),
    "too many particles": (lambda: _calibrate(_prior(), inference=map_estimate(init="prior"), num_draws=2), "1 draws"),
    "a quantity that is no scalar": (lambda: _calibrate(_prior(), quantities={"q": lambda s: s["coef"]}), r"\(2,\)"),
    "a name used twice": (lambda: _calibrate(_prior(), quantities={"coef[0]": lambda s: s["coef"][0]}), "two quant"),
    "an observation that is computed": (lambda: _calibrate(_prior(logged)), "cannot be simulated"),
    "a prior without draws": (lambda: _calibrate(_prior(improper)), "does not support sampling"),
    "one simulation": (lambda: _calibrate(_prior(), 1), "num_simulations=1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_write(name: str) -> None:
    run, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        run()


def test_ecdf_and_band_agree_with_the_verdict() -> None:
    for found in (_calibrate(_prior(), num_draws=24), _calibrate(_wrong(0.5**0.5), num_draws=24)):
        outside = {}
        for name in found.names:
            band = found.ecdf(name)
            assert band.level == pytest.approx(1 - 1e-3 / 3)
            outside[name] = bool(((band.difference < band.lower) | (band.difference > band.upper)).any())
        assert found.passed == (not any(outside.values()))
        assert {name: word != "ok" for name, word in found.verdicts().items()} == outside
        assert int(found.histogram("log_joint").counts.sum()) == len(found.ranks)
    with pytest.raises(KeyError, match="slope"):
        found.ecdf("slope")


def test_chains_with_too_few_effective_draws_are_told() -> None:
    ranks = torch.arange(200).unsqueeze(1) % 100
    assert "40 effective draws" in str(Calibration(ranks, ("a",), 99, 0, "hmc", effective_draws=40.0))
    assert "effective" not in str(Calibration(ranks, ("a",), 99, 0, "hmc", effective_draws=400.0))


def test_pit_and_dict() -> None:
    ranks = torch.arange(200).reshape(100, 2) % 10
    found = Calibration(ranks, ("a", "b"), 9, 0, "hmc")
    pit = found.pit()
    assert torch.equal((pit * 10).floor().long(), ranks)
    assert torch.equal(pit, found.pit())
    summary = found.to_dict()
    assert (summary["passed"], summary["num_simulations"], set(summary["p_values"])) == (found.passed, 100, {"a", "b"})


def test_export_to_arviz() -> None:
    found = Calibration(torch.arange(200).reshape(100, 2) % 10, ("coef[0]", "log_joint"), 9, 0, "hmc")
    tree = found.to_arviz()
    group = tree["prior_sbc"]
    assert set(group.data_vars) == {"coef[0]", "log_joint"}
    assert dict(group.sizes) == {"chain": 1, "draw": 100}
    torch.testing.assert_close(torch.from_numpy(group["log_joint"].values[0]), found.pit()[:, 1])
    assert tree.attrs["num_draws"] == 9
