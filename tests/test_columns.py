"""What the door of Tasks lets in, and what it says to the rest: messages name the task and the column."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bmaml_ppl.tasks import Tasks

# --- the door: tensors ------------------------------------------------------------

ONES = torch.ones(2, 3)
HALF = torch.tensor([[True, True, True], [True, True, False]])


def put(value: float) -> Tensor:
    tensor = torch.ones(2, 3)
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"data": {}}, ValueError, "data is empty"),
        ({"data": {"x": [[1.0]]}}, TypeError, "column 'x' is a list, not a tensor; write Tasks.from_list"),
        ({"data": {"x": ONES.to(torch.complex64)}}, TypeError, "column 'x' is torch.complex64"),
        ({"data": {"x": torch.ones(3)}}, ValueError, r"column 'x' has shape \(3,\).*constants"),
        ({"data": {"x": torch.ones(2, 0)}}, ValueError, r"column 'x' has shape \(2, 0\)"),
        (
            {"data": {"x": ONES, "y": torch.ones(2, 4)}},
            ValueError,
            r"column 'y' has.*\(2, 4\), column 'x' \(2, 3\)",
        ),
        ({"data": {"x": ONES}, "constants": {"c": torch.ones(3)}}, ValueError, "constant 'c'.*the 2 tasks"),
        (
            {"data": {"x": ONES}, "constants": {"x": torch.ones(2)}},
            ValueError,
            r"\['x'\] are in data and in constants",
        ),
        ({"data": {"x": ONES}, "mask": torch.ones(2, 3)}, ValueError, "mask is torch.float32"),
        ({"data": {"x": ONES}, "mask": HALF[:, :2]}, ValueError, r"mask is torch.bool \(2, 2\)"),
        ({"data": {"x": ONES}, "names": ("a",)}, ValueError, "got 1 names for 2 tasks"),
        ({"data": {"x": ONES}, "names": ("a", "a")}, ValueError, r"names \['a'\] are used twice"),
        (
            {"data": {"time": ONES}, "outputs": ("tme",)},
            ValueError,
            "outputs: unknown name 'tme'; did you mean 'time'",
        ),
        (
            {"data": {"x": put(torch.nan)}},
            ValueError,
            "column 'x' of task 'task 1' is NaN or infinite in observation 2",
        ),
        ({"data": {"x": put(torch.inf)}, "names": ("a", "b")}, ValueError, "column 'x' of task 'b'"),
        (
            {"data": {"x": ONES}, "constants": {"c": torch.tensor([0.0, torch.nan])}},
            ValueError,
            "column 'c' of task 'task 1' is NaN or infinite; drop",
        ),
        (
            {"data": {"x": ONES}, "mask": HALF},
            ValueError,
            "column 'x' of task 'task 1' is not zero in padded observation 2",
        ),
        (
            {"data": {"x": 0 * ONES}, "mask": HALF & HALF[1:] & ~HALF[:1]},
            ValueError,
            "task 'task 0' has no observation",
        ),
    ],
)
def test_the_door_refuses(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Tasks(**fields)


def test_defaults_are_filled() -> None:
    tasks = Tasks({"x": ONES}, mask=torch.ones(2, 3, dtype=torch.bool))
    assert tasks.names == ("task 0", "task 1")
    assert tasks.mask is None
    assert tasks.num_observations.tolist() == [3, 3]
    assert Tasks({"x": put(0.0)}, mask=HALF).num_observations.tolist() == [3, 2]


# --- the door: lists ------------------------------------------------------------


def test_from_list_pads_and_keeps_kinds() -> None:
    tasks = Tasks.from_list(
        [
            {"x": [1.0, 2.0], "k": np.array([1, 2], dtype=np.uint8), "c": np.float64(3.0)},
            {"x": np.array([3.5]), "k": torch.tensor([3]), "c": 4},
        ],
        constants=["c"],
    )
    assert tasks.data["x"].tolist() == [[1.0, 2.0], [3.5, 0.0]]
    assert tasks.data["x"].dtype == torch.float32
    assert tasks.data["k"].tolist() == [[1, 2], [3, 0]]
    assert tasks.data["k"].dtype == torch.int64
    assert tasks.constants["c"].tolist() == [3.0, 4.0]
    assert tasks.mask is not None
    assert tasks.mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([], {}, ValueError, "got no tasks"),
        ([{"x": [1.0]}], {"names": ["a", "b"]}, ValueError, "got 2 names for 1 tasks"),
        (
            [{"x": [1.0], "y": [1.0, 2.0]}],
            {"names": ["pig"]},
            ValueError,
            "task 'pig' has columns of unequal length.*'y': 2",
        ),
        (
            [{"x": [1.0]}, {"x": [1.0], "z": [1.0]}],
            {},
            ValueError,
            "columns of task 'task 1': unknown name 'z'",
        ),
        (
            [{"x": [1.0], "y": [1.0]}, {"x": [1.0]}],
            {},
            ValueError,
            r"task 'task 1' lacks the columns \['y'\]",
        ),
        (
            [{"x": [1.0]}, {"x": ["a"]}],
            {},
            TypeError,
            "column 'x' of task 'task 1' holds .U1, not numbers; encode",
        ),
        (
            [{"x": np.array(["2020-01-01"], dtype="datetime64[D]")}],
            {},
            TypeError,
            "column 'x' of task 'task 0' holds datetime64",
        ),
        ([{"x": [1.0, None]}], {}, TypeError, "column 'x' of task 'task 0' holds object"),
        (
            [{"x": [[1.0], [1.0, 2.0]]}],
            {},
            ValueError,
            "column 'x' of task 'task 0' is not a rectangular array",
        ),
        (
            [{"x": [1.0], "c": 2.0}],
            {},
            ValueError,
            r"column 'c' of task 'task 0' is a single number.*constants=\['c'\]",
        ),
        (
            [{"x": [[1.0]]}, {"x": [[1.0, 2.0]]}],
            {},
            ValueError,
            r"column 'x' of task 'task 1' has components \(2,\)",
        ),
        ([{"x": [1.0]}], {"constants": ["x"]}, ValueError, r"all columns \['x'\] are constants"),
        ([{"x": [1.0]}], {"constants": ["xx"]}, ValueError, "constants: unknown name 'xx'; did you mean 'x'"),
        ([{"x": [1.0]}, {"x": [torch.nan]}], {}, ValueError, "column 'x' of task 'task 1' is NaN"),
        ([{"x": [1.0]}, {"x": []}], {}, ValueError, "task 'task 1' has no observation"),
    ],
)
def test_from_list_refuses(
    rows: list[dict[str, Any]], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Tasks.from_list(rows, **options)


# --- the door: frames ------------------------------------------------------------


def make_table(**changes: list[Any]) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {
        "Pig": ["b", "a", "b", "b", "a"],
        "Time": [1, 1, 2, 3, 2],
        "Weight": [10.0, 20.0, 11.0, 12.0, 21.0],
        "Sow": [True, False, True, True, False],
        "Start": [9.0, 19.0, 9.0, 9.0, 19.0],
    }
    return {**table, **changes}


def from_table(table: dict[str, list[Any]], **options: Any) -> Tasks:
    pandas = pytest.importorskip("pandas", reason="Tasks.from_frame reads pandas data frames")
    settings = {"task": "Pig", "inputs": {"time": "Time"}, "outputs": {"weight": "Weight"}, **options}
    return Tasks.from_frame(pandas.DataFrame(table), **settings)


def test_from_frame_groups_ragged_tasks_in_order_of_appearance() -> None:
    tasks = from_table(
        make_table(),
        inputs={"time": "Time", "both": ["Time", "Sow"]},
        constants={"start": "Start", "c": ["Sow", "Start"]},
    )
    assert tasks.names == ("b", "a")
    assert tasks.outputs == ("weight",)
    assert tasks.data["weight"].tolist() == [[10.0, 11.0, 12.0], [20.0, 21.0, 0.0]]
    assert tasks.data["both"].tolist() == [
        [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]],
        [[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]],
    ]
    assert tasks.constants["start"].tolist() == [9.0, 19.0]
    assert tasks.constants["c"].tolist() == [[1.0, 9.0], [0.0, 19.0]]
    assert tasks.mask is not None
    assert tasks.mask.tolist() == [[True, True, True], [True, True, False]]
    assert {value.dtype for value in tasks.data.values()} == {torch.float32}


def test_from_frame_takes_an_index_of_any_kind_and_nullable_columns() -> None:
    pandas = pytest.importorskip("pandas", reason="Tasks.from_frame reads pandas data frames")
    frame = (
        pandas.DataFrame(make_table())
        .set_index(pandas.Index([7, 7, 3, 1, 0]))
        .astype({"Time": "Int64", "Pig": "category"})
    )
    tasks = Tasks.from_frame(frame, task="Pig", inputs={"time": "Time"}, outputs={"weight": "Weight"})
    assert tasks.names == ("b", "a")
    assert tasks.data["time"].tolist() == [[1.0, 2.0, 3.0], [1.0, 2.0, 0.0]]
    frame.loc[3, "Time"] = pandas.NA
    with pytest.raises(ValueError, match="column 'Time' of task 'b' is nan"):
        Tasks.from_frame(frame, task="Pig", inputs={"time": "Time"}, outputs={"weight": "Weight"})


def test_from_frame_leaves_out_short_tasks() -> None:
    tasks = from_table(make_table(), min_observations=3)
    assert tasks.names == ("b",)
    assert tasks.mask is None
    with pytest.raises(ValueError, match="no task has min_observations=4 rows, the longest has 3"):
        from_table(make_table(), min_observations=4)


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, {"task": "pig"}, ValueError, "task: unknown name 'pig'; did you mean 'Pig'"),
        (
            {},
            {"outputs": {"weight": "Wieght"}},
            ValueError,
            "outputs: unknown name 'Wieght'; did you mean 'Weight'",
        ),
        (
            {},
            {"inputs": {"x": ["Time", "Tme"]}},
            ValueError,
            "inputs: unknown name 'Tme'; did you mean 'Time'",
        ),
        ({}, {"constants": {"time": "Start"}}, ValueError, r"keywords \['time'\] are used twice"),
        (
            {},
            {"constants": {"c": "Time"}},
            ValueError,
            "constant column 'Time' takes several values within task 'b'",
        ),
        (
            {"Pig": ["b", None, "b", "b", "a"]},
            {},
            ValueError,
            r"column 'Pig' labels the task but is missing at index \[1\]",
        ),
        ({"Pig": ["1", 1, "1", "1", 1]}, {}, ValueError, r"task names \['1'\] are used twice"),
        (
            {"Weight": list("vwxyz")},
            {},
            TypeError,
            "column 'Weight' holds.*task 'b'.*not numbers; encode it as numbers",
        ),
        (
            {"Weight": [1.0, 2.0, 3.0, 4.0, np.nan]},
            {},
            ValueError,
            "column 'Weight' of task 'a' is nan at index 4",
        ),
        (
            {"Weight": [1.0, 2.0, 3.0, 4.0, np.inf]},
            {},
            ValueError,
            "column 'Weight' of task 'a' is inf at index 4",
        ),
        ({"Time": np.arange(5).astype("datetime64[s]")}, {}, TypeError, "column 'Time' holds datetime64"),
        ({name: [] for name in make_table()}, {}, ValueError, "empty frame"),
    ],
)
def test_from_frame_refuses(
    changes: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_table(make_table(**changes), **options)


def test_from_frame_refuses_repeated_columns() -> None:
    pandas = pytest.importorskip("pandas", reason="Tasks.from_frame reads pandas data frames")
    frame = pandas.DataFrame([["a", 1.0, 2.0]], columns=["Pig", "Time", "Time"])
    with pytest.raises(ValueError, match=r"repeats the columns \['Time'\]"):
        Tasks.from_frame(frame, task="Pig", inputs={"time": "Time"}, outputs={"w": "Time"})
