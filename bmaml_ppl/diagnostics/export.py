"""Export to ArviZ: numpy arrays in, a tree of labelled groups out, on ArviZ 0.x and 1.x alike.

This is the only module that imports ArviZ (inside its functions), and it imports no torch.

Particles and draws of an approximate posterior go out as `chain=1` x `draw=S`: with ArviZ's single `sample`
dimension `loo` and `summary` fail. Observations go out flat, `(obs_id,)` with the task of each as a
coordinate: with a `(task, obs)` pair of dimensions `metrics` and `plot_ppc_pit` fail, and padding counts.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

__all__ = ["flatten_observations", "pareto_khat", "save_tree", "to_tree"]

Arrays: TypeAlias = Mapping[str, np.ndarray]
Coords: TypeAlias = Mapping[str, Any]

_FAMILIES = (
    ("posterior", "posterior_predictive", "log_likelihood", "log_prior", "sample_stats"),
    ("prior", "prior_predictive"),
    ("prior_sbc",),
)
# ArviZ 0.x's `from_dict` drops these without a word, and reads them from files all the same.
_ADDED = ("log_prior", "prior_sbc")
_ENGINES: dict[str, dict[str, tuple[str, ...]]] = {
    ".nc": {"h5netcdf": ("h5netcdf", "h5py"), "netcdf4": ("netCDF4",)},
    ".zarr": {"zarr": ("zarr",)},
}
_FEWEST_RATIOS = 30
_EQUAL_RATIOS = 0.01


def to_tree(
    *,
    posterior: Arrays | None = None,
    posterior_predictive: Arrays | None = None,
    log_likelihood: Arrays | None = None,
    log_prior: Arrays | None = None,
    prior: Arrays | None = None,
    prior_predictive: Arrays | None = None,
    observed_data: Arrays | None = None,
    constant_data: Arrays | None = None,
    sample_stats: Arrays | None = None,
    prior_sbc: Arrays | None = None,
    coords: Coords | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Builds the tree that ArviZ's statistics and plots read.

    References:
        The InferenceData schema, https://python.arviz.org/en/stable/schema/schema.html

    Args:
        posterior: Draws by site, each `(chain, draw, ...)`.
        posterior_predictive: Predicted observations by site, each `(chain, draw, ...)`.
        log_likelihood: Pointwise log-likelihoods by observed site (nats), each `(chain, draw, ...)`.
        log_prior: Log densities by site (nats) of the posterior's draws under the prior, each `(chain, draw, ...)`;
            `psense` of ArviZ 1.x reads them.
        prior: Draws from the prior by site, each `(chain, draw, ...)`; may hold other numbers of draws.
        prior_predictive: Predictions from the prior by site, each `(chain, draw, ...)`.
        observed_data: Observations by site, without sample dimensions.
        constant_data: Inputs by name, without sample dimensions.
        sample_stats: Statistics of the draws by name, each `(chain, draw, ...)`.
        prior_sbc: PIT values in [0, 1] of simulation-based calibration by quantity, each `(1, simulation, ...)`;
            `plot_ecdf_pit` of ArviZ 1.x reads them.
        coords: By dimension, either its index values, or a mapping of labels `{name: values}` that lie along
            it, as `flatten_observations` gives them.
        dims: By variable, the names of its dimensions after `(chain, draw)`.
        attrs: What to note on the tree as a whole (strings and numbers).

    Returns:
        `InferenceData` on ArviZ 0.x, `xarray.DataTree` on ArviZ 1.x.

    Raises:
        ValueError: If a sampled array lacks `(chain, draw)`, or the arrays of one group disagree about them.
    """
    sampled = {
        "posterior": posterior,
        "posterior_predictive": posterior_predictive,
        "log_likelihood": log_likelihood,
        "log_prior": log_prior,
        "sample_stats": sample_stats,
        "prior": prior,
        "prior_predictive": prior_predictive,
        "prior_sbc": prior_sbc,
    }
    groups = _as_arrays(sampled)
    for family in _FAMILIES:
        _check_samples({name: groups[name] for name in family if name in groups})
    groups |= _as_arrays({"observed_data": observed_data, "constant_data": constant_data})
    labels = {dim: values for dim, values in (coords or {}).items() if isinstance(values, Mapping)}
    index = {dim: np.asarray(values) for dim, values in (coords or {}).items() if dim not in labels}
    names = {variable: list(axes) for variable, axes in (dims or {}).items()}
    return _attach_labels(_build_tree(groups, index, names, dict(attrs or {})), list(groups), labels)


