"""What a posterior promises: shapes as Pyro gives them, units, densities that integrate to one, and names."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor

import bmaml_ppl as bp
from bmaml_ppl.inference import svgd
from bmaml_ppl.types import Model

NAMES = ("a", "b", "c")
SCALE = 3.0


def line(x: Tensor, dose: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.param("mean", torch.zeros(2))
    coef = pyro.sample("coef", dist.Normal(mean, 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    mean = pyro.deterministic("curve", coef[0] + coef[1] * x + dose)
    pyro.deterministic("ratio", coef[1] / noise)
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(mean, noise), obs=y)


def level(x: Tensor, y: Tensor | None = None) -> None:
    top = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(top + 0 * x, 0.5), obs=y)


def joint_level(x: Tensor, y: Tensor | None = None) -> None:
    top = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    pyro.sample("obs", dist.Normal(top + 0 * x, 0.5).to_event(1), obs=y)


def vectors(x: Tensor, y: Tensor | None = None) -> None:
    top = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(2)), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(top + 0 * x.unsqueeze(-1), 0.5).to_event(1), obs=y)


def crossed_vectors(x: Tensor, y: Tensor | None = None) -> None:
    top = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(2)), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0], dim=-2), pyro.plate("component", 2, dim=-1):
        pyro.sample("obs", dist.Normal(top + 0 * x.unsqueeze(-1), 0.5), obs=y)


learn = partial(
    bp.meta_learn,
    num_support=2,
    num_steps=1,
    compile=False,
    progress=False,
    inference=svgd(num_particles=5, num_steps=5),
)


def make_tasks(lengths: tuple[int, ...] = (4, 6, 3)) -> bp.Tasks:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, n in enumerate(lengths):
        x = torch.randn(n, generator=generator, dtype=torch.float64)
        y = 20 + SCALE * (x + i) + torch.randn(n, generator=generator, dtype=torch.float64)
        rows.append({"x": x, "y": y, "dose": torch.tensor(0.5 * i, dtype=torch.float64)})
    return bp.Tasks.from_list(rows, outputs=["y"], constants=["dose"], names=NAMES[: len(lengths)])


@pytest.fixture(scope="module")
def prior() -> bp.LearnedPrior:
    return learn(line, make_tasks().standardize())


@pytest.fixture(scope="module")
def posterior(prior: bp.LearnedPrior) -> bp.Posterior:
    return prior.adapt(make_tasks())


def level_tasks(y: Tensor, x: Tensor | None = None) -> bp.Tasks:
    return bp.Tasks({"x": torch.zeros(y.shape[:2], dtype=y.dtype) if x is None else x, "y": y}, outputs=("y",))


def raw_outputs(*shape: int) -> Tensor:
    return 10 + SCALE * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_shapes_are_those_of_pyros_predictive(prior: bp.LearnedPrior) -> None:
    tasks = make_tasks()
    one = prior.adapt(x=tasks.data["x"][1], y=tasks.data["y"][1], dose=0.5)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    ours = one.predict(x=x, num_samples=9)
    theirs = Predictive(line, guide=one.as_guide(), num_samples=9)(x=x, dose=torch.tensor(0.5))
    assert ours["obs"].shape == theirs["obs"].shape == (9, 7)
    # Pyro gives a site outside its plate a dimension of one for it.
    assert ours["curve"].shape == theirs["curve"].squeeze(1).shape == (9, 7)
    assert ours["ratio"].shape == (9,)
    assert set(ours) == {"obs", "curve", "ratio"}
    assert one.sites(9)["coef"].shape == (9, 2)
    assert one.draws().shape == one.particles.shape == (5, 3)
    assert one.log_likelihood()["obs"].shape == (5, 6)
    assert one.log_likelihood(num_samples=8)["obs"].shape == (8, 6)


def test_a_batch_has_its_tasks_after_the_draws(posterior: bp.Posterior) -> None:
    predicted = posterior.predict(num_samples=9)
    assert {k: tuple(v.shape) for k, v in predicted.items()} == {"obs": (9, 3, 6), "curve": (9, 3, 6), "ratio": (9, 3)}
    assert posterior.sites()["noise"].shape == (5, 3)
    assert posterior.draws(9).shape == (9, 3, 3)
    assert posterior.log_likelihood()["obs"].shape == (5, 3, 6)


def test_padded_rows_are_nan_and_no_others(posterior: bp.Posterior) -> None:
    mask = posterior.tasks.mask
    assert mask is not None
    for values in (posterior.predict(num_samples=4)["obs"], posterior.log_likelihood()["obs"]):
        assert torch.equal(values.isnan(), ~mask.expand(values.shape))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_indexing_by_name_position_and_slice(posterior: bp.Posterior, index: int) -> None:
    by_name, by_position, by_list = posterior[NAMES[index]], posterior[index], posterior[[NAMES[index], "a"]]
    assert by_name.names == (NAMES[index],)
    assert by_name.single
    assert torch.equal(by_name.particles, posterior.particles[index])
    assert torch.equal(by_position.particles, by_name.particles)
    assert not by_list.single
    assert torch.equal(by_list.particles[0], posterior.particles[index])
    assert len(posterior[1:]) == 2
    rows = posterior.tasks.num_observations[index]
    alone = by_name.log_likelihood()["obs"]
    assert torch.allclose(alone, posterior.log_likelihood()["obs"][:, index, :rows])
    with pytest.raises(KeyError, match="nobody"):
        posterior["nobody"]


def test_constants_given_at_adaptation_are_remembered(posterior: bp.Posterior) -> None:
    x = torch.zeros(2, dtype=torch.float64)
    remembered = posterior.predict(x=x, num_samples=4)
    given = posterior.predict(x=x.expand(3, 2), dose=posterior.tasks.constants["dose"], num_samples=4)
    assert torch.equal(remembered["obs"], given["obs"])
    other = posterior.predict(x=x.expand(3, 2), dose=torch.zeros(3), num_samples=4)
    assert not torch.equal(remembered["curve"][:, 2], other["curve"][:, 2])
    alone = posterior["c"].predict(x=x, num_samples=4)
    assert torch.allclose(alone["curve"], remembered["curve"][:, 2])


def test_other_tasks_are_not_taken_for_the_adapted_ones(posterior: bp.Posterior) -> None:
    tasks = make_tasks()
    with pytest.raises(ValueError, match=r"write tasks\[list\(posterior.names\)\]"):
        posterior.predict(tasks[["c", "b", "a"]])
    assert posterior.predict(tasks[list(posterior.names)], num_samples=2)["obs"].shape == (2, 3, 6)
    with pytest.raises(ValueError, match="missing data"):
        posterior.log_likelihood(x=torch.zeros(3, 2), dose=torch.zeros(3))
    with pytest.raises(ValueError, match="unknown data key 'X'"):
        posterior.predict(X=torch.zeros(3, 2))


def test_outputs_are_predicted_not_echoed(posterior: bp.Posterior) -> None:
    first, tasks = posterior.predict(num_samples=4), make_tasks()
    assert not torch.equal(first["obs"][0], tasks.data["y"])
    inputs_only = bp.Tasks({"x": tasks.data["x"]}, tasks.constants, tasks.mask, tasks.names)
    assert torch.equal(posterior.predict(inputs_only, num_samples=4)["obs"].nan_to_num(), first["obs"].nan_to_num())


@pytest.mark.parametrize("model", [level, joint_level])
def test_densities_integrate_to_one_in_the_users_units(model: Model) -> None:
    prior = learn(model, level_tasks(raw_outputs(4, 3)).standardize())
    grid = torch.linspace(-40, 60, 4001, dtype=torch.float64)
    # One observation a task: 4001 tasks under the particles of one.
    one = prior.adapt(x=torch.zeros(1), y=torch.tensor([12.0]))
    many = prior.adapt(x=torch.zeros(len(grid), 1), y=torch.full((len(grid), 1), 12.0))
    assert torch.allclose(many.particles[7], one.particles)
    values = many.log_likelihood(x=torch.zeros(len(grid), 1), y=grid[:, None])["obs"]
    integral = torch.trapezoid(values.reshape(5, len(grid)).exp(), grid, dim=1)
    assert torch.allclose(integral, torch.ones(5, dtype=torch.float64), atol=1e-6)


def test_an_event_of_all_rows_scores_their_sum() -> None:
    y = raw_outputs(4, 3)
    by_row, at_once = (
        learn(model, level_tasks(y).standardize()).adapt(level_tasks(y)) for model in (level, joint_level)
    )
    assert torch.allclose(by_row.particles, at_once.particles)
    scores = by_row.log_likelihood()["obs"].sum(-1)
    assert at_once.log_likelihood()["obs"].shape == (5, 4)
    assert torch.allclose(at_once.log_likelihood()["obs"], scores)


def test_components_of_an_output_are_scored_in_their_own_units() -> None:
    y = raw_outputs(4, 3, 2) * torch.tensor([1.0, 100.0])
    tasks = level_tasks(y, x=torch.zeros(4, 3, dtype=y.dtype))
    together, apart = (learn(model, tasks.standardize()).adapt(tasks) for model in (vectors, crossed_vectors))
    by_component = apart.log_likelihood()["obs"]
    scaling = apart.scaling
    assert scaling is not None
    loc = scaling.undo("y", apart.sites()["level"])[:, :, None]
    expected = dist.Normal(loc, 0.5 * scaling.scale["y"]).log_prob(y)
    assert by_component.shape == (5, 4, 3, 2)
    assert torch.allclose(by_component, expected)
    assert torch.allclose(together.log_likelihood()["obs"], expected.sum(-1))


def test_draws_are_the_same_in_every_method(posterior: bp.Posterior) -> None:
    sites, predicted = posterior.sites(11), posterior.predict(num_samples=11)
    assert torch.allclose(predicted["ratio"], sites["coef"][..., 1] / sites["noise"])
    assert torch.equal(posterior.draws(11), posterior.draws(11))
    scaling = posterior.scaling
    assert scaling is not None
    obs = dist.Normal(
        scaling.undo("y", predicted["curve"]), (sites["noise"] * scaling.scale["y"])[..., None], validate_args=False
    )
    expected = obs.log_prob(posterior.tasks.data["y"])
    found = posterior.log_likelihood(num_samples=11)["obs"]
    assert torch.allclose(found.nan_to_num(0.0), torch.where(found.isnan(), 0.0, expected))


def test_export_goes_through_the_tree(posterior: bp.Posterior) -> None:
    tree = posterior.to_arviz(num_samples=6)
    assert tree["posterior"]["coef"].shape == (1, 6, 3, 2)
    assert posterior["b"].to_arviz(num_samples=6)["posterior"]["coef"].shape == (1, 6, 2)


def two_outputs(x: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> None:
    top = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(top + 0 * x, 0.5), obs=y)
        pyro.sample("other", dist.Normal(top * x, 0.5), obs=w)


def groups_of(tree: Any) -> set[str]:
    return {str(name) for name in (tree.groups() if callable(tree.groups) else tree.children)}


def test_export_without_outputs_has_predictions_alone(posterior: bp.Posterior) -> None:
    x = torch.zeros(4, dtype=torch.float64)
    tree = posterior["b"].to_arviz(x=x, num_samples=6)
    assert tree["posterior_predictive"]["obs"].shape == (1, 6, 4)
    assert not {"log_likelihood", "observed_data"} & groups_of(tree)
    tasks = make_tasks()
    inputs_only = bp.Tasks({"x": tasks.data["x"]}, tasks.constants, tasks.mask, tasks.names)
    assert "log_likelihood" not in groups_of(posterior.to_arviz(inputs_only, num_samples=6))


def test_export_scores_the_outputs_that_are_given() -> None:
    data = {key: raw_outputs(3, 4) / 10 for key in ("x", "y", "w")}
    tasks = bp.Tasks(data, outputs=("y", "w"))
    posterior = learn(two_outputs, tasks).adapt(tasks)
    whole = posterior.to_arviz(num_samples=6)
    part = posterior.to_arviz(bp.Tasks({"x": data["x"], "w": data["w"]}, outputs=("w",)), num_samples=6)
    assert set(part["log_likelihood"].data_vars) == set(part["observed_data"].data_vars) == {"other"}
    assert (part["log_likelihood"]["other"] == whole["log_likelihood"]["other"]).all()
    assert set(part["posterior_predictive"].data_vars) == {"obs", "other"}


@pytest.mark.parametrize("num_samples", [0, -1])
def test_no_draws_are_refused(posterior: bp.Posterior, num_samples: int) -> None:
    for call in (posterior.predict, posterior.draws, posterior.sites, posterior.to_arviz, posterior.log_likelihood):
        with pytest.raises(ValueError, match=f"num_samples={num_samples} must be at least 1"):
            call(num_samples=num_samples)
    with pytest.raises(TypeError, match="num_samples='9' is str"):
        posterior.predict(num_samples="9")  # type: ignore[arg-type]


def test_repr_is_one_line(posterior: bp.Posterior) -> None:
    assert repr(posterior) == "Posterior(3 tasks; sites: coef, noise; svgd, 5 particles)"
    assert repr(posterior["b"]).startswith("Posterior(1 task;")
