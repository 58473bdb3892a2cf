"""What a learned prior promises: one task alone is as good as in a batch, units, seeds, and zero-shot predictions."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bmaml_ppl as bp
from bmaml_ppl.compile import CompileFailed
from bmaml_ppl.inference import hmc, map_estimate, svgd
from bmaml_ppl.types import Inference
from tests import toys

NAMES = ("a", "b", "c", "d")
LENGTHS = (4, 6, 3, 5)


def line(x: Tensor, dose: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.param("mean", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
    coef = pyro.sample("coef", dist.Normal(mean, scale).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    mean = pyro.deterministic("curve", coef[0] + coef[1] * x + dose)
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(mean, noise), obs=y)


def joint(x: Tensor, y: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    pyro.sample("obs", dist.Normal(level + 0 * x, 1.0).to_event(1), obs=y)


def level(x: Tensor, y: Tensor | None = None) -> None:
    top = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(top + 0 * x, 0.5), obs=y)


def make_tasks(lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float64) -> bp.Tasks:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, n in enumerate(lengths):
        x = torch.randn(n, generator=generator, dtype=dtype)
        y = 20 + 3 * x + i + torch.randn(n, generator=generator, dtype=dtype)
        rows.append({"x": x, "y": y, "dose": torch.tensor(0.1 * i, dtype=dtype)})
    return bp.Tasks.from_list(rows, outputs=["y"], constants=["dose"], names=NAMES[: len(lengths)])


small = svgd(num_particles=5, num_steps=6)
learn = partial(bp.meta_learn, num_support=2, num_steps=2, compile=False, progress=False, inference=small)


@pytest.fixture(scope="module")
def prior() -> bp.LearnedPrior:
    return learn(line, make_tasks().standardize())


def flat_tasks(num: int = 3, length: int = 4) -> bp.Tasks:
    x = torch.zeros(num, length)
    return bp.Tasks({"x": x, "y": torch.randn(num, length, generator=torch.Generator().manual_seed(0))}, outputs=("y",))


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(-9.0), b[k].nan_to_num(-9.0)) for k in a)


@pytest.mark.parametrize("inference", [small, map_estimate(num_particles=2, init="prior")], ids=["svgd", "map"])
def test_one_task_alone_is_as_in_a_ragged_batch(prior: bp.LearnedPrior, inference: Inference) -> None:
    tasks = make_tasks()
    batch = prior.adapt(tasks, inference=inference)
    assert tasks.mask is not None
    assert batch.particles.shape == (4, inference.num_particles, 3)
    for name in NAMES:
        one = tasks[name]
        alone = prior.adapt(one, inference=inference)
        given: dict[str, Any] = {k: v[0] for k, v in {**one.data, **one.constants}.items()}
        as_tensors = prior.adapt(inference=inference, **given)
        assert torch.allclose(batch[name].particles, alone.particles[0], rtol=1e-8, atol=1e-10)
        assert torch.allclose(batch[name].particles, as_tensors.particles, rtol=1e-8, atol=1e-10)


def test_tensors_of_a_batch_are_as_good_as_tasks(prior: bp.LearnedPrior) -> None:
    tasks = make_tasks((4, 4, 4))
    whole = prior.adapt(tasks)
    given: dict[str, Any] = {**tasks.data, **tasks.constants}
    tensors = prior.adapt(**given)
    assert torch.equal(whole.particles, tensors.particles)
    assert not tensors.single
    assert tensors.names == ("task 0", "task 1", "task 2")


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 100])
def test_chunks_change_nothing(prior: bp.LearnedPrior, chunk_size: int) -> None:
    tasks = make_tasks()
    chunked = prior.adapt(tasks, chunk_size=chunk_size)
    assert torch.allclose(chunked.particles, prior.adapt(tasks).particles, rtol=1e-9, atol=1e-12)
    assert chunked.names == NAMES


@pytest.mark.parametrize("settings", [{"chunk_size": 0}, {"chunk_size": -1}, {"num_steps": -1}])
def test_impossible_sizes_are_refused(prior: bp.LearnedPrior, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* must be at least"):
        prior.adapt(make_tasks(), **settings)


@pytest.mark.parametrize("settings", [{"chunk_size": 2.5}, {"num_steps": 2.5}, {"num_steps": "3"}, {"num_steps": True}])
def test_sizes_that_are_no_integers_are_refused(prior: bp.LearnedPrior, settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(settings))}=.* give a whole number"):
        prior.adapt(make_tasks(), **settings)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_no_draws_are_refused(prior: bp.LearnedPrior, num_samples: int) -> None:
    for method in (prior.predict, prior.sites, prior.to_arviz):
        with pytest.raises(ValueError, match=f"num_samples={num_samples} must be at least 1"):
            method(make_tasks(), num_samples=num_samples)
    with pytest.raises(TypeError, match="num_samples=1.5 is float"):
        prior.predict(make_tasks(), num_samples=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"x": [0.0], "y": [1.0], "dose": 0.0}, [make_tasks()], "tasks"])
def test_what_is_not_tasks_is_refused(prior: bp.LearnedPrior, given: Any) -> None:
    with pytest.raises(TypeError, match="where Tasks are expected; give keyword tensors, x=..., y=..., dose=..."):
        prior.adapt(given)
    with pytest.raises(TypeError, match="where Tasks are expected"):
        prior.predict(given)


def test_values_that_are_no_numbers_are_refused(prior: bp.LearnedPrior) -> None:
    with pytest.raises(TypeError, match="'y' holds .* give numbers"):
        prior.adapt(x=[0.0, 1.0], y=["low", "high"], dose=0.0)
    with pytest.raises(ValueError, match="'y' holds lists of different lengths.*Tasks.from_list"):
        prior.adapt(x=[[0.0, 1.0], [0.0, 1.0]], y=[[0.0, 1.0], [0.0]], dose=[0.0, 0.0])


def waiting(x: Tensor, y: Tensor | None = None) -> None:
    rate = pyro.sample("rate", dist.Gamma(pyro.param("shape", torch.ones(())), 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Exponential(rate * torch.ones_like(x)), obs=y)


def test_observations_outside_their_support_are_refused_by_task() -> None:
    tasks = flat_tasks()
    prior = learn(waiting, replace(tasks, data={**tasks.data, "y": tasks.data["y"].abs() + 0.1}))
    y = torch.tensor([[1.0, 2.0], [1.0, -2.0]])
    for _ in range(3):  # recorded adaptation too
        prior.adapt(x=torch.zeros(2, 2), y=y.abs())
        with pytest.raises(ValueError, match="'obs' is Exponential.* of task 'task 1' holds -2.0"):
            prior.adapt(x=torch.zeros(2, 2), y=y)


def test_repr_is_one_line(prior: bp.LearnedPrior) -> None:
    assert repr(prior) == "LearnedPrior(sites: coef, noise; learned for 2 shots; svgd, 5 particles, prior start)"
    many = replace(prior, num_support=range(2, 5))
    assert "learned for 2 to 4 shots" in repr(many)


@pytest.mark.parametrize("inference", [small, map_estimate(num_particles=2, init="prior")], ids=["svgd", "map"])
@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4)], ids=["masked", "whole"])
def test_a_recorded_adaptation_is_the_eager_one(inference: Inference, lengths: tuple[int, ...]) -> None:
    fresh = learn(line, make_tasks().standardize())
    tasks = make_tasks(lengths)
    other = replace(tasks, data={k: 0.5 * v for k, v in tasks.data.items()})
    eager = [fresh.adapt(tasks, inference=inference, seed=3).particles]
    assert not fresh._adapters.recorded
    eager.append(replace(fresh).adapt(other, inference=inference, seed=4).particles)
    again = [
        fresh.adapt(tasks, inference=inference, seed=3).particles,
        fresh.adapt(other, inference=inference, seed=4).particles,
    ]
    (recorded,) = fresh._adapters.recorded.values()
    update: Any = recorded._update
    assert [graph is not None for graph in update.graphs.values()] == [True]
    for expected, found in zip(eager, again, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
    shifted = fresh.params | {"mean": fresh.params["mean"] + 1}
    moved = replace(fresh, params=shifted).adapt(tasks, inference=inference, seed=3).particles
    fresh.params.update(shifted)
    assert torch.allclose(fresh.adapt(tasks, inference=inference, seed=3).particles, moved, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("inference", [small, hmc(num_chains=2, num_warmup=5, num_draws=5)], ids=["svgd", "hmc"])
def test_a_compiled_adaptation_is_the_eager_one(inference: Inference) -> None:
    fresh = learn(line, make_tasks().standardize())
    eager, compiled = (
        fresh.adapt(make_tasks(), inference=inference, chunk_size=3, compile=compile).particles
        for compile in (False, True)
    )
    assert torch.allclose(compiled, eager, rtol=1e-8, atol=1e-10)
    assert not fresh._adapters.recorded
    (adapter,) = fresh._adapters.compiled.values()
    update: Any = adapter._update
    assert len(update._programs) == 1  # one for all parts
    assert not any(isinstance(program, torch.fx.GraphModule) for program in update._programs.values())


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_step_that_was_compiled_wrongly_is_not_used(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(graph: Any, given: list[Tensor]) -> Any:
        return lambda *values: [factor * x if x.is_floating_point() else x for x in graph(*values)]

    monkeypatch.setattr("bmaml_ppl.compile.lower", lower)
    fresh = learn(line, make_tasks().standardize())
    with pytest.warns(CompileFailed, match="what was compiled differs by ([0-9.]+e-0[23]|inf)"):
        compiled = fresh.adapt(make_tasks(), compile=True)
    assert torch.allclose(compiled.particles, fresh.adapt(make_tasks(), compile=False).particles, rtol=1e-9, atol=1e-11)


def test_only_so_many_layouts_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmaml_ppl.adapters._MOST_RECORDED", 1)
    monkeypatch.setattr("bmaml_ppl.adapters._MOST_SEEN", 2)
    fresh = learn(level, flat_tasks())
    for length in (2, 3, 4, 5, 2, 3, 4):
        fresh.adapt(flat_tasks(1, length), num_steps=1)
    assert len(fresh._adapters.recorded) == 1
    assert len(fresh._adapters.seen) == 2


def test_a_model_that_cannot_be_recorded_adapts_in_silence() -> None:
    fresh = learn(line, make_tasks().standardize())
    first = fresh.adapt(make_tasks())

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no graph")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bmaml_ppl.compile.make_fx", broken)
        assert torch.equal(fresh.adapt(make_tasks()).particles, first.particles)


def test_who_asks_for_compilation_is_told_that_it_failed() -> None:
    fresh = learn(line, make_tasks().standardize())

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no graph")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bmaml_ppl.compile.make_fx", broken)
        with pytest.warns(UserWarning, match="could not be recorded and runs eagerly .*no graph"):
            fresh.adapt(make_tasks(), compile=True)


def test_what_compile_asks_for_does_not_use_up_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmaml_ppl.adapters._MOST_RECORDED", 1)
    monkeypatch.setattr("bmaml_ppl.compile.lower", lambda graph, given: graph)
    fresh = learn(level, flat_tasks())
    for length in (2, 3):
        for compile in (False, True):
            fresh.adapt(flat_tasks(1, length), num_steps=1, compile=compile)
    assert len(fresh._adapters.compiled) == 1
    for _ in range(2):
        fresh.adapt(flat_tasks(1, 2), num_steps=1)
    assert len(fresh._adapters.recorded) == 1


def test_no_steps_leave_the_start(prior: bp.LearnedPrior) -> None:
    start = prior.adapt(make_tasks(), num_steps=0)
    assert torch.equal(start.particles[0], start.particles[3])
    assert not torch.equal(start.particles, prior.adapt(make_tasks(), num_steps=1).particles)


def test_standardised_is_the_same_as_standardised_by_hand(prior: bp.LearnedPrior) -> None:
    tasks = make_tasks()
    standard = tasks.standardize()
    scaling = standard.scaling
    assert scaling is not None
    by_hand = learn(line, standard.scaled())
    for name, value in prior.params.items():
        assert torch.allclose(by_hand.params[name], value, rtol=1e-9)
    ours = prior.adapt(tasks).predict(num_samples=7)
    theirs = by_hand.adapt(standard.scaled()).predict(num_samples=7)
    rescaled = theirs["obs"] * scaling.scale["y"] + scaling.loc["y"]
    assert torch.allclose(ours["obs"], rescaled, rtol=1e-9, equal_nan=True)
    assert torch.allclose(ours["curve"], theirs["curve"], rtol=1e-9)
    zero_shot = by_hand.predict(standard.scaled(), num_samples=7)["obs"] * scaling.scale["y"] + scaling.loc["y"]
    assert torch.allclose(prior.predict(tasks, num_samples=7)["obs"], zero_shot, rtol=1e-9, equal_nan=True)


def test_scaling_of_test_tasks_is_not_taken_for_the_priors(prior: bp.LearnedPrior) -> None:
    chosen = make_tasks()[["a", "b"]]
    assert torch.equal(prior.adapt(chosen).particles, prior.adapt(chosen.standardize()).particles)


def test_zero_shot_prediction_has_the_hierarchys_moments() -> None:
    # level ~ N(0, 1) and noise sd 0.5, N = D = 1: variance 1.25 if the two are independent.
    prior = learn(level, flat_tasks(), num_steps=0)
    num = 20_000
    draws = prior.predict(x=torch.zeros(1), num_samples=num)["obs"]
    assert draws.shape == (num, 1)
    assert abs(draws.mean()) < 4.5 * math.sqrt(1.25 / num)
    assert abs(draws.var() / 1.25 - 1) < 4.5 * math.sqrt(2 / num)  # both together: false-alarm rate 1.4e-5
    assert torch.equal(prior.predict(x=torch.zeros(2, 1), num_samples=3)["obs"].isnan(), torch.zeros(3, 2, 1).bool())


def test_prior_sites_are_those_under_the_prediction(prior: bp.LearnedPrior) -> None:
    tasks = make_tasks()
    sites, predicted = prior.sites(tasks, num_samples=6), prior.predict(tasks, num_samples=6)
    assert sites["coef"].shape == (6, 4, 2)
    assert bool((sites["noise"] > 0).all())
    scaled = tasks.standardize().scaled()
    line_of = sites["coef"][..., :1] + sites["coef"][..., 1:] * scaled.data["x"] + scaled.constants["dose"][:, None]
    assert torch.allclose(predicted["curve"], line_of)
    assert prior.sites(x=scaled.data["x"][0], dose=torch.zeros(()), num_samples=6)["coef"].shape == (6, 2)


def test_same_seed_same_result_whatever_the_users_generator(prior: bp.LearnedPrior) -> None:
    torch.manual_seed(77)
    before = torch.get_rng_state()
    tasks = make_tasks()
    again = learn(line, tasks.standardize())
    one, two = (p.adapt(tasks).predict(num_samples=4) for p in (prior, again))
    again.predict(tasks, num_samples=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(pyro.get_param_store()) == 0
    assert equal(prior.params, again.params)
    assert equal(one, two)
    assert not torch.equal(prior.adapt(tasks, seed=1).particles, prior.adapt(tasks).particles)


def test_initial_values_that_a_model_draws_follow_the_seed() -> None:
    def drawn(x: Tensor, y: Tensor | None = None) -> None:
        start = pyro.param("start", lambda: torch.randn(()))
        top = pyro.sample("level", dist.Normal(start, 1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(top + 0 * x, 0.5), obs=y)

    starts = []
    for users, ours in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(users)
        starts.append(learn(drawn, flat_tasks(), num_steps=0, seed=ours).params["start"].item())
    assert starts[0] == starts[1] != starts[2]


def test_non_finite_adaptation_names_the_tasks(prior: bp.LearnedPrior) -> None:
    tasks = make_tasks()
    tasks.data["x"][1, 0] = 1e8
    plain = svgd(num_particles=5, num_steps=60, preconditioner="none", step_size=0.01, init="prior")
    with pytest.raises(ValueError, match=r"non-finite for 1 of 4 tasks, first \['b'\]; use fewer or shorter steps"):
        prior.adapt(tasks, inference=plain)


def test_wrong_keys_are_named(prior: bp.LearnedPrior) -> None:
    x, y = torch.zeros(3), torch.zeros(3)
    with pytest.raises(ValueError, match="unknown data key 'dosis'.*did you mean 'dose'"):
        prior.adapt(x=x, y=y, dosis=0.0)
    with pytest.raises(ValueError, match=r"missing data \['dose'\]"):
        prior.adapt(x=x, y=y)
    with pytest.raises(ValueError, match=r"missing data \['y'\]"):
        prior.adapt(x=x, y=None, dose=0.0)
    with pytest.raises(ValueError, match=r"missing data \['dose', 'x'\]; give all of \['dose', 'x'\]"):
        prior.predict()


def test_ragged_tasks_need_a_plate() -> None:
    prior = learn(joint, flat_tasks(), num_steps=0)
    assert prior.adapt(flat_tasks()).particles.shape == (3, 5, 1)
    ragged = bp.Tasks.from_list([{"x": torch.zeros(n), "y": torch.ones(n)} for n in (2, 3)], outputs=["y"])
    with pytest.raises(ValueError, match="observed site 'obs' has no plate over observations"):
        prior.adapt(ragged)


def test_another_inference_must_fit_what_was_learned(prior: bp.LearnedPrior) -> None:
    with pytest.raises(ValueError, match=r"learns 'step_size' of shape \(3,\), this prior has none"):
        prior.adapt(make_tasks(), inference=svgd(num_particles=5, learn_step_size="parameter"))
    with pytest.raises(ValueError, match="a free start needs 7 learned particles, this prior has none"):
        prior.adapt(make_tasks(), inference=svgd(num_particles=7, init="free"))
    assert prior.adapt(make_tasks(), inference=svgd(num_particles=7)).particles.shape == (4, 7, 3)


def test_moves_to_another_dtype(prior: bp.LearnedPrior) -> None:
    single = prior.to(dtype=torch.float32)
    particles = single.adapt(make_tasks()).particles
    assert particles.dtype == torch.float32
    assert torch.allclose(particles.double(), prior.adapt(make_tasks()).particles, rtol=0.05, atol=0.05)


def test_an_inference_of_one_task_is_refused_in_a_batch() -> None:
    tasks = toys.level_tasks(3, 4)
    prior = bp.meta_learn(toys.level, tasks, num_support=2, num_steps=1, compile=False, progress=False)
    alone = svgd()._replace(name="nuts")
    with pytest.raises(ValueError, match=r"nuts does not run in a batch"):
        prior.adapt(tasks, inference=alone)
