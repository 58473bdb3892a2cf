"""The export to ArviZ, on 0.x (InferenceData) and 1.x (DataTree); needs no torch.

Where torch is missing: `python -m pytest --noconftest tests/diagnostics/test_export.py`.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import arviz
import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "bmaml_ppl" / "diagnostics" / "export.py"
NUM_DRAWS, NUM_TASKS, NUM_OBS = 400, 3, 5
NAMES = ["a", "b", "c"]
MASK = np.arange(NUM_OBS) < np.array([5, 2, 4])[:, None]


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


def _make_tree() -> Any:
    rng = np.random.default_rng(0)
    level = 0.1 * rng.normal(size=(1, NUM_DRAWS, NUM_TASKS))
    coef = rng.normal(size=(1, NUM_DRAWS, NUM_TASKS, 2))
    observed = np.where(MASK, rng.normal(size=MASK.shape), 0.0)
    predicted = level[..., None] + rng.normal(size=(1, NUM_DRAWS, *MASK.shape))
    log_likelihood = -0.5 * (observed - level[..., None]) ** 2 - 0.5 * np.log(2 * np.pi)
    flat, coords = export.flatten_observations(observed, MASK, NAMES)
    return export.to_tree(
        posterior={"level": level, "coef": coef},
        posterior_predictive={"obs": export.flatten_observations(predicted, MASK, NAMES)[0]},
        log_likelihood={"obs": export.flatten_observations(log_likelihood, MASK, NAMES)[0]},
        prior={"level": rng.normal(size=(1, 7, NUM_TASKS))},
        prior_predictive={"obs": rng.normal(size=(1, 7, MASK.sum()))},
        observed_data={"obs": flat},
        constant_data={"time": np.arange(flat.size)},
        sample_stats={"lp": rng.normal(size=(1, NUM_DRAWS))},
        coords={"task": NAMES, "term": ["intercept", "slope"]} | coords,
        dims={"level": ["task"], "coef": ["task", "term"], "obs": ["obs_id"], "time": ["obs_id"]},
        attrs={"inference": "svgd"},
    )


def test_groups_dims_and_coords() -> None:
    tree = _make_tree()
    posterior = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats"}
    prior = {"prior", "prior_predictive"}
    assert _groups(tree) == posterior | prior | {"observed_data", "constant_data"}
    draws = _dataset(tree, "posterior")
    assert dict(draws.sizes) == {"chain": 1, "draw": NUM_DRAWS, "task": NUM_TASKS, "term": 2}
    assert draws["coef"].dims == ("chain", "draw", "task", "term")
    assert draws["coef"].sel(task="b", term="slope").shape == (1, NUM_DRAWS)
    assert tree.attrs["inference"] == "svgd"
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


def test_summary_and_loo_run() -> None:
    tree = _make_tree()
    summary = arviz.summary(tree, var_names=["level"])
    assert [name.split("[")[0] for name in summary.index] == ["level"] * NUM_TASKS
    loo = arviz.loo(tree)
    assert loo.n_data_points == MASK.sum()
    assert np.isfinite(float(getattr(loo, "elpd_loo", None) or loo.elpd))


@pytest.mark.parametrize("as_text", [True, False])
def test_netcdf_round_trip(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "tree.nc"
    tree = _make_tree()
    for _ in range(2):
        export.save_tree(tree, str(path) if as_text else path)
    read = arviz.from_netcdf(str(path))
    assert _groups(read) == _groups(tree)
    for group in _groups(tree):
        assert _dataset(read, group).load().equals(_dataset(tree, group)), group
    assert read.attrs["inference"] == "svgd"


def test_zarr_round_trip_or_a_clear_error(tmp_path: Path) -> None:
    tree, path = _make_tree(), tmp_path / "tree.zarr"
    if importlib.util.find_spec("zarr") is None:
        with pytest.raises(ModuleNotFoundError, match="pip install zarr"):
            export.save_tree(tree, path)
        return
    import xarray

    for _ in range(2):
        export.save_tree(tree, path)
    with xarray.open_datatree(path, engine="zarr") as read:
        assert read["posterior"].to_dataset().load().equals(_dataset(tree, "posterior"))


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
