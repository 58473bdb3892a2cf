"""The export to ArviZ, on 0.x (InferenceData) and 1.x (DataTree); needs no torch.

Where torch is missing: `python -m pytest --noconftest tests/diagnostics/test_export.py`.
"""

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

matplotlib.use("Agg")

# Any of its two generations, whose functions differ.
arviz: Any = importlib.import_module("arviz")

PATH = Path(__file__).parents[2] / "bmaml_ppl" / "diagnostics" / "export.py"
OLD = int(arviz.__version__.split(".")[0]) < 1
NUM_CHAINS, NUM_DRAWS, NUM_TASKS, NUM_OBS = 2, 200, 3, 5
NAMES = ["a", "b", "c"]
MASK = np.arange(NUM_OBS) < np.array([5, 2, 4])[:, None]
NOISE = 0.5

# Draws of the least observed tasks are too few for ArviZ's leave-one-out, which says so.
few_draws = pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution")
# ArviZ 0.23's plots still pass what matplotlib 3.11 deprecated, and its `compare` what pandas 3 did.
old_arviz = pytest.mark.filterwarnings(
    "ignore:Passing a dict or None as alias_mapping", "ignore:The inplace keyword in DataFrame"
)


def _load_export() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_alone", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


export = _load_export()


def _dataset(tree: Any, group: str) -> Any:
    node = tree[group]
    return node.to_dataset() if hasattr(node, "to_dataset") else node


def _groups(tree: Any) -> set[str]:
    return set(tree.groups()) if callable(tree.groups) else {name.strip("/") for name in tree.groups} - {""}


def _log_normal(x: np.ndarray, loc: Any, scale: Any) -> np.ndarray:
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def _make_tree(task: str | None = None, spread: float = 1.0) -> Any:
    """What `to_arviz` gives of normal levels, two restarts of Laplace, their sd wrong by a factor; one task, or all."""
    rng = np.random.default_rng(0)
    observed = np.where(MASK, rng.normal(size=(NUM_TASKS, 1)) + NOISE * rng.normal(size=MASK.shape), 0.0)
    precision = 1 + MASK.sum(1) / NOISE**2
    mean, sd = observed.sum(1) / NOISE**2 / precision, spread * precision**-0.5
    draws = (NUM_CHAINS, NUM_DRAWS, NUM_TASKS)
    level, coef = mean + sd * rng.normal(size=draws), rng.normal(size=(*draws, 2))
    before = {"level": rng.normal(size=(1, *draws[1:])), "coef": rng.normal(size=(1, *draws[1:], 2))}
    log_likelihood = _log_normal(observed, level[..., None], NOISE)
    log_prior = {"level": _log_normal(level, 0, 1), "coef": _log_normal(coef, 0, 1).sum(-1)}
    lp = (log_likelihood * MASK).sum(-1) + sum(log_prior.values())
    stats = {"lp": lp, "log_q": _log_normal(level, mean, sd) + log_prior["coef"]}

    def predict(level: np.ndarray) -> dict[str, np.ndarray]:
        return {"obs": flat(level[..., None] + NOISE * rng.normal(size=(*level.shape, NUM_OBS)))}

    kept = slice(None) if task is None else [NAMES.index(task)]

    def flat(values: np.ndarray) -> np.ndarray:
        return np.asarray(export.flatten_observations(values[..., kept, :], MASK[kept])[0])

    def latent(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return values if task is None else {k: v[:, :, NAMES.index(task)] for k, v in values.items()}

    names, own = np.array(NAMES)[kept], ["task"] if task is None else []
    dims = dict.fromkeys(("level", "lp", "log_q", "energy", "diverging"), own)
    return export.to_tree(
        posterior=latent({"level": level, "coef": coef}),
        posterior_predictive=predict(level),
        log_likelihood={"obs": flat(log_likelihood)},
        log_prior=latent(log_prior),
        prior=latent(before),
        prior_predictive=predict(before["level"]),
        observed_data={"obs": flat(observed)},
        constant_data={"time": np.arange(flat(observed).size)},
        sample_stats=latent({**stats, "energy": -lp, "diverging": lp > np.inf}),
        coords={"task": NAMES, "term": ["intercept", "slope"]}
        | export.flatten_observations(observed[kept], MASK[kept], names)[1],
        dims=dims | {"coef": [*own, "term"], "obs": ["obs_id"], "time": ["obs_id"]},
        attrs={"inference": "laplace"},
    )


@pytest.fixture(scope="module")
def tree() -> Any:
    return _make_tree()


@pytest.fixture(scope="module")
def one() -> Any:
    return _make_tree("a")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_groups_dims_and_coords(tree: Any) -> None:
    posterior = {"posterior", "posterior_predictive", "log_likelihood", "log_prior", "sample_stats"}
    prior = {"prior", "prior_predictive"}
    listed = [name for name in (tree.groups() if OLD else tree.groups) if name != "/"]
    assert len(listed) == len(set(listed))
    assert _groups(tree) == posterior | prior | {"observed_data", "constant_data"}
    draws = _dataset(tree, "posterior")
    assert dict(draws.sizes) == {"chain": NUM_CHAINS, "draw": NUM_DRAWS, "task": NUM_TASKS, "term": 2}
    assert draws["coef"].dims == ("chain", "draw", "task", "term")
    assert draws["coef"].sel(task="b", term="slope").shape == (NUM_CHAINS, NUM_DRAWS)
    assert _dataset(tree, "log_prior")["coef"].dims == ("chain", "draw", "task")
    assert tree.attrs["inference"] == "laplace"
    for group, dims in {"observed_data": ("obs_id",), "log_likelihood": ("chain", "draw", "obs_id")}.items():
        obs = _dataset(tree, group)["obs"]
        assert obs.dims == dims
        assert "".join(obs["task"].values) == "aaaaabbcccc"
        assert obs["observation"].values.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]


