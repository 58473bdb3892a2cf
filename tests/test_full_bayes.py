"""The whole hierarchy by NUTS: its density exactly, a hierarchy known by quadrature, the eight schools' reference.

Means are compared in Monte Carlo standard errors (MCSE) from the effective sample size. Seeds are fixed; a bound of 4
MCSE would fail once in 16,000 comparisons on other seeds.
"""

from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.distributions import Normal, biject_to
from torch.distributions.constraints import positive

import bmaml_ppl as bp
from bmaml_ppl.adaptation import as_task_data
from bmaml_ppl.density import from_model
from bmaml_ppl.full_bayes import FullPosterior, full_bayes
from bmaml_ppl.hierarchy import Hierarchy, draw_starts, make_hierarchy
from bmaml_ppl.inference.nuts import _Potential
from bmaml_ppl.models import eight_schools_tasks, school_effect
from tests.toys import level, level_tasks, line_tasks, straight

F64 = torch.float64
SHORT: dict[str, Any] = {"num_warmup": 10, "num_draws": 12, "num_chains": 2}
LEVEL: dict[str, Any] = {"mean": dist.Normal(0.0, 1.0), "sd": dist.HalfNormal(1.0), "noise": dist.LogNormal(-0.5, 0.5)}


def mixed(x: Tensor, y: Tensor | None = None) -> None:
    """A normal level whose noise is a latent of its own."""
    mean = pyro.param("mean", torch.zeros(()))
    a = pyro.sample("a", dist.Normal(mean, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(mean.new_ones(())))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(a, noise), obs=y)


def shrunk(x: Tensor, y: Tensor | None = None) -> None:
    """A level whose width is a latent: normal given it, and not on its own."""
    rate = pyro.param("rate", torch.ones(()), constraint=positive)
    lam = pyro.sample("lam", dist.Gamma(2.0, rate))
    a = pyro.sample("a", dist.Normal(rate.new_zeros(()), lam))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(a, 1.0), obs=y)


