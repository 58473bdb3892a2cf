"""Tempered sequential Monte Carlo: each step by hand, what moves leave alone, and closed-form posteriors.

Where sampling is needed, populations are run many times at once, and the mean of what each estimates is compared with
the exact value in standard errors, which come from how much populations differ. Seeds are fixed; with the bound of 4.5
standard errors one comparison in 100,000 would fail on other seeds (normal; 1 in 30,000 for Student's t of 63).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import erf, log, pi, sqrt
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.func import vmap

import bmaml_ppl as bp
from bmaml_ppl.adaptation import Adapter, as_task_data
from bmaml_ppl.inference import smc
from bmaml_ppl.inference.derivatives import FirstOrder
from bmaml_ppl.inference.smc import SMCState, _move, _Population, _resample_evenly
from bmaml_ppl.types import Inference, LogDensity
from tests import toys

F64 = torch.float64
BOUND = 4.5


@dataclass(frozen=True)
class Parts:
    """A log density in the two parts that a task's has."""

    log_prior: LogDensity
    log_likelihood: LogDensity

    def log_parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prior(z), self.log_likelihood(z)

    def __call__(self, z: Tensor) -> Tensor:
        return self.log_prior(z) + self.log_likelihood(z)


def standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + log(2 * pi)).sum()


def normal_at_two(z: Tensor) -> Tensor:
    """A likelihood of sd 0.1: the posterior of a standard normal is N(2 / 1.01, 0.01 / 1.01)."""
    return -0.5 * ((z[0] - 2) / 0.1).square()


NARROW = Parts(standard_normal, normal_at_two)


def run(inference: Inference, density: LogDensity, start: Tensor, num_steps: int | None = None) -> SMCState:
    state = inference.init({"particles": start})
    for _ in range(inference.num_steps if num_steps is None else num_steps):
        state = inference.update(state, density)
    assert inference.measure is not None
    return inference.measure(state, density)


def populations(inference: Inference, density: LogDensity, starts: Tensor, seed: int = 0) -> SMCState:
    """Independent runs from starts (R, M, D), each with draws of its own."""
    torch.manual_seed(seed)
    found: SMCState = vmap(partial(run, inference, density), randomness="different")(starts)
    return found


def deviations(values: Tensor, exact: Tensor | float) -> Tensor:
    """Standard errors between the mean of R independent estimates, (R, ...), and the exact value."""
    return (values.mean(0) - exact) / (values.std(0) / len(values) ** 0.5)


def seeded(call: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return call()


@pytest.mark.parametrize(("num_particles", "threshold"), [(400, 0.5), (401, 0.8)])
def test_a_gaussian_posterior_and_its_evidence_are_recovered(num_particles: int, threshold: float) -> None:
    root = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=F64)
    design = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0], [1.0, 1.0, 1.0], [0.3, 0.0, 2.0]], dtype=F64)
    centre, y, noise = torch.tensor([1.0, -2.0, 0.5], dtype=F64), torch.tensor([2.0, -1.0, 0.0, 3.0], dtype=F64), 0.3
    prior = MultivariateNormal(centre, scale_tril=root, validate_args=False)
    density = Parts(prior.log_prob, lambda z: Normal(design @ z, noise, validate_args=False).log_prob(y).sum())
    covariance = torch.linalg.inv(torch.cholesky_inverse(root) + design.T @ design / noise**2)
    mean = covariance @ (torch.cholesky_inverse(root) @ centre + design.T @ y / noise**2)
    half = design @ root
    evidence = MultivariateNormal(design @ centre, half @ half.T + noise**2 * torch.eye(4, dtype=F64)).log_prob(y)

    starts = seeded(lambda: prior.sample((64, num_particles)), 1)
    state = populations(smc(num_particles=num_particles, num_steps=25, ess_threshold=threshold), density, starts)
    assert (state.temperature == 1).all()
    centred = state.particles - mean
    second = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    # Ten numbers: one false alarm in 3,000. Of the population a mean is known to .1 sd, of all 64 to .012.
    found = torch.cat(
        [
            deviations(state.particles.mean(1), mean),
            deviations(second.mean(1), covariance)[torch.tril_indices(3, 3).unbind()],
            deviations((state.log_evidence - evidence).exp(), 1.0).reshape(1),
        ]
    )
    assert found.abs().max() < BOUND
    assert (state.particles.mean(1) - mean).std(0).div(covariance.diagonal().sqrt()).max() < 3 / num_particles**0.5
    assert (state.log_evidence - evidence).std() < 0.3