def _as_arrays(groups: Mapping[str, Arrays | None]) -> dict[str, dict[str, np.ndarray]]:
    return {
        group: {name: np.asarray(values) for name, values in arrays.items()}
        for group, arrays in groups.items()
        if arrays
    }


def _check_samples(groups: Mapping[str, Arrays]) -> None:
    shapes = {f"{group}[{name!r}]": array.shape for group, arrays in groups.items() for name, array in arrays.items()}
    for name, shape in shapes.items():
        first, expected = next(iter(shapes.items()))
        if len(shape) < 2:
            raise ValueError(
                f"{name} has shape {shape}; sampled arrays are (chain, draw, ...). "
                f"Write values[None] to give (draw, ...) its one chain."
            )
        if shape[:2] != expected[:2]:
            raise ValueError(
                f"{name} has (chain, draw) = {shape[:2]} and {first} has {expected[:2]}; "
                "they must be the same draws. Export the same draws in every group."
            )


def _build_tree(groups: dict[str, Any], index: Coords, dims: Mapping[str, list[str]], attrs: dict[str, Any]) -> Any:
    import arviz

    known = {group: arrays for group, arrays in groups.items() if group not in _ADDED}
    if _is_old(arviz):
        tree = arviz.from_dict(**known, coords=index, dims=dims, attrs=attrs)
    else:
        tree = arviz.from_dict(known, sample_dims=["chain", "draw"], coords=index, dims=dims, attrs={"/": attrs})
    for group in groups.keys() - known.keys():
        # Log densities lack the dimensions of one event.
        fitting = {name: dims[name][: array.ndim - 2] for name, array in groups[group].items() if name in dims}
        dataset = arviz.dict_to_dataset(groups[group], coords=index, dims=fitting)
        tree.add_groups({group: dataset}) if _is_old(arviz) else tree.update({group: type(tree)(dataset)})
    return tree


def _is_old(arviz: Any) -> bool:
    return int(arviz.__version__.split(".")[0]) < 1


def _attach_labels(tree: Any, groups: Sequence[str], labels: Mapping[str, Mapping[str, Any]]) -> Any:
    for group in groups:
        sizes = tree[group].sizes
        for dim in labels.keys() & sizes.keys():
            if clash := labels[dim].keys() & sizes.keys():
                raise ValueError(
                    f"In {group}, {min(clash)!r} names both a dimension and a label along {dim!r}; "
                    "each name may have one meaning in a group. Rename the dimension in `dims`."
                )
            along = {name: (dim, np.asarray(values)) for name, values in labels[dim].items()}
            _assign_coords(tree, group, along)
    return tree


def _assign_coords(tree: Any, group: str, coords: dict[str, Any]) -> None:
    node = tree[group]
    if hasattr(node, "dataset"):
        node.dataset = node.to_dataset().assign_coords(coords)
    else:
        setattr(tree, group, node.assign_coords(coords))  # assigning an item would list the group twice