def test_values_survive() -> None:
    values = np.random.default_rng(1).normal(size=(2, 3, 4))
    tree = export.to_tree(posterior={"x": values}, observed_data={"y": values[0, 0]})
    np.testing.assert_array_equal(_dataset(tree, "posterior")["x"].values, values)
    np.testing.assert_array_equal(_dataset(tree, "observed_data")["y"].values, values[0, 0])
    assert _groups(tree) == {"posterior", "observed_data"}


def test_calibration_needs_no_posterior() -> None:
    pit = np.random.default_rng(1).uniform(size=(1, 50))
    tree = export.to_tree(prior_sbc={"coef[0]": pit, "log_joint": pit**2}, attrs={"inference": "hmc"})
    assert _groups(tree) == {"prior_sbc"}
    np.testing.assert_array_equal(_dataset(tree, "prior_sbc")["coef[0]"].values, pit)
    assert tree.attrs["inference"] == "hmc"


@few_draws
def test_statistics_run(tree: Any) -> None:
    summary = arviz.summary(tree, var_names=["level"])
    assert [name.split("[")[0] for name in summary.index] == ["level"] * NUM_TASKS
    loo = arviz.loo(tree, pointwise=True)
    assert loo.n_data_points == MASK.sum()
    assert np.isfinite(float(getattr(loo, "elpd_loo", None) or loo.elpd))
    assert loo.pareto_k.shape == (MASK.sum(),)
    pit = arviz.loo_pit(tree, y="obs") if OLD else arviz.loo_pit(tree)["obs"]
    assert pit.shape == (MASK.sum(),)


@few_draws
@old_arviz
def test_compare_prefers_the_right_spread(one: Any) -> None:
    table = arviz.compare({"wide": _make_tree("a", spread=3.0), "right": one})
    assert list(table.index) == ["right", "wide"]
    arviz.plot_compare(table)


def _forest(tree: Any) -> Any:
    return arviz.plot_forest(tree, var_names=["level"], combined=True)


def _pair(tree: Any) -> Any:
    return arviz.plot_pair(tree, var_names=["coef"], coords={"task": "a"} if "task" in tree["posterior"].dims else None)


PLOTS: dict[str, Callable[[Any], Any]] = {
    "plot_forest": _forest,
    "plot_pair": _pair,
    "plot_trace": lambda tree: arviz.plot_trace(tree, var_names=["level"]),
    "plot_rank": lambda tree: arviz.plot_rank(tree, var_names=["level"]),
    "plot_khat": lambda tree: arviz.plot_khat(arviz.loo(tree, pointwise=True)),
    "plot_loo_pit": lambda tree: arviz.plot_loo_pit(tree, **({"y": "obs"} if OLD else {})),
}
if OLD:
    PLOTS |= {
        "plot_ppc": lambda tree: arviz.plot_ppc(tree, num_pp_samples=20),
        "plot_ppc of the prior": lambda tree: arviz.plot_ppc(tree, group="prior", num_pp_samples=20),
        "plot_bpv": lambda tree: arviz.plot_bpv(tree, kind="u_value"),
        "plot_dist_comparison": lambda tree: arviz.plot_dist_comparison(tree, var_names=["level"]),
    }
