"""The outer loop: what it recovers, that it repeats itself, and what it says when something is wrong."""

from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bmaml_ppl import LearnedPrior, Tasks, load_prior, meta_learn
from bmaml_ppl.inference import map_estimate, svgd
from bmaml_ppl.loop import MetaStep, StoppedEarly
from bmaml_ppl.objectives import Objective, chaser, query_nll
from tests.toys import level, level_tasks, line, line_tasks, straight

quick = partial(meta_learn, num_support=3, progress=False, compile=False)
NEWTON = svgd(num_particles=6, num_steps=3)


def assert_same(one: LearnedPrior, other: LearnedPrior) -> None:
    assert one.params.keys() == other.params.keys()
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)


def test_a_known_hierarchy_is_recovered() -> None:
    """Truth: mean 0, sd 1, noise 0.5, posterior sd 0.277 from 3 observations; each within 10 % (of the sd)."""
    tasks = level_tasks(400, 13)
    prior = meta_learn(level, tasks, num_support=3, num_steps=200, batch_size=50, progress=False)
    a, y = tasks.data["y"].mean(1), tasks.data["y"]
    assert prior.start == "prior"
    assert abs(prior.params["mean"] - a.mean()) < 0.1
    assert abs(prior.params["sd"] - 1) < 0.1
    assert abs(prior.params["noise"] - 0.5) < 0.05
    posterior = prior.adapt(x=torch.zeros(400, 3), y=y[:, :3])
    spread = posterior.particles.std(1, correction=0).mean()
    assert abs(spread - 0.277) < 0.0277


def em_mixed_model(design: np.ndarray, y: np.ndarray, steps: int = 400) -> tuple[np.ndarray, np.ndarray, float]:
    """Maximum likelihood of the linear mixed model by EM: mean, covariance, noise variance."""
    mean, cov, noise = np.zeros(2), np.eye(2), 1.0
    for _ in range(steps):
        post = [np.linalg.inv(np.linalg.inv(cov) + x.T @ x / noise) for x in design]
        means = np.stack(
            [c @ (np.linalg.solve(cov, mean) + x.T @ t / noise) for c, x, t in zip(post, design, y, strict=True)]
        )
        residual = sum(
            ((t - x @ m) ** 2).sum() + np.trace(x @ c @ x.T) for c, x, t, m in zip(post, design, y, means, strict=True)
        )
        mean, noise = means.mean(0), float(residual) / y.size
        cov = np.mean(post, 0) + (means - mean).T @ (means - mean) / len(y)
    return mean, cov, noise


def test_the_defaults_are_the_linear_mixed_model() -> None:
    """The learned prior of a random-slope model is its maximum likelihood, within 5 % of the prior's sd."""
    tasks = line_tasks(40, 6, seed=3)
    prior = meta_learn(straight, tasks, num_support=3, num_steps=150, batch_size=40, progress=False)
    x, y = tasks.data["x"].double().numpy(), tasks.data["y"].double().numpy()
    mean, cov, noise = em_mixed_model(np.stack([np.ones_like(x), x], -1), y)
    learned = prior.params["scale_tril"].double()
    np.testing.assert_allclose(prior.params["mean"], mean, atol=0.05)
    np.testing.assert_allclose(learned @ learned.T, cov, atol=0.06)
    np.testing.assert_allclose(prior.params["noise"], noise**0.5, rtol=0.03)


def test_the_same_seed_gives_the_same_prior_bit_for_bit() -> None:
    tasks = level_tasks(12, 6)
    one, same, other = (quick(level, tasks, inference=NEWTON, num_steps=4, seed=s) for s in (5, 5, 6))
    assert_same(one, same)
    assert not torch.equal(one.params["mean"], other.params["mean"])


def test_global_state_is_left_alone() -> None:
    pyro.param("mean", torch.tensor(7.0))
    before = torch.get_rng_state()
    prior = quick(level, level_tasks(12, 6), inference=NEWTON, num_steps=2)
    assert torch.equal(before, torch.get_rng_state())
    assert pyro.param("mean") == 7.0
    assert set(pyro.get_param_store().keys()) == {"mean"}
    assert prior.params["mean"] != 7.0