def flatten_observations(
    values: np.ndarray,
    mask: np.ndarray | None = None,
    task_names: Sequence[Any] | None = None,
    *,
    dim: str = "obs_id",
    event_ndim: int = 0,
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """Lays the observations of all tasks end to end and leaves the padding out.

    Use it alike for predictions, log-likelihoods and observed data; the coordinates go to `to_tree`.

    Args:
        values: Padded values `(..., T, N)` of T tasks with at most N observations each.
        mask: True where an observation is real, `(T, N)`; None if no task is padded.
        task_names: The T names; None names them 0..T-1.
        dim: What to call the flat dimension; sites with different masks need different names.
        event_ndim: How many dimensions of one observation follow N (0 for scalars).

    Returns:
        The real values `(..., num_real)`, task by task, and the coordinates along `dim`: the `task` of each
        observation and `observation`, its place 0..N-1 within the task.

    Raises:
        ValueError: If the shapes of values, mask and names disagree.
    """
    values = np.asarray(values)
    axis = values.ndim - event_ndim - 2
    if axis < 0:
        raise ValueError(
            f"values has shape {values.shape}; with event_ndim={event_ndim} it needs (..., T, N) and "
            f"{event_ndim} more. Write values[None] for one task."
        )
    shape = values.shape[axis : axis + 2]
    real = _as_mask(mask, shape)
    task, observation = np.nonzero(real)
    flat = values.reshape(*values.shape[:axis], -1, *values.shape[axis + 2 :])
    flat = np.compress(real.reshape(-1), flat, axis=axis)
    return flat, {dim: {"task": _as_names(task_names, shape[0])[task], "observation": observation}}


def _as_mask(mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    real = np.ones(shape, dtype=bool) if mask is None else np.asarray(mask)
    if real.shape != shape or real.dtype != bool:
        raise ValueError(
            f"mask is {real.dtype} of shape {real.shape}; it must be bool of shape (T, N) = {shape}, "
            "True where an observation is real."
        )
    return real


def _as_names(names: Sequence[Any] | None, num_tasks: int) -> np.ndarray:
    array = np.arange(num_tasks) if names is None else np.asarray(list(names))
    if array.shape != (num_tasks,):
        raise ValueError(f"Got {array.shape[0]} task names for {num_tasks} tasks. Give one name a task, or None.")
    return array.astype(str) if array.dtype == object else array


def save_tree(tree: Any, path: str | Path) -> None:
    """Writes a tree to a file that ArviZ and xarray read on any version; what is there is replaced.

    Args:
        tree: What `to_tree` gave.
        path: Ends in `.nc` for netCDF (`arviz.from_netcdf` reads it) or `.zarr` for Zarr
            (`xarray.open_datatree(path, engine="zarr")` reads it).

    Raises:
        ValueError: If the path ends otherwise.
        ModuleNotFoundError: If no package that writes the format is installed.
    """
    path = Path(path)
    if path.suffix not in _ENGINES:
        raise ValueError(f"Got the path '{path}'; a tree is saved as .nc or .zarr. Write '{path.with_suffix('.nc')}'.")
    engine = _find_engine(path.suffix)
    if engine == "zarr":
        tree = tree.to_datatree() if hasattr(tree, "to_datatree") else tree
        tree.to_zarr(path, mode="w", zarr_format=2)
    else:
        tree.to_netcdf(str(path), engine=engine)


def _find_engine(suffix: str) -> str:
    for engine, modules in _ENGINES[suffix].items():
        if all(importlib.util.find_spec(module) for module in modules):
            return engine
    packages = " or ".join(" ".join(modules) for modules in _ENGINES[suffix].values())
    raise ModuleNotFoundError(f"Saving to {suffix} needs {packages}. Run: pip install {modules[-1]}")


def pareto_khat(log_ratios: np.ndarray) -> np.ndarray:
    """Shape of the Pareto tail of importance ratios: above about 0.7, what drew them misses much of the target.

    References:
        Yao et al. (2018), Yes, but did it work?: evaluating variational inference, section 3.1.
        Vehtari et al. (2024), Pareto smoothed importance sampling, equation 13 for what is too large at S draws:
        min(1 - 1 / log10 S, 0.7).

    Args:
        log_ratios: Log of target over proposal at S draws from the proposal, up to a constant, `(..., S)`: of a
            Laplace posterior, `lp - log_q` of `sample_stats`.

    Returns:
        k-hat, `(...)`; 0 where the largest ratios are all within a hundredth of each other, inf where some are not
        numbers.

    Raises:
        ValueError: If there are fewer than 30 draws, too few for a tail.
    """
    ratios = np.array(log_ratios, dtype=float)
    if ratios.ndim == 0 or ratios.shape[-1] < _FEWEST_RATIOS:
        raise ValueError(
            f"log_ratios has shape {ratios.shape}; k-hat needs (..., S) with S of {_FEWEST_RATIOS} draws or more"
        )
    return np.apply_along_axis(_fit_tail, -1, ratios)


def _fit_tail(log_ratios: np.ndarray) -> float:
    import arviz

    largest = np.sort(log_ratios)[-int(min(len(log_ratios) / 5, 3 * len(log_ratios) ** 0.5)) - 1 :]
    if not np.isfinite(largest[-1]):
        return np.inf
    if largest[-1] - largest[0] < _EQUAL_RATIOS:  # rounding has no tail
        return 0.0
    if _is_old(arviz):
        return float(arviz.psislw(log_ratios)[1])
    from arviz_stats.base import array_stats

    return float(array_stats.psislw(-log_ratios)[1])  # 1.x takes the logarithm of the inverse