else:
    PLOTS |= {
        "plot_ppc_dist": lambda tree: arviz.plot_ppc_dist(tree, num_samples=20),
        "plot_ppc_dist of the prior": lambda tree: arviz.plot_ppc_dist(tree, group="prior_predictive", num_samples=20),
        "plot_ppc_pit": lambda tree: arviz.plot_ppc_pit(tree),
        "plot_ppc_pit of coverage": lambda tree: arviz.plot_ppc_pit(tree, coverage=True),
        "plot_ppc_tstat": lambda tree: arviz.plot_ppc_tstat(tree),
        "plot_ppc_interval": lambda tree: arviz.plot_ppc_interval(tree),
        "plot_prior_posterior": lambda tree: arviz.plot_prior_posterior(tree, var_names=["level"]),
        "plot_psense_dist": lambda tree: arviz.plot_psense_dist(tree, var_names=["level"]),
    }


@few_draws
@old_arviz
@pytest.mark.parametrize("name", PLOTS)
def test_plots_draw_all_tasks_and_one(name: str, tree: Any, one: Any) -> None:
    for shown in (tree, one):
        PLOTS[name](shown)
        assert any(axes.has_data() for axes in plt.gcf().axes)


@old_arviz
def test_energy_is_that_of_one_task(one: Any) -> None:
    arviz.plot_energy(one)
    assert any(axes.has_data() for axes in plt.gcf().axes)


@pytest.mark.skipif(OLD, reason="ArviZ 0.x has no psense")
def test_power_scaling_sees_prior_and_likelihood(one: Any) -> None:
    table = arviz.psense_summary(one, var_names=["level", "coef"])
    assert list(table.index) == ["level", "coef[intercept]", "coef[slope]"]
    assert float(table["likelihood"]["level"]) > 0.05
    # Data say nothing of coef, and a unit normal moves with its power.
    assert float(table["prior"]["coef[slope]"]) > 0.05 > float(table["likelihood"]["coef[slope]"])


@pytest.mark.skipif(OLD, reason="ArviZ 0.x has no loo_approximate_posterior")
@few_draws
def test_leave_one_out_knows_the_approximation() -> None:
    plain, corrected = {}, {}
    for spread in (1.0, 2.0):
        tree = _make_tree("a", spread)
        plain[spread] = arviz.loo(tree).elpd
        corrected[spread] = arviz.loo_approximate_posterior(
            tree, tree["sample_stats"]["lp"], tree["sample_stats"]["log_q"]
        ).elpd
    assert abs(plain[2.0] - plain[1.0]) > 3
    assert abs(corrected[2.0] - corrected[1.0]) < 0.3
    # Of all tasks at once, each observation takes the densities of its own task.
    tree = _make_tree(spread=2.0)
    task, stats = tree["log_likelihood"]["task"], tree["sample_stats"]
    loo = arviz.loo_approximate_posterior(
        tree, stats["lp"].sel(task=task), stats["log_q"].sel(task=task), pointwise=True
    )
    assert loo.elpd_i.shape == (MASK.sum(),)
    assert abs(float(loo.elpd_i[task == "a"].sum()) - corrected[2.0]) < 1e-6


@pytest.mark.skipif(OLD, reason="ArviZ 0.x has no plot_ecdf_pit")
def test_calibration_is_drawn() -> None:
    pit = np.random.default_rng(1).uniform(size=(1, 60))
    arviz.plot_ecdf_pit(export.to_tree(prior_sbc={"coef[0]": pit, "log_joint": pit**2}))
    assert any(axes.has_data() for axes in plt.gcf().axes)


def test_khat_tells_narrow_proposals_from_wide_ones() -> None:
    # Target N(0, 1). From N(0, s), the ratios' tail index is 1 - s^2 for s < 1, and 0 or less for s >= 1 (bounded).
    draws = np.random.default_rng(2).normal(size=(3, 4000))
    scale = np.array([0.2, 1.0, 1.5])[:, None]
    khat = export.pareto_khat(_log_normal(scale * draws, 0, 1) - _log_normal(scale * draws, 0, scale))
    assert khat.shape == (3,)
    assert khat[0] > 0.7
    assert khat[1] == 0
    assert khat[2] < 0.1