def lognormal(x: Tensor, y: Tensor | None = None) -> None:
    """A positive level that is normal in unconstrained coordinates."""
    a = pyro.sample("a", dist.LogNormal(pyro.param("mean", torch.zeros(())), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(a, 1.0), obs=y)


def heavy(x: Tensor, y: Tensor | None = None) -> None:
    """A level with heavy tails."""
    a = pyro.sample("a", dist.StudentT(4.0, pyro.param("mean", torch.zeros(())), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(a, 1.0), obs=y)


def _ragged() -> bp.Tasks:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(n, generator=generator, dtype=F64) for n in (2, 4, 3)]
    return bp.Tasks.from_list([{"x": torch.zeros_like(y), "y": y} for y in rows], outputs=("y",), names=("a", "b", "c"))


def _hierarchy(model: Any, tasks: bp.Tasks, hyperpriors: dict[str, Any], noncentered: Any = "auto") -> Hierarchy:
    density = from_model(model, {key: value[0] for key, value in tasks.data.items()}).to(dtype=F64)
    with pyro.validation_enabled(False):
        return make_hierarchy(density, as_task_data(tasks), hyperpriors, noncentered, seed=0)


def _level_log_density(tasks: bp.Tasks, v: Tensor, noncentered: bool) -> Tensor:
    """The hierarchy of `level` by hand, scales as logarithms."""
    mean, sd, noise = v[0], v[1].exp(), v[2].exp()
    log_prior = Normal(0.0, 1.0).log_prob(mean) + dist.HalfNormal(1.0).log_prob(sd) + v[1]
    total = log_prior + dist.LogNormal(-0.5, 0.5).log_prob(noise) + v[2]
    for t, u in enumerate(v[3:]):
        a = mean + sd * u if noncentered else u
        total = total + (Normal(0.0, 1.0).log_prob(u) if noncentered else Normal(mean, sd).log_prob(a))
        total = total + Normal(a, noise).log_prob(tasks[t].data["y"][0]).sum()
    return total


@pytest.mark.parametrize("noncentered", [True, False])
def test_the_density_of_ragged_tasks_is_the_closed_form(noncentered: bool) -> None:
    tasks = _ragged()
    hierarchy = _hierarchy(level, tasks, LEVEL, noncentered)
    v = torch.randn(6, dtype=F64, requires_grad=True)
    found, expected = hierarchy(v), _level_log_density(tasks, v, noncentered)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(expected, v)
    potential = _Potential(hierarchy)
    with pyro.validation_enabled(False):
        (recorded,) = torch.autograd.grad(potential({"z": v}), v)
    torch.testing.assert_close(-recorded, slope)
    assert None not in potential.slope.graphs.values()


def test_correlated_priors_become_standard_normal() -> None:
    tasks = line_tasks(3, 4).to(dtype=F64)
    factor = torch.tensor([[1.5, 0.0], [-0.9, 0.4]], dtype=F64)
    hyperpriors = {
        "mean": dist.Normal(torch.zeros(2), 3.0).to_event(1),
        "scale_tril": dist.LKJCholesky(2, 1.0),
        "noise": dist.HalfCauchy(1.0),
    }
    hierarchy = _hierarchy(straight, tasks, hyperpriors, True)
    theta = {"mean": torch.tensor([1.0, -2.0], dtype=F64), "scale_tril": factor, "noise": torch.tensor(0.3, dtype=F64)}
    u = torch.randn(3, 2, dtype=F64)
    z, log_det = hierarchy.place(u, theta)
    prior = torch.distributions.MultivariateNormal(theta["mean"], scale_tril=factor)
    torch.testing.assert_close(prior.log_prob(z) + log_det, Normal(0.0, 1.0).log_prob(u).sum(1))
    torch.testing.assert_close(hierarchy.pack([], z, theta), u.flatten())


def test_hyperparameters_of_any_support_are_unpacked() -> None:
    hyperpriors = {
        "mean": dist.Normal(0.0, 3.0),
        "scale_tril": dist.LKJCholesky(2, torch.tensor(1.5)),
        "noise": dist.Uniform(0.1, 2.0),
    }
    hierarchy = _hierarchy(straight, line_tasks(3, 4).to(dtype=F64), hyperpriors)
    v = torch.randn(10, dtype=F64)
    theta, log_prior, u = hierarchy.unpack(v)
    assert torch.equal(u, v[4:].reshape(3, 2))
    assert torch.equal(theta["mean"], v[:2])
    expected = dist.Normal(0.0, 3.0).log_prob(v[:2]).sum()
    for name, x in (("scale_tril", v[2:3]), ("noise", v[3])):
        transform = biject_to(hyperpriors[name].support)
        value = transform(x)
        torch.testing.assert_close(theta[name], value)
        expected = expected + hyperpriors[name].log_prob(value) + transform.log_abs_det_jacobian(x, value)
    torch.testing.assert_close(log_prior, expected)


@pytest.mark.parametrize(
    ("model", "sites"),
    [(level, ["a"]), (mixed, ["a"]), (shrunk, []), (lognormal, ["a"]), (heavy, [])],
    ids=["level", "mixed", "shrunk", "lognormal", "heavy"],
)
def test_normal_priors_are_found(model: Any, sites: list[str]) -> None:
    known = {**LEVEL, "rate": dist.HalfNormal(1.0)}
    tasks = level_tasks(3, 2).to(dtype=F64)
    names = from_model(model, {key: value[0] for key, value in tasks.data.items()}).prior
    hyperpriors = {name: known[name] for name in names}
    hierarchy = _hierarchy(model, tasks, hyperpriors)
    assert hierarchy.noncentered == sites
    assert _hierarchy(model, tasks, hyperpriors, False).noncentered == []
    starts = draw_starts(hierarchy, 2, seed=0)
    assert starts.shape == (2, len(names) + 3 * hierarchy.density.dim)
    assert torch.isfinite(torch.stack([hierarchy(v) for v in starts])).all()


def _level_by_quadrature(y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Exact posterior means and standard deviations of `level`'s hyperparameters and of the first task's level."""
    mean = torch.linspace(-3, 3, 81, dtype=F64)
    log_sd, log_noise = torch.linspace(-5, 1.6, 81, dtype=F64), torch.linspace(-2.2, 0.6, 61, dtype=F64)
    mean, log_sd, log_noise = torch.meshgrid(mean, log_sd, log_noise, indexing="ij")
    sd, noise, n = log_sd.exp(), log_noise.exp(), y.shape[1]
    log_weight = _log_hyperprior(mean, sd, noise) + log_sd + log_noise
    for row in y:
        # Deviations from the row's mean say noise alone; the mean is N(mean, sd^2 + noise^2 / n).
        log_weight = log_weight - (n - 1) * log_noise - 0.5 * (row - row.mean()).square().sum() / noise**2
        log_weight = log_weight + Normal(mean, (sd**2 + noise**2 / n).sqrt()).log_prob(row.mean())
    weight = torch.softmax(log_weight.flatten(), 0).reshape(mean.shape)
    precision = 1 / sd**2 + n / noise**2
    a = (mean / sd**2 + y[0].sum() / noise**2) / precision
    found = {"mean": (mean, mean**2), "sd": (sd, sd**2), "noise": (noise, noise**2), "a": (a, a**2 + 1 / precision)}
    first = {name: (weight * value).sum() for name, (value, _) in found.items()}
    second = {name: (weight * square).sum() for name, (_, square) in found.items()}
    return {name: (first[name], (second[name] - first[name] ** 2).sqrt()) for name in found}


def _log_hyperprior(mean: Tensor, sd: Tensor, noise: Tensor) -> Tensor:
    total: Tensor = (
        LEVEL["mean"].log_prob(mean) + dist.HalfNormal(1.0).log_prob(sd) + dist.LogNormal(-0.5, 0.5).log_prob(noise)
    )
    return total


@cache
def _short() -> FullPosterior:
    return full_bayes(level, _ragged(), LEVEL, **SHORT)


def _check_against(draws: Tensor, mean: Tensor, sd: Tensor) -> None:
    """Mean and mean square of draws, (C, S), within 4 standard errors of exact ones."""
    for values, exact in ((draws, mean), ((draws - mean) ** 2, sd**2)):
        error = (values.var() / effective_sample_size(values, 0, 1)).sqrt()
        assert abs(values.mean() - exact) < 4 * error
    assert split_gelman_rubin(draws, 0, 1) < 1.05


def test_a_hierarchy_is_its_quadrature() -> None:
    tasks = level_tasks(6, 3, seed=1).to(dtype=F64)
    posterior = full_bayes(level, tasks, LEVEL, num_warmup=150, num_draws=250, num_chains=2)
    assert posterior.noncentered == ("a",)
    draws = {**posterior.hyperparameters, "a": posterior.sites["a"][:, :, 0]}
    for name, (mean, sd) in _level_by_quadrature(tasks.data["y"]).items():
        _check_against(draws[name], mean, sd)


def test_eight_schools_as_tasks_are_the_reference() -> None:
    hyperpriors = {"mu": dist.Normal(0.0, 5.0), "tau": dist.HalfCauchy(5.0)}
    posterior = full_bayes(school_effect(), eight_schools_tasks(), hyperpriors, num_warmup=150, num_draws=400)
    draws = {**posterior.hyperparameters, "theta[1]": posterior.sites["theta"][:, :, 0]}
    # posteriordb: mean and sd of 10,000 nearly independent draws.
    for name, mean, sd in (("mu", 4.41, 3.31), ("tau", 3.60, 3.20), ("theta[1]", 6.15, 5.62)):
        size = effective_sample_size(draws[name], 0, 1)
        error = (draws[name].var() / size + sd**2 / 10_000).sqrt()
        assert abs(draws[name].mean() - mean) < 4 * error, name
        assert size > 60, name  # centred, it is 15 to 30
        assert split_gelman_rubin(draws[name], 0, 1) < 1.05, name


def test_scaled_tasks_score_in_their_units() -> None:
    tasks = _ragged()
    wide = bp.Tasks({**tasks.data, "y": 10 * tasks.data["y"]}, mask=tasks.mask, outputs=("y",)).standardize(["y"])
    posterior = full_bayes(level, wide, LEVEL, **SHORT, noncentered=False)
    scores = posterior.log_likelihood()["obs"]
    assert scores.shape == (2, 12, 3, 4)
    loc, scale = wide.scaling.loc["y"], wide.scaling.scale["y"]  # type: ignore[union-attr]
    a, noise = posterior.sites["a"].unsqueeze(-1) * scale + loc, posterior.hyperparameters["noise"][..., None, None]
    expected = Normal(a, noise * scale).log_prob(wide.data["y"])
    real = wide.with_mask().mask
    torch.testing.assert_close(scores[:, :, real], expected[:, :, real])
    assert scores[:, :, ~real].isnan().all()  # type: ignore[operator]


def test_export_names_dimensions_and_tasks() -> None:
    tasks, posterior = _ragged(), _short()
    tree = posterior.to_arviz()
    for name in ("mean", "sd", "noise"):
        assert tree["posterior"][name].dims == ("chain", "draw")
        torch.testing.assert_close(torch.tensor(tree["posterior"][name].values), posterior.hyperparameters[name])
    assert tree["posterior"]["a"].dims == ("chain", "draw", "task")
    assert tree["posterior"]["a"].sizes["task"] == 3
    assert list(tree["posterior"]["task"].values) == ["a", "b", "c"]
    assert tree["log_likelihood"]["obs"].dims == ("chain", "draw", "obs_id")
    assert list(tree["observed_data"]["task"].values) == ["a"] * 2 + ["b"] * 4 + ["c"] * 3
    real = tasks.with_mask().mask
    observed = torch.tensor(tree["observed_data"]["obs"].values)
    torch.testing.assert_close(observed, tasks.data["y"][real])
    assert set(tree["sample_stats"].data_vars) == {"lp", "acceptance_rate", "energy", "diverging", "step_size"}
    assert tree["sample_stats"]["lp"].shape == (2, 12)
    assert repr(posterior) == (
        "FullPosterior(3 tasks; hyperparameters: mean, sd, noise; sites: a; 2 chains of 12 draws)"
    )


def test_vectors_and_whole_observations_are_exported() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.param("mean", torch.zeros(2))
        coef = pyro.sample("coef", dist.Normal(mean, 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * x, 0.5).to_event(1), obs=y)

    tasks = line_tasks(3, 5).to(dtype=F64)
    tree = full_bayes(model, tasks, {"mean": dist.Normal(0.0, 1.0)}, **SHORT).to_arviz()
    assert tree["posterior"]["mean"].dims == ("chain", "draw", "mean_dim_0")
    assert tree["posterior"]["coef"].dims == ("chain", "draw", "task", "coef_dim_0")
    assert tree["log_likelihood"]["obs_per_task"].dims == ("chain", "draw", "task_id")
    assert tree["observed_data"]["obs"].shape == (15,)


def test_networks_take_hyperpriors_by_full_name() -> None:
    net = torch.nn.Linear(1, 1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(a + net(x.unsqueeze(-1)).squeeze(-1), 0.5), obs=y)

    tasks = line_tasks(3, 5)
    with pytest.raises(ValueError, match=r"missing: \['net\$\$\$weight', 'net\$\$\$bias'\]"):
        full_bayes(model, tasks, {}, **SHORT)
    wide = dist.Normal(0.0, 1.0)
    posterior = full_bayes(model, tasks, {"net$$$weight": wide, "net$$$bias": wide}, **SHORT)
    assert posterior.hyperparameters["net$$$weight"].shape == (2, 12, 1, 1)
    assert posterior.hyperparameters["net$$$weight"].std() > 0


def test_seeds_give_the_same_draws_and_leave_no_trace() -> None:
    tasks = _ragged()
    pyro.param("mean", torch.tensor(50.0))
    before, stream = dict(pyro.get_param_store().items()), torch.get_rng_state()
    again, other = (full_bayes(level, tasks, LEVEL, **SHORT, seed=seed).state.draws for seed in (0, 1))
    first = _short().state.draws
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert dict(pyro.get_param_store().items()) == before
    assert torch.equal(torch.get_rng_state(), stream)
    assert not hasattr(LEVEL["mean"], "base_dist")
    with pytest.raises(ValueError, match="support"):  # the user's own distributions still check their values
        dist.Normal(0.0, 1.0, validate_args=True).log_prob(torch.tensor(float("nan")))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sd": None}, ValueError, r"missing: \['sd'\]"),
        ({"tau": dist.HalfNormal(1.0)}, ValueError, r"unknown: \['tau'\]"),
        ({"sd": dist.Normal(10.0, 0.1)}, ValueError, "'sd'.*lives on"),
        ({"sd": dist.Poisson(3.0)}, ValueError, "'sd'.*lives on"),
        ({"mean": dist.Normal(torch.zeros(2), 1.0)}, ValueError, r"has shape \(2,\), the parameter has \(\)"),
        ({"mean": dist.Normal(torch.zeros(2), 1.0).to_event(1)}, ValueError, r"has shape \(2,\)"),
        ({"mean": 0.5}, TypeError, "give a distribution"),
    ],
)
def test_bad_hyperpriors_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    hyperpriors = {name: fn for name, fn in {**LEVEL, **changes}.items() if fn is not None}
    with pytest.raises(error, match=message):
        full_bayes(level, _ragged(), hyperpriors, **SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"noncentered": "yes"}, "noncentered='yes'"), ({"num_draws": 0}, "num_draws=0"), ({"target_accept": 0}, "0.8")],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        full_bayes(level, _ragged(), LEVEL, **{**SHORT, **options})


def test_noncentred_needs_normal_priors() -> None:
    with pytest.raises(ValueError, match=r"noncentered=True .* \['noise'\]"):
        full_bayes(mixed, _ragged(), {"mean": dist.Normal(0.0, 1.0)}, **SHORT, noncentered=True)
    with pytest.raises(TypeError, match="tasks is"):
        full_bayes(level, {"y": torch.zeros(2, 3)}, LEVEL, **SHORT)  # type: ignore[arg-type]


def test_narrower_supports_are_kept() -> None:
    narrow = {**LEVEL, "sd": dist.Uniform(0.5, 0.7)}
    posterior = full_bayes(level, _ragged(), narrow, **SHORT, noncentered=False)
    sd = posterior.hyperparameters["sd"]
    assert ((sd >= 0.5) & (sd <= 0.7)).all()
