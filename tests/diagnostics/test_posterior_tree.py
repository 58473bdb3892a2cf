"""What `to_arviz` puts where, and that ArviZ's statistics read it."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bmaml_ppl as bp
from bmaml_ppl.diagnostics.export import pareto_khat, save_tree
from bmaml_ppl.inference import hmc, laplace, svgd

# Any of its two generations, whose functions differ.
arviz: Any = importlib.import_module("arviz")

NAMES = ("a", "b", "c")
LENGTHS = (14, 10, 12)
NUM_DRAWS = 60
EVERY_GROUP = {
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
}


def line(x: Tensor, dose: Tensor, coef_scale: Tensor, y: Tensor | None = None) -> None:
    mean = pyro.param("mean", torch.zeros(2))
    coef = pyro.sample("coef", dist.Normal(mean, coef_scale).to_event(1))
    curve = pyro.deterministic("curve", coef[0] + coef[1] * x + dose)
    pyro.deterministic("slope", coef[1])
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(curve, 0.5), obs=y)


def whole(x: Tensor, y: Tensor | None = None, total: Tensor | None = None) -> None:
    level = pyro.sample("x", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0))
    pyro.sample("obs", dist.Normal(level + 0 * x, 1.0).to_event(1), obs=y)
    pyro.sample("sum", dist.Normal(4 * level, 2.0), obs=total)


def shares(x: Tensor, y: Tensor | None = None) -> None:
    level = pyro.sample("level", dist.Normal(pyro.param("mean", torch.zeros(2)), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(level * x.unsqueeze(-1), 1.0).to_event(1), obs=y)


def make_tasks() -> bp.Tasks:
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Tensor]] = []
    for i, n in enumerate(LENGTHS):
        x = torch.randn(n, generator=generator)
        y = 50 + 10 * (x + i + 0.5 * torch.randn(n, generator=generator))
        rows.append({"x": x, "y": y, "dose": torch.tensor(0.1 * i), "coef_scale": torch.ones(2)})
    return bp.Tasks.from_list(rows, outputs=["y"], constants=["dose", "coef_scale"], names=NAMES)


learn = partial(
    bp.meta_learn,
    num_support=3,
    num_steps=1,
    compile=False,
    progress=False,
    inference=svgd(num_particles=20, num_steps=15),
)


@pytest.fixture(scope="module")
def prior() -> bp.LearnedPrior:
    return learn(line, make_tasks().standardize())


@pytest.fixture(scope="module")
def posterior(prior: bp.LearnedPrior) -> bp.Posterior:
    return prior.adapt(make_tasks())


@pytest.fixture(scope="module")
def tree(posterior: bp.Posterior) -> Any:
    return posterior.to_arviz(num_samples=NUM_DRAWS)


def groups(tree: Any) -> set[str]:
    return set(tree.groups()) if callable(tree.groups) else {name.strip("/") for name in tree.groups} - {""}


def real(values: Tensor, mask: Tensor | None) -> np.ndarray:
    """The real observations of (..., T, N), end to end."""
    assert mask is not None
    return values[..., mask].numpy()


def test_latents_have_chain_draw_and_task(tree: Any, posterior: bp.Posterior) -> None:
    assert groups(tree) == EVERY_GROUP
    coef = tree["posterior"]["coef"]
    assert coef.dims == ("chain", "draw", "task", "coef_dim_0")
    assert coef["task"].values.tolist() == list(NAMES)
    assert np.array_equal(coef.values[0], posterior.sites(NUM_DRAWS)["coef"].numpy())
    assert tree["posterior"]["slope"].dims == ("chain", "draw", "task")
    assert np.array_equal(tree["posterior"]["slope"].values, coef.values[..., 1])


def test_observations_are_flat_in_the_users_units(tree: Any, posterior: bp.Posterior) -> None:
    mask = posterior.tasks.mask
    predicted = tree["posterior_predictive"]["obs"]
    assert predicted.dims == ("chain", "draw", "obs_id")
    assert predicted["task"].values.tolist() == [name for name, n in zip(NAMES, LENGTHS, strict=True) for _ in range(n)]
    assert predicted["observation"].values.tolist() == [i for n in LENGTHS for i in range(n)]
    assert np.array_equal(predicted.values[0], real(posterior.predict(num_samples=NUM_DRAWS)["obs"], mask))
    assert np.array_equal(tree["observed_data"]["obs"].values, real(make_tasks().data["y"], mask))
    assert abs(predicted.values.mean() - make_tasks().data["y"][mask].mean()) < 10
    scores = posterior.log_likelihood(num_samples=NUM_DRAWS)["obs"]
    assert np.array_equal(tree["log_likelihood"]["obs"].values[0], real(scores, mask))
    assert tree["posterior_predictive"]["curve"].dims == ("chain", "draw", "obs_id")
    assert not any(np.isnan(tree[g][v].values).any() for g in groups(tree) for v in tree[g].data_vars)


def test_inputs_are_flat_and_constants_per_task(tree: Any) -> None:
    tasks, constant = make_tasks(), tree["constant_data"]
    assert set(constant.data_vars) == {"x", "dose", "coef_scale"}
    assert np.array_equal(constant["x"].values, real(tasks.data["x"], tasks.mask))
    assert constant["dose"].dims == ("task_id",)
    assert constant["dose"]["task_id"].values.tolist() == list(NAMES)
    assert constant["coef_scale"].shape == (3, 2)


def test_tree_says_where_it_comes_from(tree: Any) -> None:
    attrs = dict(tree.attrs)
    assert attrs["inference_library"] == "bmaml_ppl"
    assert attrs["inference_library_version"] == bp.__version__
    assert (attrs["inference"], attrs["num_particles"]) == ("svgd", 20)


def test_single_task_has_no_task_dimension(posterior: bp.Posterior) -> None:
    tree = posterior["b"].to_arviz(num_samples=NUM_DRAWS)
    assert tree["posterior"]["coef"].dims == ("chain", "draw", "coef_dim_0")
    assert tree["posterior"]["slope"].dims == ("chain", "draw")
    assert tree["posterior_predictive"]["obs"].shape == (1, NUM_DRAWS, LENGTHS[1])
    assert set(tree["observed_data"]["obs"]["task"].values) == {"b"}
    assert tree["constant_data"]["dose"].shape == (1,)
    assert np.array_equal(tree["observed_data"]["obs"].values, make_tasks()["b"].data["y"][0].numpy())


def test_held_out_observations_are_scored(posterior: bp.Posterior) -> None:
    x = torch.zeros(3, 2)
    tree = posterior.to_arviz(x=x, y=x + 50, num_samples=5)
    assert tree["log_likelihood"]["obs"].shape == (1, 5, 6)
    assert tree["observed_data"]["obs"].values.tolist() == [50.0] * 6
    with pytest.raises(ValueError, match=r"missing data \['x'\]"):
        posterior.to_arviz(y=x)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution")
def test_arviz_reads_the_tree(posterior: bp.Posterior) -> None:
    tree = posterior.to_arviz(num_samples=400)
    summary = arviz.summary(tree)
    assert len(summary) == 3 * 3
    assert {"coef[a, 0]", "coef[c, 1]", "slope[b]"} <= set(summary.index)
    loo = arviz.loo(tree)
    elpd = loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd
    scores = tree["log_likelihood"]["obs"].values[0]
    in_sample = (np.logaddexp.reduce(scores, axis=0) - np.log(len(scores))).sum()
    assert loo.n_data_points == sum(LENGTHS)
    assert in_sample - 40 < elpd < in_sample


def test_prior_and_its_predictions(prior: bp.LearnedPrior) -> None:
    tasks = make_tasks()
    tree = prior.to_arviz(tasks, num_samples=NUM_DRAWS)
    assert groups(tree) == {"prior", "prior_predictive", "observed_data", "constant_data"}
    assert tree["prior"]["coef"].dims == ("chain", "draw", "task", "coef_dim_0")
    assert np.array_equal(tree["prior"]["coef"].values[0], prior.sites(tasks, num_samples=NUM_DRAWS)["coef"].numpy())
    expected = real(prior.predict(tasks, num_samples=NUM_DRAWS)["obs"], tasks.mask)
    assert np.array_equal(tree["prior_predictive"]["obs"].values[0], expected)
    assert np.array_equal(tree["observed_data"]["obs"].values, real(tasks.data["y"], tasks.mask))
    unobserved = bp.Tasks({"x": tasks.data["x"]}, tasks.constants, tasks.mask, tasks.names)
    assert groups(prior.to_arviz(unobserved, num_samples=5)) == {"prior", "prior_predictive", "constant_data"}


def test_sites_that_observe_a_task_at_once_keep_one_score_a_task() -> None:
    y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tasks = bp.Tasks({"x": torch.zeros(3, 4), "y": y}, {"total": y.sum(1)}, names=NAMES, outputs=("y",))
    tree = learn(whole, tasks).adapt(tasks).to_arviz(num_samples=5)
    assert tree["posterior_predictive"]["obs"].shape == (1, 5, 12)
    assert tree["posterior_predictive"]["sum"].dims == ("chain", "draw", "task_id")
    assert tree["log_likelihood"]["obs_per_task"].dims == ("chain", "draw", "task_id")
    assert np.array_equal(tree["observed_data"]["sum"].values, y.sum(1).numpy())
    assert "input_x" in tree["constant_data"]  # the model's latent is called x, too


def test_components_stay_after_the_observations() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks = bp.Tasks(
        {"x": torch.ones(3, 4), "y": torch.randn(3, 4, 2, generator=generator)}, names=NAMES, outputs=("y",)
    )
    tree = learn(shares, tasks).adapt(tasks).to_arviz(num_samples=5)
    assert tree["posterior_predictive"]["obs"].dims == ("chain", "draw", "obs_id", "obs_dim_0")
    assert np.array_equal(tree["observed_data"]["obs"].values, tasks.data["y"].reshape(12, 2).numpy())
    assert tree["log_likelihood"]["obs"].shape == (1, 5, 12)


def test_the_posterior_carries_its_prior(tree: Any, prior: bp.LearnedPrior) -> None:
    before = prior.to_arviz(make_tasks(), num_samples=NUM_DRAWS)
    for group in ("prior", "prior_predictive"):
        for name in before[group].data_vars:
            assert np.array_equal(tree[group][name].values, before[group][name].values)
            assert tree[group][name].dims == before[group][name].dims
    spread = {group: float(tree[group]["coef"].std("draw").mean()) for group in ("prior", "posterior")}
    assert spread["posterior"] < 0.5 * spread["prior"]


def test_markov_chains_are_chains(prior: bp.LearnedPrior) -> None:
    posterior = prior.adapt(make_tasks(), inference=hmc(num_chains=3, num_warmup=40, num_draws=30))
    tree = posterior.to_arviz()
    state = posterior.state
    assert tree["posterior"]["coef"].shape == (3, 30, 3, 2)
    assert np.array_equal(tree["posterior"]["coef"].values, state.draws.permute(1, 2, 0, 3).numpy())
    stats = tree["sample_stats"]
    assert set(stats.data_vars) == {"lp", "acceptance_rate", "diverging", "energy", "step_size"}
    assert stats["diverging"].dtype == bool
    np.testing.assert_allclose(stats["lp"].values, state.log_density.permute(1, 2, 0).numpy(), atol=1e-3)
    assert np.array_equal(stats["energy"].values, state.energy.permute(1, 2, 0).numpy())
    assert posterior.to_arviz(num_samples=31)["posterior"]["coef"].shape == (3, 11, 3, 2)
    assert posterior["b"].to_arviz()["sample_stats"]["lp"].shape == (3, 30)
    assert float(arviz.rhat(tree["posterior"])["coef"].max()) < 1.5


def test_restarts_are_chains(prior: bp.LearnedPrior) -> None:
    posterior = prior.adapt(make_tasks(), num_restarts=3)
    coef = posterior.to_arviz(num_samples=60)["posterior"]["coef"].values
    assert coef.shape == (3, 20, 3, 2)
    assert not np.array_equal(coef[0], coef[1])
    alone = prior.adapt(make_tasks())
    assert torch.equal(alone.state.particles, posterior.state.particles)
    assert len(posterior["b"].states) == 3


def test_laplace_knows_its_log_density(prior: bp.LearnedPrior) -> None:
    # The task is linear and normal, so that Laplace's posterior is exact: log p - log q is the log evidence.
    posterior = prior.adapt(make_tasks(), inference=laplace())
    stats = posterior.to_arviz(num_samples=50)["sample_stats"]
    ratio = (stats["lp"] - stats["log_q"]).values
    expected = posterior.diagnostics()["log_evidence"].numpy()
    np.testing.assert_allclose(ratio, np.broadcast_to(expected, ratio.shape), atol=1e-3)


def nested(x: Tensor, y: Tensor | None = None) -> None:
    """Three groups with two effects each, on supports of their own; a plate called as what ArviZ labels."""
    mean = pyro.param("mean", torch.zeros(()))
    with pyro.plate("group", 3, dim=-2):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("effect", 2, dim=-1):
            slope = pyro.sample("slope", dist.Normal(mean, scale))
        pyro.sample("spare", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("task", 2):
        pyro.sample("other", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[0], dim=-2), pyro.plate("effect", 2, dim=-1):
        pyro.sample("obs", dist.Normal(x.unsqueeze(-1) * slope.sum(-2), 1.0), obs=y)


@pytest.fixture(scope="module")
def in_plates() -> bp.Posterior:
    y = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    tasks = bp.Tasks({"x": torch.ones(2, 4), "y": y}, outputs=("y",))
    return learn(nested, tasks, inference=svgd(num_particles=4, num_steps=2)).adapt(tasks)


def test_dimensions_are_called_as_their_plates(in_plates: bp.Posterior) -> None:
    for posterior, first in ((in_plates, ("chain", "draw", "task")), (in_plates[0], ("chain", "draw"))):
        tree = posterior.to_arviz(num_samples=6)
        latent = tree["posterior"]
        assert latent["scale"].dims == (*first, "group", "scale_dim_1")
        assert latent["slope"].dims == (*first, "group", "effect")
        assert latent["spare"].dims == (*first, "group", "spare_dim_1", "spare_dim_2")
        assert latent["other"].dims == (*first, "other_dim_0")
        for group in ("posterior_predictive", "prior_predictive", "log_likelihood"):
            assert tree[group]["obs"].dims == ("chain", "draw", "obs_id", "effect")
        assert tree["observed_data"]["obs"].dims == ("obs_id", "effect")
        assert tree["prior"]["slope"].dims == latent["slope"].dims


def test_users_name_dimensions_and_their_values(in_plates: bp.Posterior) -> None:
    names: dict[str, Any] = {
        "dims": {"slope": ["school", "term"], "obs": ["term"]},
        "coords": {"term": ["a", "b"], "group": [7, 8, 9]},
    }
    for tree in (in_plates.to_arviz(num_samples=5, **names), in_plates.prior.to_arviz(in_plates.tasks, **names)):
        prior = tree["prior"]
        assert prior["slope"].dims == ("chain", "draw", "task", "school", "term")
        assert prior["scale"].dims[-2:] == ("group", "scale_dim_1")
        assert prior["slope"].sel(term="b").shape[-1] == 3
        assert prior["group"].values.tolist() == [7, 8, 9]
        assert tree["prior_predictive"]["obs"]["term"].values.tolist() == ["a", "b"]
        assert tree["observed_data"]["obs"].dims == ("obs_id", "term")
    assert "slope[task 0, 1, a]" in arviz.summary(in_plates.to_arviz(num_samples=50, **names)).index


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"dims": {"slop": ["a", "b"]}}, "'slop'.*'slope'"),
        ({"dims": {"slope": ["a"]}}, r"'slope'.*\['a'\].*2 of its own"),
        ({"dims": {"slope": ["a", "b", "c"]}}, "2 of its own"),
        ({"dims": {"slope": "ab"}}, "'ab'.*2 of its own"),
        ({"dims": {"slope": ["task", "b"]}}, "'task'.*taken"),
        ({"coords": {"group": [1, 2]}}, "2 values along 'group'.*'group': 3"),
        ({"coords": {"task": [1, 2]}}, "2 values along 'task'.*'group': 3"),
    ],
)
def test_names_that_fit_nothing_are_refused(in_plates: bp.Posterior, names: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_plates.to_arviz(num_samples=5, **names)


def test_log_prior_is_that_of_the_draws_on_their_supports(in_plates: bp.Posterior) -> None:
    tree = in_plates.to_arviz(num_samples=6)
    latent = {name: torch.from_numpy(tree["posterior"][name].values) for name in ("scale", "slope", "spare")}
    expected = {
        "scale": dist.HalfNormal(1.0).log_prob(latent["scale"]),
        "slope": dist.Normal(in_plates.params["mean"], latent["scale"]).log_prob(latent["slope"]),
        "spare": dist.Normal(0.0, 1.0).log_prob(latent["spare"]).sum(-1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(tree["log_prior"][name].values, value.numpy(), rtol=1e-4, atol=1e-4)
    for name in ("scale", "slope"):
        assert tree["log_prior"][name].dims == tree["posterior"][name].dims
    assert tree["log_prior"]["spare"].dims == ("chain", "draw", "task", "group", "spare_dim_1")
    alone = in_plates[1].to_arviz(num_samples=6)["log_prior"]
    np.testing.assert_allclose(alone["slope"].values, tree["log_prior"]["slope"].values[:, :, 1], rtol=1e-5)


@pytest.fixture(scope="module")
def restarted(prior: bp.LearnedPrior) -> bp.Posterior:
    return prior.adapt(make_tasks(), inference=laplace(), num_restarts=2)


def test_densities_add_up(restarted: bp.Posterior) -> None:
    # A normal latent is its own coordinate, so that log prior and log-likelihood are the whole log joint density.
    tree = restarted.to_arviz(num_samples=20)
    per_task = tree["log_likelihood"]["obs"].groupby("task").sum()
    scaling = restarted.scaling
    assert scaling is not None
    lengths = np.array(LENGTHS) * np.log(scaling.scale["y"].numpy())
    total = tree["log_prior"]["coef"].values + per_task.transpose("chain", "draw", "task").values + lengths
    np.testing.assert_allclose(total, tree["sample_stats"]["lp"].values, rtol=1e-3, atol=1e-3)


def test_khat_of_an_exact_approximation_is_small(restarted: bp.Posterior) -> None:
    # The tasks are linear and normal, so that Laplace is exact.
    stats = restarted.to_arviz(num_samples=400)["sample_stats"]
    ratios = (stats["lp"] - stats["log_q"]).transpose("task", "chain", "draw").values.reshape(3, -1)
    assert (pareto_khat(ratios) < 0.3).all()
    narrow = (stats["log_q"] - 4 * stats["lp"]).transpose("task", "chain", "draw").values.reshape(3, -1)
    assert (pareto_khat(narrow) > 0.7).all()


# Both are ArviZ 0.23's: what matplotlib 3.11 and pandas 3 deprecated, and draws too few for leave-one-out.
@pytest.mark.filterwarnings(
    "ignore:Passing a dict or None as alias_mapping",
    "ignore:The inplace keyword in DataFrame",
    "ignore:Estimated shape parameter of Pareto distribution",
)
def test_arviz_draws_what_is_exported(restarted: bp.Posterior, posterior: bp.Posterior) -> None:
    every, one = restarted.to_arviz(num_samples=400), restarted["b"].to_arviz(num_samples=400)
    for tree in (every, one):
        arviz.plot_forest(tree, combined=True)
        arviz.plot_pair(tree, var_names=["coef"], coords={"task": "b"} if tree is every else None)
        if hasattr(arviz, "plot_ppc"):
            arviz.plot_ppc(tree, var_names=["obs"], num_pp_samples=10)
            arviz.plot_loo_pit(tree, y="obs")
        else:
            arviz.plot_ppc_dist(tree, var_names=["obs"])
            arviz.plot_ppc_pit(tree, var_names=["obs"])
            arviz.psense_summary(tree)
        assert all(plt.figure(number).axes for number in plt.get_fignums())
        plt.close("all")
    table = arviz.compare({"laplace": one, "svgd": posterior["b"].to_arviz(num_samples=400)})
    assert set(table.index) == {"laplace", "svgd"}


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_round_trip(tree: Any, tmp_path: Path, suffix: str) -> None:
    import xarray

    path = tmp_path / f"tree.{suffix}"
    save_tree(tree, path)
    with xarray.open_datatree(path, engine="zarr" if suffix == "zarr" else None) as read:
        for group in groups(tree):
            for name, values in tree[group].data_vars.items():
                assert read[group][name].load().equals(values), (group, name)
