"""Read tables and lists into padded columns, and say what is wrong with them in the user's words."""

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "Columns",
    "Table",
    "check_episode",
    "check_known",
    "check_names",
    "check_shapes",
    "check_tensor",
    "check_values",
    "find_positions",
    "read_frame",
    "read_list",
    "support_sizes",
]

Columns = Mapping[str, str | Sequence[str]]
ENCODE = "encode it as numbers first (0/1 indicators for categories, elapsed time for dates)"


class Table(NamedTuple):
    """Padded columns: data `(T, N, ...)`, constants `(T, ...)`, mask bool `(T, N)` and T names."""

    data: dict[str, Tensor]
    constants: dict[str, Tensor]
    mask: Tensor
    names: tuple[str, ...]


def read_frame(frame: "DataFrame", task: str, groups: Mapping[str, Columns], min_observations: int) -> Table:
    """Groups the rows of a data frame by the column `task`; `Tasks.from_frame` tells the rules."""
    _check_frame(frame, task, groups)
    codes, labels = frame[task].factorize()
    if (codes < 0).any():
        missing = frame.index[codes < 0][:5].tolist()
        raise ValueError(f"column {task!r} labels the task but is missing at index {missing}; drop or label those rows")
    counts = np.bincount(codes)
    if counts.max() < min_observations:
        raise ValueError(
            f"no task has min_observations={min_observations} rows, the longest has {counts.max()}; "
            "lower min_observations"
        )
    if counts.min() < min_observations:
        return read_frame(frame[counts[codes] >= min_observations], task, groups, min_observations)
    rows = _Rows(frame, codes, counts, tuple(str(label) for label in labels))
    data = {key: rows.pad(columns) for key, columns in {**groups["inputs"], **groups["outputs"]}.items()}
    constants = {key: rows.reduce(columns) for key, columns in groups["constants"].items()}
    return Table(data, constants, torch.as_tensor(np.arange(counts.max()) < counts[:, None]), rows.names)


class _Rows(NamedTuple):
    frame: "DataFrame"
    codes: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]

    def read(self, columns: str | Sequence[str]) -> np.ndarray:
        """Returns float64 `(R,)` for one column or `(R, C)` for a list of them."""
        if not isinstance(columns, str):
            return np.stack([self.read(column) for column in columns], -1)
        series = self.frame[columns]
        if getattr(series.dtype, "kind", "O") not in "fiub":
            raise TypeError(
                f"column {columns!r} holds {series.dtype} (task {self.names[0]!r} starts with "
                f"{series.iloc[0]!r}), "
                f"not numbers; {ENCODE}"
            )
        values: np.ndarray = series.to_numpy(dtype="float64", na_value=np.nan)
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(
                f"column {columns!r} of task {self.names[self.codes[row]]!r} is {values[row]} at index "
                f"{self.frame.index[row]!r}; drop or impute it"
            )
        return values

    def pad(self, columns: str | Sequence[str]) -> Tensor:
        values = self.read(columns)
        order = np.argsort(self.codes, kind="stable")
        starts = np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        padded = np.zeros((len(self.counts), self.counts.max(), *values.shape[1:]))
        padded[self.codes[order], np.arange(len(order)) - starts] = values[order]
        return torch.as_tensor(padded, dtype=torch.get_default_dtype())

    def reduce(self, columns: str | Sequence[str]) -> Tensor:
        values = self.read(columns)
        firsts = values[np.unique(self.codes, return_index=True)[1]]
        varies = (values != firsts[self.codes]).reshape(len(values), -1).any(1)
        if varies.any():
            name = self.names[self.codes[np.flatnonzero(varies)[0]]]
            raise ValueError(f"constant column {columns!r} takes several values within task {name!r}; make it an input")
        return torch.as_tensor(firsts, dtype=torch.get_default_dtype())


def _check_frame(frame: "DataFrame", task: str, groups: Mapping[str, Columns]) -> None:
    keys = [key for group in groups.values() for key in group]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"keywords {repeated} are used twice among inputs, outputs and constants; give each one name")
    check_known("task", [task], frame.columns)
    for kind, group in groups.items():
        for columns in group.values():
            check_known(kind, [columns] if isinstance(columns, str) else columns, frame.columns)
    if not frame.columns.is_unique:
        raise ValueError(
            f"the frame repeats the columns {sorted(set(frame.columns[frame.columns.duplicated()]))}; rename them"
        )
    if len(frame) == 0:
        raise ValueError("got an empty frame; each task needs at least one row")