def test_khat_of_what_is_no_tail() -> None:
    ratios = np.random.default_rng(3).normal(size=(4, 100))
    ratios[0] *= 1e-4
    ratios[1, 3] = np.nan
    ratios[2] = -np.inf
    ratios[3, :40] = -np.inf
    kept = ratios.copy()
    khat = export.pareto_khat(ratios)
    assert khat[:3].tolist() == [0, np.inf, np.inf]
    assert np.isfinite(khat[3])
    np.testing.assert_array_equal(ratios, kept)
    for bad in (np.zeros(29), np.zeros(())):
        with pytest.raises(ValueError, match="30 draws or more"):
            export.pareto_khat(bad)


@pytest.mark.parametrize("as_text", [True, False])
def test_netcdf_round_trip(tmp_path: Path, as_text: bool, tree: Any) -> None:
    path = tmp_path / "tree.nc"
    for _ in range(2):
        export.save_tree(tree, str(path) if as_text else path)
    read = arviz.from_netcdf(str(path))
    assert _groups(read) == _groups(tree)
    for group in _groups(tree):
        assert _dataset(read, group).load().equals(_dataset(tree, group)), group
    assert read.attrs["inference"] == "laplace"


def test_zarr_round_trip_or_a_clear_error(tmp_path: Path, tree: Any) -> None:
    path = tmp_path / "tree.zarr"
    if importlib.util.find_spec("zarr") is None:
        with pytest.raises(ModuleNotFoundError, match="pip install zarr"):
            export.save_tree(tree, path)
        return
    import xarray

    for _ in range(2):
        export.save_tree(tree, path)
    with xarray.open_datatree(path, engine="zarr") as read:
        for group in _groups(tree):
            assert read[group].to_dataset().load().equals(_dataset(tree, group)), group


def test_flatten_keeps_leading_and_event_dimensions() -> None:
    values = np.random.default_rng(2).normal(size=(2, 4, *MASK.shape, 6))
    flat, coords = export.flatten_observations(values, MASK, dim="pixel", event_ndim=1)
    np.testing.assert_array_equal(flat, values[:, :, MASK])
    assert coords["pixel"]["task"].tolist() == [0] * 5 + [1] * 2 + [2] * 4
    full, coords = export.flatten_observations(values[..., 0], task_names=("x", 2, None))
    np.testing.assert_array_equal(full, values[..., 0].reshape(2, 4, -1))
    assert set(coords["obs_id"]["task"]) == {"x", "2", "None"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"values": np.zeros(4)}, r"\(4,\).*\(\.\.\., T, N\)"),
        ({"values": np.zeros((3, 4)), "mask": np.ones((4, 3), dtype=bool)}, r"\(4, 3\).*\(3, 4\)"),
        ({"values": np.zeros((3, 4)), "mask": np.ones((3, 4))}, "float64.*bool"),
        ({"values": np.zeros((3, 4)), "task_names": ["a"]}, "1 task names for 3 tasks"),
    ],
)
def test_flatten_errors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.flatten_observations(**kwargs)


def test_tree_errors() -> None:
    x = np.zeros((1, 5, 3))
    with pytest.raises(ValueError, match=r"posterior\['x'\].*chain, draw"):
        export.to_tree(posterior={"x": x[0, :, 0]})
    with pytest.raises(ValueError, match=r"log_likelihood\['y'\].*\(1, 4\).*\(1, 5\)"):
        export.to_tree(posterior={"x": x}, log_likelihood={"y": x[:, :4]})
    labels = export.flatten_observations(x)[1]
    with pytest.raises(ValueError, match="'task' names both"):
        export.to_tree(
            posterior={"x": x},
            constant_data={"age": np.zeros(1), "time": np.zeros(15)},
            dims={"age": ["task"], "time": ["obs_id"]},
            coords=labels,
        )


@pytest.mark.parametrize("name", ["tree.json", "tree"])
def test_save_rejects_other_formats(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"\.nc or \.zarr"):
        export.save_tree(None, tmp_path / name)


def test_export_imports_neither_torch_nor_arviz() -> None:
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "sys.exit(' '.join({'torch', 'arviz', 'pyro'} & sys.modules.keys()) or 0)"
    )
    command = [sys.executable, "-c", code, str(PATH)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