@pytest.mark.parametrize("objective", [None, chaser(2) + query_nll()])
def test_a_recorded_run_is_the_eager_run(objective: Objective | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmaml_ppl.compile._WORTH_RECORDING", 4)
    torch.set_default_dtype(torch.float64)
    tasks = level_tasks(12, 6)
    run = partial(meta_learn, level, tasks, num_support=3, inference=NEWTON, objective=objective, num_steps=4)
    eager, recorded = run(compile=False, progress=False), run(compile="auto", progress=False)
    for name, value in eager.params.items():
        torch.testing.assert_close(recorded.params[name], value, rtol=1e-9, atol=1e-9)


def test_ragged_tasks_and_random_shots() -> None:
    tasks = level_tasks(9, 8)
    mask = torch.arange(8) < torch.tensor([5, 6, 7, 8, 8, 5, 6, 7, 8])[:, None]
    ragged = Tasks({k: v * mask for k, v in tasks.data.items()}, mask=mask, outputs=("y",))
    prior = quick(level, ragged, num_support=range(2, 5), inference=NEWTON, num_steps=3)
    assert np.isfinite(prior.history.loss).all()
    posterior = prior.adapt(ragged)
    alone = prior.adapt(x=tasks.data["x"][0, :5], y=tasks.data["y"][0, :5])
    torch.testing.assert_close(posterior.particles[0], alone.particles, rtol=1e-3, atol=1e-3)


def test_free_particles_are_learned_where_nothing_else_is() -> None:
    tasks = line_tasks(12, 8)
    prior = quick(line, tasks, inference=svgd(num_particles=4, num_steps=2, preconditioner="adaptive"), num_steps=3)
    assert prior.start == "free"
    assert prior.params["particles"].shape == (4, 2)
    assert prior.params.keys() == {"particles"}


def test_learned_step_sizes_stay_positive_and_move() -> None:
    inference = map_estimate(num_steps=2, preconditioner="none", learn_step_size="parameter", init="free")
    prior = quick(line, line_tasks(12, 8), inference=inference, num_steps=5)
    steps = prior.params["step_size"]
    assert steps.shape == (2,)
    assert (steps > 0).all()
    assert not torch.allclose(steps, torch.full((2,), 0.01))


def test_a_network_is_meta_learned() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2))
    before = [p.detach().clone() for p in net.parameters()]

    def features(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        coef = pyro.sample("coef", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(net(x[:, None]) @ coef, 0.5), obs=y)

    prior = quick(features, line_tasks(12, 8), inference=NEWTON, objective=query_nll(), num_steps=3)
    weights = [value for name, value in prior.params.items() if name.startswith("net")]
    assert len(weights) == 4
    assert all(not torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_going_on_from_a_prior_and_its_refusal() -> None:
    tasks = level_tasks(12, 6)
    first = quick(level, tasks, inference=NEWTON, num_steps=2)
    assert_same(quick(level, tasks, inference=NEWTON, num_steps=0, start=first), first)
    with pytest.raises(ValueError, match="start=.*'mean'.*need.*'particles'"):
        quick(line, tasks, start=first)


def test_callbacks_see_every_step_and_the_history_has_it() -> None:
    seen: list[MetaStep] = []
    prior = quick(level, level_tasks(12, 6), inference=NEWTON, num_steps=3, callbacks=[seen.append])
    assert [info.step for info in seen] == [1, 2, 3]
    assert [info.loss for info in seen] == prior.history.loss
    assert len(prior.history.grad_norm) == len(prior.history.tasks_per_second) == 3
    assert torch.equal(seen[-1].params["mean"], prior.params["mean"])


def test_a_diverging_run_stops_with_the_last_good_prior() -> None:
    """Plain steps of size 1 on noise of 0.01 overflow; the prior before the first bad step comes back."""

    def sharp(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.param("mean", torch.tensor(0.5))
        a = pyro.sample("a", dist.Normal(mean, 1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(a, 0.01), obs=y)

    inference = map_estimate(num_steps=20, step_size=1.0, preconditioner="none")
    with pytest.warns(StoppedEarly, match="at meta-step 1.*is kept"):
        prior = quick(sharp, level_tasks(12, 6), inference=inference, objective=query_nll(), num_steps=5)
    assert prior.params["mean"] == 0.5
    assert "meta-step 1" in str(prior.history.stopped)


class _Interrupted:
    """A callback that behaves like Ctrl-C at one step."""

    def __call__(self, info: MetaStep) -> None:
        if info.step == 3:
            raise KeyboardInterrupt


def test_a_later_divergence_returns_what_still_had_a_finite_loss() -> None:
    """An outer rate of 200 throws the parameters away at the first step; the prior from before it comes back."""
    tasks = level_tasks(12, 6)
    with pytest.warns(StoppedEarly, match="at meta-step [2-9]"):
        prior = quick(
            level, tasks, inference=NEWTON, num_steps=9, optimizer=partial(torch.optim.SGD, lr=200.0), max_grad_norm=1e9
        )
    assert np.isfinite(prior.history.loss).all()
    assert torch.isfinite(prior.adapt(tasks).particles).all()


def test_an_interrupted_run_returns_the_prior_so_far() -> None:
    with pytest.warns(StoppedEarly, match="interrupted at meta-step 3"):
        prior = quick(level, level_tasks(12, 6), inference=NEWTON, num_steps=9, callbacks=[_Interrupted()])
    assert prior.history.stopped == "interrupted at meta-step 3"
    assert prior.params["mean"] != 0.5


def test_the_users_learning_rate_is_used() -> None:
    prior = quick(
        level, level_tasks(12, 6), inference=NEWTON, num_steps=1, optimizer=partial(torch.optim.Adam, lr=1e-3)
    )
    assert abs(prior.params["mean"] - 0.5) == pytest.approx(1e-3, rel=1e-2)


def test_going_on_keeps_the_units() -> None:
    tasks = level_tasks(12, 6)
    grams = Tasks({"x": tasks.data["x"], "y": 1000 * tasks.data["y"]}, outputs=("y",))
    first = quick(level, grams.standardize(), inference=NEWTON, num_steps=1)
    second = quick(level, grams, inference=NEWTON, num_steps=1, start=first)
    assert second.scaling is not None
    assert first.scaling is not None
    assert torch.equal(second.scaling.scale["y"], first.scaling.scale["y"])
    with pytest.raises(ValueError, match="own standardisation"):
        quick(level, grams.standardize(), inference=NEWTON, num_steps=1, start=first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inference": svgd}, r"inference is <function.*inference=svgd\("),
        ({"objective": query_nll}, "objective is <function.*query_nll"),
        ({"tasks": {"x": 1}}, "tasks is {'x': 1}, a dict; write Tasks"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        quick(**{"model": level, "tasks": level_tasks(12, 6), **change})  # type: ignore[arg-type]


def test_checkpoints_can_be_loaded(tmp_path: Path) -> None:
    tasks = level_tasks(12, 6)
    cheap = svgd(num_particles=2, num_steps=1)
    prior = quick(level, tasks, inference=cheap, num_steps=5, checkpoint_dir=tmp_path)
    assert_same(load_prior(tmp_path / "prior.safetensors", level), prior)


def test_progress_shows_loss_gradient_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    meta_learn(level, level_tasks(12, 6), num_support=3, inference=NEWTON, num_steps=2, compile=False)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("meta-learning", "loss", "gradient", "tasks/s"))


def test_raw_units_are_spoken_of() -> None:
    tasks = level_tasks(12, 6)
    grams = Tasks({"x": tasks.data["x"], "y": 1000 * tasks.data["y"]}, outputs=("y",))
    with pytest.warns(UserWarning, match=r"'y' has root mean square .*tasks.standardize\(\)"):
        quick(level, grams, inference=NEWTON, num_steps=0)
    quick(level, grams.standardize(), inference=NEWTON, num_steps=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_support": 6}, "6"),
        ({"batch_size": 0}, "batch_size=0.*at least 1"),
        ({"num_steps": -3}, "num_steps=-3.*at least 0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0.*at least 1"),
        ({"compile": "yes"}, "compile='yes'.*auto"),
        ({"inference": svgd(init="posterior")}, "init='posterior'.*free"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meta_learn(level, level_tasks(12, 6), **{"num_support": 3, "progress": False, **change})  # type: ignore[arg-type]


def test_a_name_the_learner_uses_is_refused() -> None:
    def clash(x: Tensor, y: Tensor | None = None) -> None:
        pyro.param("particles", torch.zeros(()))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(a, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"\['particles'\].*rename"):
        quick(clash, level_tasks(12, 6))


def test_ragged_tasks_need_a_plate() -> None:
    def joint(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))
        pyro.sample("obs", dist.Normal(a + x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="observed site 'obs' has no plate.*pyro.plate"):
        quick(joint, level_tasks(12, 6), num_support=range(2, 4))