def read_list(tasks: Sequence[Mapping[str, Any]], constants: Sequence[str], names: Sequence[str] | None) -> Table:
    """Stacks tasks given one by one; `Tasks.from_list` tells the rules."""
    if len(tasks) == 0:
        raise ValueError("got no tasks; give at least one mapping of column name to values")
    labels = tuple(names) if names is not None else tuple(f"task {i}" for i in range(len(tasks)))
    if len(labels) != len(tasks):
        raise ValueError(f"got {len(labels)} names for {len(tasks)} tasks; give one name per task")
    check_known("constants", constants, tasks[0])
    rows = [_read_task(task, tasks[0], name) for task, name in zip(tasks, labels, strict=True)]
    columns = [column for column in tasks[0] if column not in constants]
    if not columns:
        raise ValueError(
            f"all columns {sorted(tasks[0])} are constants; tasks need at least one column of observations"
        )
    counts = torch.tensor([_count_rows(row, columns, name) for row, name in zip(rows, labels, strict=True)])
    data = {column: _stack(rows, column, labels, int(counts.max())) for column in columns}
    fixed = {column: _stack(rows, column, labels, None) for column in constants}
    mask = torch.arange(int(counts.max())) < counts[:, None]
    return Table(data, fixed, mask.to(data[columns[0]].device), labels)


def _read_task(task: Mapping[str, Any], first: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    check_known(f"columns of task {name!r}", task, first)
    missing = [column for column in first if column not in task]
    if missing:
        raise ValueError(
            f"task {name!r} lacks the columns {missing} of the first task; give every task the same columns"
        )
    return {column: _read_values(values, column, name) for column, values in task.items()}


def _read_values(values: object, column: str, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"column {column!r} of task {name!r} is not a rectangular array: {error}") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"column {column!r} of task {name!r} holds {array.dtype}, not numbers; {ENCODE}")
    dtype = {"f": torch.get_default_dtype(), "b": torch.bool}.get(array.dtype.kind, torch.int64)
    return torch.as_tensor(array.tolist() if array.dtype.kind == "u" else array.copy(), dtype=dtype)


def _count_rows(row: Mapping[str, Tensor], columns: Sequence[str], name: str) -> int:
    for column in columns:
        if row[column].ndim == 0:
            raise ValueError(f"column {column!r} of task {name!r} is a single number; name it in constants={[column]}")
    counts = {column: len(row[column]) for column in columns}
    if len(set(counts.values())) > 1:
        raise ValueError(f"task {name!r} has columns of unequal length {counts}; give each observation all columns")
    return counts[columns[0]]


def _stack(rows: Sequence[Mapping[str, Tensor]], column: str, names: Sequence[str], length: int | None) -> Tensor:
    values = [row[column] for row in rows]
    start = 0 if length is None else 1
    for value, name in zip(values, names, strict=True):
        if value.shape[start:] != values[0].shape[start:]:
            raise ValueError(
                f"column {column!r} of task {name!r} has components {tuple(value.shape[start:])}, of task "
                f"{names[0]!r} "
                f"{tuple(values[0].shape[start:])}; give all tasks the same"
            )
    dtype = reduce(torch.promote_types, (value.dtype for value in values))
    if length is None:
        return torch.stack([value.to(dtype) for value in values])
    padded = values[0].new_zeros((len(values), length, *values[0].shape[1:]), dtype=dtype)
    for i, value in enumerate(values):
        padded[i, : len(value)] = value
    return padded