def test_narrow_modes_keep_their_masses_and_widths() -> None:
    wide, shares = 5.0, torch.tensor([0.85, 0.15], dtype=F64)
    centres = torch.tensor([[-4.0, 3.0], [5.0, -2.0]], dtype=F64)
    widths = torch.tensor([[0.05, 0.05], [0.1, 0.02]], dtype=F64)

    def likelihood(z: Tensor) -> Tensor:
        return (shares.log() - (0.5 * ((z - centres) / widths).square() + widths.log()).sum(1)).logsumexp(0)

    density = Parts(lambda z: standard_normal(z / wide) - 2 * log(wide), likelihood)
    # Each mode is a product of Gaussians.
    masses = shares.log() + Normal(0.0, (wide**2 + widths**2).sqrt()).log_prob(centres).sum(1) + log(2 * pi)
    share, precision = masses.softmax(0), widths**-2 + wide**-2
    exact_sd, exact_mean = precision.rsqrt(), centres * widths**-2 / precision

    starts = seeded(lambda: wide * torch.randn(64, 1000, 2, dtype=F64), 1)
    state = populations(smc(num_particles=1000, num_steps=25), density, starts)
    assert (state.temperature == 1).all()
    right = (state.particles[..., 0] > 0).to(F64)
    assert deviations(right.mean(1), share[1].item()).abs() < BOUND
    assert right.mean(1).std() < 0.06
    assert deviations((state.log_evidence - masses.logsumexp(0)).exp(), 1.0).abs() < BOUND
    for mode in range(2):
        weight = right if mode else 1 - right
        z = (state.particles - exact_mean[mode]) / exact_sd[mode]
        moments = [(z**power * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True) for power in (1, 2)]
        assert deviations(moments[0], 0.0).abs().max() < BOUND
        assert deviations(moments[1], 1.0).abs().max() < BOUND


@pytest.mark.parametrize("num_particles", [6, 7])
def test_moves_leave_the_target_alone(num_particles: int) -> None:
    # Populations of exact, independent draws stay that after 20 moves. Differences of the whole population instead of
    # the other half's are 8 standard errors away here; eight numbers, one false alarm in 15,000.
    def target(z: Tensor) -> Tensor:
        left, right = (log(w / s) - 0.5 * ((z[0] - m) / s) ** 2 for w, m, s in ((0.3, -3.0, 0.5), (0.7, 1.0, 1.0)))
        return torch.logaddexp(left, right)

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        return z.new_zeros(len(z)), vmap(target)(z)

    def move(z: Tensor) -> Tensor:
        population = _Population(z, *evaluate(z))
        for _ in range(20):
            population, _ = _move(population, evaluate, torch.ones((), dtype=F64), torch.tensor(0.5, dtype=F64))
        return population.z

    torch.manual_seed(0)
    shape = (20_000, num_particles)
    left = torch.rand(shape, dtype=F64) < 0.3
    start = torch.where(left, -3 + 0.5 * torch.randn(shape, dtype=F64), 1 + torch.randn(shape, dtype=F64))
    z = vmap(move, randomness="different")(start.unsqueeze(-1)).squeeze(-1)
    below = 0.3 * 0.5 * (1 + erf(3 / sqrt(2))) + 0.7 * 0.5 * (1 + erf(-2.5 / sqrt(2)))
    centred = z + 0.2
    others = centred.sum(1).square() - centred.square().sum(1)
    estimates = (z.mean(1), z.square().mean(1), (z < -1.5).to(F64).mean(1), others)
    for values, exact in zip(estimates, (-0.2, 0.3 * 9.25 + 0.7 * 2, below, 0.0), strict=True):
        assert deviations(values, exact).abs() < BOUND
    assert (z != start).to(F64).mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("num", [6, 7, 101, 1000])