def check_known(what: str, given: Iterable[str], allowed: Collection[str]) -> None:
    """Raises ValueError for the first given name that is not allowed, with the nearest one that is."""
    for name in given:
        if name not in allowed:
            near = get_close_matches(str(name), [str(item) for item in allowed], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{what}: unknown name {name!r}; {hint}allowed are {[str(item) for item in allowed]}")


def check_tensor(column: str, value: object) -> None:
    """Raises TypeError unless the value is a real tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"column {column!r} is a {type(value).__name__}, not a tensor; write Tasks.from_list or torch.tensor"
        )
    if value.is_complex():
        raise TypeError(f"column {column!r} is {value.dtype}; give its real and imaginary part as two columns")


def check_shapes(data: Mapping[str, Tensor], constants: Mapping[str, Tensor], mask: Tensor | None) -> int:
    """Returns the number of tasks; raise ValueError where shapes disagree."""
    if not data:
        raise ValueError("data is empty; give at least one column of shape (tasks, observations, ...)")
    first = next(iter(data))
    for column, value in data.items():
        if value.ndim < 2 or value.numel() == 0:
            raise ValueError(
                f"column {column!r} has shape {tuple(value.shape)}; "
                "data is (tasks, observations, ...) and not empty, "
                "what is known once per task belongs in constants"
            )
        if value.shape[:2] != data[first].shape[:2]:
            raise ValueError(
                f"column {column!r} has (tasks, observations) {tuple(value.shape[:2])}, column {first!r} "
                f"{tuple(data[first].shape[:2])}; make them equal, padding with zeros under a mask"
            )
    num_tasks = len(data[first])
    for column, value in constants.items():
        if value.ndim == 0 or len(value) != num_tasks:
            raise ValueError(
                f"constant {column!r} has shape {tuple(value.shape)}; its first size must be the {num_tasks} tasks"
            )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != data[first].shape[:2]):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; give torch.bool {tuple(data[first].shape[:2])}, True where real"
        )
    return num_tasks


def check_names(
    names: Sequence[str],
    num_tasks: int,
    data: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    outputs: Sequence[str],
) -> None:
    """Raises ValueError unless names are one a task, distinct, and outputs are columns of data."""
    if len(names) != num_tasks:
        raise ValueError(f"got {len(names)} names for {num_tasks} tasks; give one name per task")
    if len(set(names)) < num_tasks:
        repeated = sorted({name for name in names if names.count(name) > 1})[:5]
        raise ValueError(f"task names {repeated} are used twice; give every task its own")
    both = sorted(set(data) & set(constants))
    if both:
        raise ValueError(f"columns {both} are in data and in constants; keep each in one of them")
    check_known("outputs", outputs, data)


def check_values(
    data: Mapping[str, Tensor], constants: Mapping[str, Tensor], mask: Tensor | None, names: Sequence[str]
) -> None:
    """Raises ValueError for an empty task, a value that is not finite, or padding that is not zero."""
    if mask is not None and not bool(mask.any(1).all()):
        raise ValueError(f"task {names[int(mask.any(1).int().argmin())]!r} has no observation; leave it out")
    for column, value in {**data, **constants}.items():
        dims = 2 if column in data else 1
        finite = value.isfinite().reshape(*value.shape[:dims], -1).all(-1)
        if not bool(finite.all()):
            cell = (~finite).nonzero()[0].tolist()
            where = f" in observation {cell[1]}" if dims == 2 else ""
            raise ValueError(
                f"column {column!r} of task {names[cell[0]]!r} is NaN or infinite{where}; drop or impute it"
            )
    if mask is None:
        return
    for column, value in data.items():
        full = (value != 0).reshape(*value.shape[:2], -1).any(-1) & ~mask
        if bool(full.any()):
            cell = full.nonzero()[0].tolist()
            raise ValueError(
                f"column {column!r} of task {names[cell[0]]!r} is not zero in padded observation {cell[1]}; "
                "set padding to zero or mark it True in mask"
            )


def find_positions(key: object, names: Sequence[str]) -> list[int]:
    """Turns an int, name, slice, or list or tensor of these into positions among the names."""
    if isinstance(key, slice):
        items: list[Any] = list(range(len(names)))[key]
    elif isinstance(key, Tensor):
        items = (key.nonzero().flatten() if key.dtype == torch.bool else key.flatten()).tolist()
    else:
        items = list(key) if isinstance(key, Iterable) and not isinstance(key, str) else [key]
    positions = [_find_position(item, names) for item in items]
    if not positions:
        raise ValueError(f"{key!r} selects none of the {len(names)} tasks; select at least one")
    return positions


def _find_position(item: SupportsIndex | str, names: Sequence[str]) -> int:
    if isinstance(item, str):
        if item not in names:
            near = get_close_matches(item, names, n=1, cutoff=0.5)
            raise KeyError(
                f"no task is named {item!r}; did you mean {near[0]!r}?" if near else f"no task is named {item!r}"
            )
        return names.index(item)
    if isinstance(item, bool):
        raise TypeError("got a Python bool as a task's position; give torch.tensor([...]) of bools to select by mask")
    position = operator.index(item)
    if not -len(names) <= position < len(names):
        raise IndexError(f"task {position} is out of range; there are {len(names)} tasks")
    return position % len(names)


def support_sizes(num_support: int | range) -> Sequence[int]:
    """Returns the numbers of support rows that may be drawn."""
    return num_support if isinstance(num_support, range) else (num_support,)


def check_episode(
    num_support: int | range,
    generator: torch.Generator | None,
    num_query: int | None,
    counts: Tensor,
    names: Sequence[str],
) -> None:
    """Raises unless every task, with counts `(T,)` observations, has the support rows and one query row."""
    if isinstance(num_support, bool) or not isinstance(num_support, int | range):
        raise TypeError(f"num_support is {num_support!r}; give an int, or a range to draw it per task")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {generator!r}; give torch.Generator().manual_seed(...)")
    if isinstance(num_support, range) and generator is None:
        raise ValueError(f"num_support={num_support} is drawn per task; give a generator, or an int")
    sizes = support_sizes(num_support)
    if len(sizes) == 0 or min(sizes) < 0 or max(sizes) < 1:
        raise ValueError(f"num_support is {num_support}; give at least 1 support row")
    if num_query is not None and num_query < 1:
        raise ValueError(f"num_query is {num_query}; give at least 1, or None for all the rest")
    short = (counts <= max(sizes)).nonzero().flatten().tolist()
    if short:
        found = {names[i]: int(counts[i]) for i in short[:5]}
        raise ValueError(
            f"num_support={num_support} leaves no query row in {len(short)} of {len(names)} tasks, whose "
            "numbers "
            f"of observations are {found}{' ...' if len(short) > 5 else ''}; drop them or lower num_support"
        )