def test_systematic_resampling_is_exact(num: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    extreme = torch.zeros(num, dtype=dtype)
    extreme[num // 2] = 1.0
    for weights in (
        torch.softmax(torch.randn(num, dtype=dtype), 0),
        torch.softmax(30 * torch.randn(num, dtype=dtype), 0),
        torch.full((num,), 1 / num, dtype=dtype),
        extreme,
    ):
        index = vmap(lambda _, w=weights: _resample_evenly(w), randomness="different")(torch.zeros(4000))
        counts = torch.zeros(4000, num, dtype=F64).scatter_add(1, index, torch.ones(index.shape, dtype=F64))
        exact = num * weights.double() / weights.double().sum()
        assert (counts >= (exact - 1e-9).floor()).all()
        assert (counts <= (exact + 1e-9).ceil()).all()
        # Unbiased: a count is a Bernoulli beyond its floor; at most 2,000 of them, one false alarm in 50.
        part = exact - exact.floor()
        error = (part * (1 - part) / 4000).sqrt()
        assert ((counts.mean(0) - exact).abs() < 5 * error + 2e-3).all()


@pytest.mark.parametrize("offset", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_slot_falls_to_weights_of_zero(offset: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # With float32 sums the last particle had one of the slots where the offset is close to 1.
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.tensor(offset, dtype=options["dtype"]))
    weights = torch.softmax(torch.randn(1000, dtype=dtype), 0)
    weights[:3] = 0
    weights[-3:] = 0
    index = _resample_evenly(weights)
    assert index.min() >= 3
    assert index.max() <= 996
    assert torch.equal(index, index.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equal_weights_leave_a_population_as_it_is(dtype: torch.dtype) -> None:
    for num in (6, 7, 1000, 30_000):
        assert torch.equal(_resample_evenly(torch.full((num,), 1 / num, dtype=dtype)), torch.arange(num))


def _share(log_weights: Tensor) -> float:
    weights = log_weights.double().softmax(0)
    return float(1 / weights.square().sum() / len(weights))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_temperatures_rise_as_far_as_weights_stay_even(threshold: float, dtype: torch.dtype) -> None:
    inference = smc(num_particles=301, num_moves=2, ess_threshold=threshold)
    torch.manual_seed(0)
    state, shares, evidence = inference.init({"particles": torch.randn(301, 2, dtype=dtype)}), [], 0.0
    for _ in range(200):
        before, state = state, inference.update(state, NARROW)
        log_weights = (state.temperature - before.temperature) * vmap(normal_at_two)(before.particles)
        shares.append(_share(log_weights))
        evidence += float(log_weights.double().logsumexp(0)) - log(301)
        if state.temperature == 1:
            break
        assert before.temperature < state.temperature < 1
    assert state.temperature == 1
    assert shares[:-1] == pytest.approx([threshold] * (len(shares) - 1), abs=2e-3)
    assert shares[-1] >= threshold - 2e-3
    assert len(shares) >= 3
    assert state.smallest_ess.item() == pytest.approx(min(shares), abs=1e-3)
    assert state.log_evidence.item() == pytest.approx(evidence, abs=1e-3)
    later = inference.update(state, NARROW)
    assert later.temperature == 1
    assert torch.equal(later.log_evidence, state.log_evidence) or dtype == torch.float32
    assert not torch.equal(later.particles, state.particles)
    assert all(value.dtype == dtype for value in later)


@pytest.mark.parametrize("num_steps", [0, 2])
def test_too_few_steps_end_with_one_reweighting(num_steps: int) -> None:
    inference = smc(num_particles=501, num_moves=1)
    assert inference.measure is not None
    torch.manual_seed(0)
    state = inference.init({"particles": torch.randn(501, 1, dtype=F64)})
    for _ in range(num_steps):
        state = inference.update(state, NARROW)
    assert state.temperature < 1
    log_weights = (1 - state.temperature) * vmap(normal_at_two)(state.particles)
    end = inference.measure(state, NARROW)
    # Copies that have not moved since they were drawn cannot be told apart: each of them has its share, rounded.
    copies = (state.particles == state.particles.T).to(F64)
    counts, exact = (end.particles == state.particles.T).to(F64).sum(0), 501 * copies @ log_weights.softmax(0)
    assert ((counts - exact).abs() < copies.sum(0)).all()
    assert end.temperature == 1
    assert end.smallest_ess.item() == pytest.approx(_share(log_weights))
    change = (end.log_evidence - state.log_evidence).item()
    assert change == pytest.approx((log_weights.logsumexp(0) - log(501)).item())
    again = inference.measure(end, NARROW)
    assert torch.equal(again.particles, end.particles)
    assert again.log_evidence.item() == pytest.approx(end.log_evidence.item())


def test_acceptance_is_that_of_the_moves_and_steers_their_length() -> None:
    state = populations(smc(num_particles=200, num_steps=30), NARROW, seeded(lambda: torch.randn(20, 200, 1), 1))
    assert state.acceptance_rate.mean().item() == pytest.approx(0.25, abs=0.03)
    assert (state.log_scale.exp() > 1).all()


@pytest.mark.parametrize("outside", [-torch.inf, torch.nan])
def test_likelihoods_of_zero_cut_the_prior(outside: float) -> None:
    # A prior N(0, 1) known to lie in [1, 3]: two moments and the evidence, in populations of 300 that begin with 48 in.
    def inside(z: Tensor) -> Tensor:
        return torch.where((z[0] > 1) & (z[0] < 3), 0.0 * z[0], outside)

    normal = Normal(torch.zeros((), dtype=F64), 1.0)
    low, high = torch.tensor([1.0, 3.0], dtype=F64)
    evidence = normal.cdf(high) - normal.cdf(low)
    slopes = [normal.log_prob(at).exp() for at in (low, high)]
    mean = (slopes[0] - slopes[1]) / evidence
    second = 1 + (low * slopes[0] - high * slopes[1]) / evidence
    state = populations(
        smc(num_particles=300, num_steps=10), Parts(standard_normal, inside), seeded(lambda: torch.randn(64, 300, 1), 1)
    )
    assert (state.particles > 1).all()
    assert (state.particles < 3).all()
    assert (state.temperature == 1).all()
    z = state.particles.squeeze(-1).double()
    assert deviations(z.mean(1), mean).abs() < BOUND
    assert deviations(z.square().mean(1), second).abs() < BOUND
    assert deviations(state.log_evidence.double().exp(), evidence).abs() < BOUND
    assert state.smallest_ess.mean().item() == pytest.approx(evidence.item(), abs=0.02)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_likelihood_of_zero_everywhere_is_no_posterior(value: float) -> None:
    inference = smc(num_particles=20, num_steps=3)
    start = seeded(lambda: torch.randn(20, 2))
    state = run(inference, Parts(standard_normal, lambda z: 0 * z[0] + value), start)
    assert torch.equal(state.particles.sort(0).values, start.sort(0).values)
    assert state.log_evidence == -torch.inf
    assert state.smallest_ess == 0


def test_steps_can_go_on_where_a_particle_has_become_impossible() -> None:
    # As in data other than those adapted to: at the temperature 1 nothing is weighed any more.
    inference = smc(num_particles=20, num_steps=0)
    state = run(inference, Parts(standard_normal, lambda z: 0 * z[0]), seeded(lambda: torch.randn(20, 1)))
    cut = Parts(standard_normal, lambda z: torch.where(z[0] > 0, 0 * z[0], -torch.inf))
    for _ in range(20):
        state = inference.update(state, cut)
    assert state.log_evidence.abs() < 1e-5
    assert state.smallest_ess == 1
    assert (state.particles > 0).all()


def test_first_order_densities_are_the_exact_ones() -> None:
    start = seeded(lambda: torch.randn(30, 1, dtype=F64))
    inference = smc(num_particles=30, num_steps=4)
    exact, first = (seeded(partial(run, inference, density, start)) for density in (NARROW, FirstOrder(NARROW)))
    for left, right in zip(exact, first, strict=True):
        assert torch.equal(left, right)


def test_outer_gradients_see_constants() -> None:
    start, level = torch.randn(30, 1, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    density = Parts(standard_normal, lambda z: -0.5 * ((z[0] - level) / 0.1).square())
    state = run(smc(num_particles=30, num_steps=2), density, start)
    assert not any(value.requires_grad for value in state)


@pytest.fixture(scope="module")
def prior() -> bp.LearnedPrior:
    tasks = toys.level_tasks(20, 5).to(dtype=F64)
    inference = smc(num_particles=50, num_steps=6, num_moves=2)
    return bp.meta_learn(
        toys.level, tasks, num_support=2, num_steps=1, inference=inference, compile=False, progress=False
    )


def _ragged(num_tasks: int) -> bp.Tasks:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(1 + i % 6, generator=generator, dtype=F64) + 2 * (i % 3) for i in range(num_tasks)]
    return bp.Tasks.from_list([{"x": torch.zeros_like(y), "y": y} for y in rows], outputs=("y",))


def test_ragged_tasks_of_a_pyro_model_are_exact(prior: bp.LearnedPrior) -> None:
    # Tasks share their draws, so that their errors do too: a mean's is about .03 sd, the evidence's .04 nats.
    tasks = _ragged(24)
    posterior = prior.adapt(tasks, inference=smc(num_particles=2000, num_steps=15))
    a, found = posterior.sites(2000)["a"], posterior.diagnostics()
    for i in range(len(tasks)):
        y = tasks.data["y"][i][tasks.with_mask().mask[i]]  # type: ignore[index]
        mean, sd, noise = (prior.params[name] for name in ("mean", "sd", "noise"))
        precision = sd**-2 + len(y) * noise**-2
        exact = (mean * sd**-2 + y.sum() * noise**-2) / precision
        assert ((a[:, i].mean() - exact) * precision.sqrt()).abs() < 0.15
        assert (a[:, i].std() * precision.sqrt() - 1).abs() < 0.12
        covariance = sd**2 + noise**2 * torch.eye(len(y), dtype=F64)
        evidence = MultivariateNormal(mean.expand(len(y)), covariance).log_prob(y)
        assert found["log_evidence"][i].item() == pytest.approx(evidence.item(), abs=0.2)


def test_a_task_depends_neither_on_the_others_nor_on_padding(prior: bp.LearnedPrior) -> None:
    tasks = _ragged(5)
    together = prior.adapt(tasks)
    for i in range(5):
        alone = prior.adapt(tasks[i : i + 1])
        for name, value in alone.state._asdict().items():
            torch.testing.assert_close(getattr(together.state, name)[i], value[0])


def test_recorded_is_eager_and_a_seed_is_a_posterior(prior: bp.LearnedPrior) -> None:
    tasks = toys.level_tasks(4, 3, seed=1).to(dtype=F64)
    eager = prior.adapt(tasks, compile=False)
    first, recorded, again = (prior.adapt(tasks) for _ in range(3))
    other = prior.adapt(tasks, seed=1)
    for posterior in (first, recorded, again):
        for left, right in zip(eager.state, posterior.state, strict=True):
            assert torch.equal(left, right)
    assert not torch.equal(other.particles, eager.particles)


def test_fewer_draws_than_particles_are_different_ones(prior: bp.LearnedPrior) -> None:
    posterior = prior.adapt(toys.level_tasks(2, 3, seed=1), compile=False)
    drawn, particles = posterior.draws(20)[:, 0, 0], posterior.particles[0, :, 0]
    assert len(drawn.unique()) == 20
    assert torch.isin(drawn, particles).all()
    assert torch.equal(posterior.draws(50), posterior.draws())


def test_restarts_are_compared(prior: bp.LearnedPrior) -> None:
    inference = smc(num_particles=100, num_steps=5)
    posterior = prior.adapt(toys.level_tasks(2, 3, seed=1), inference=inference, num_restarts=2, compile=False)
    assert posterior.num_chains == 2
    assert not torch.equal(*(state.particles for state in posterior.states))


def test_a_prior_learned_with_smc_comes_back_from_a_file(prior: bp.LearnedPrior, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior.safetensors")
    again = bp.load_prior(tmp_path / "prior.safetensors", toys.level)
    assert again.inference.config == prior.inference.config
    tasks = toys.level_tasks(2, 3, seed=1)
    first, second = (each.adapt(tasks, compile=False).state for each in (prior, again))
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left, right)


def test_updates_of_a_model_with_bounded_latents_are_recorded() -> None:
    # vmap writes out the name of what it maps, and a bounded support's holds tensors.
    def bounded(x: Tensor, y: Tensor | None = None) -> None:
        share = pyro.sample("share", dist.Uniform(torch.zeros(()), pyro.param("end", torch.tensor(2.0))))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(share, 0.1), obs=y)

    tasks = toys.level_tasks(2, 3)
    adapter = toys.bind(bounded, tasks, smc(num_particles=8, num_moves=1), "prior", recorded=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        state = adapter.adapt(adapter.density.prior, as_task_data(tasks), 1)
    graphs = [graph for step in adapter.steps().values() for graph in step.graphs.values()]
    assert len(graphs) == 3
    assert None not in graphs
    assert state.particles.isfinite().all()


def test_tasks_can_have_draws_of_their_own(prior: bp.LearnedPrior) -> None:
    same = as_task_data(toys.level_tasks(1, 4).to(dtype=F64))
    twin = same._replace(data={name: value.expand(2, -1) for name, value in same.data.items()})
    for randomness, equal in (("same", True), ("different", False)):
        torch.manual_seed(0)
        state = Adapter(prior.density, prior.inference, "prior", randomness=randomness).adapt(prior.params, twin)  # type: ignore[arg-type]
        assert torch.equal(state.particles[0], state.particles[1]) is equal


def test_marginal_nll_finds_the_maximum_likelihood_of_a_hierarchy() -> None:
    # Of 40 tasks of 6 observations, in closed form: between and within sums of squares.
    tasks = toys.level_tasks(40, 6)
    y = tasks.data["y"]
    within, between = y.var(1, correction=1).mean(), y.mean(1).var(correction=0)
    exact = {"mean": y.mean(), "sd": (between - within / 6).sqrt(), "noise": within.sqrt()}
    learned = bp.meta_learn(
        toys.level, tasks, num_support=3, num_steps=150, batch_size=40, progress=False,
        inference=smc(num_particles=40, num_steps=6, num_moves=2),
    )  # fmt: skip
    # The likelihood's standard errors are .16, .11 and .025.
    for name, tolerance in (("mean", 0.05), ("sd", 0.05), ("noise", 0.02)):
        assert learned.params[name].item() == pytest.approx(exact[name].item(), abs=tolerance)
    assert learned.start == "prior"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_particles": 5}, ValueError, "num_particles=5 must be at least 6"),
        ({"num_particles": 10.0}, TypeError, "num_particles=10.0 is float"),
        ({"num_steps": -1}, ValueError, "num_steps=-1 must be at least 0"),
        ({"num_moves": 0}, ValueError, "num_moves=0 must be at least 1"),
        ({"ess_threshold": 0.0}, ValueError, r"ess_threshold=0.0 is a share in \(0, 1\)"),
        ({"ess_threshold": 1.0}, ValueError, r"ess_threshold=1.0 is a share in \(0, 1\)"),
        ({"ess_threshold": float("nan")}, ValueError, "ess_threshold=nan"),
        ({"init": "free"}, ValueError, "init='free' is not possible.*write init=\"prior\""),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        smc(**settings)
