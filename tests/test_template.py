"""What users may pass to adapt and predict, and what the errors say."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from bmaml_ppl.tasks import Tasks
from bmaml_ppl.template import Template

LIKE = torch.zeros((), dtype=torch.float64)
TEMPLATE = Template({"x": (2,), "y": ()}, {"dose": ()}, ("y",))
X, Y, DOSE = torch.ones(3, 2), torch.ones(3), torch.tensor(2.0)


def _to_tasks(values: dict[str, object], need_outputs: bool = True, adapted: Tasks | None = None) -> tuple[Tasks, bool]:
    return TEMPLATE.to_tasks(None, values, need_outputs=need_outputs, like=LIKE, adapted=adapted)


def _batch(num: int = 2, names: tuple[str, ...] = ("a", "b")) -> Tasks:
    return Tasks(
        {"x": torch.ones(num, 3, 2), "y": torch.ones(num, 3)},
        {"dose": torch.arange(num).float()},
        names=names,
        outputs=("y",),
    )


def test_template_describes_one_task() -> None:
    tasks = Tasks({"x": torch.ones(4, 3, 2), "label": torch.ones(4, 3, dtype=torch.long)}, {"dose": torch.ones(4)})
    template = Template.of(tasks, ("label",))
    assert template == Template({"x": (2,), "label": ()}, {"dose": ()}, ("label",), {"label": torch.int64})


def test_example_has_the_shapes_and_dtypes() -> None:
    template = Template({"x": (2,), "label": ()}, {"dose": (4,)}, (), {"label": torch.int64})
    example = template.example(5, LIKE)
    assert {k: (tuple(v.shape), v.dtype) for k, v in example.items()} == {
        "x": ((5, 2), torch.float64),
        "label": ((5,), torch.int64),
        "dose": ((4,), torch.float64),
    }
    assert all(bool((v == 1).all()) for v in example.values())


def test_one_task_and_a_batch() -> None:
    one, single = _to_tasks({"x": X, "y": Y, "dose": DOSE})
    assert single
    assert (len(one), one.data["x"].shape, one.constants["dose"].shape) == (1, (1, 3, 2), (1,))
    many, single = _to_tasks({"x": X.expand(4, 3, 2), "y": Y.expand(4, 3), "dose": DOSE.expand(4)})
    assert not single
    assert (len(many), many.data["x"].dtype, many.outputs) == (4, torch.float64, ("y",))


@pytest.mark.parametrize(
    "y",
    [[1, 2, 3], (1.0, 2.0, 3.0), np.array([1, 2, 3]), pd.Series([1, 2, 3], index=[7, 8, 9]), torch.arange(1, 4)],
    ids=["list", "tuple", "array", "series", "integer tensor"],
)
def test_what_holds_numbers_is_accepted(y: object) -> None:
    tasks, _ = _to_tasks({"x": X, "y": y, "dose": 2})
    assert torch.equal(tasks.data["y"], torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    assert tasks.constants["dose"].tolist() == [2.0]


def test_lists_keep_double_precision() -> None:
    tasks, _ = _to_tasks({"x": X, "y": [0.1, 0.2, 0.3], "dose": 0.1})
    assert tasks.data["y"][0, 0].item() == 0.1


def test_integers_stay_integers_and_floats_are_refused() -> None:
    template = Template({"label": ()}, {}, ("label",), {"label": torch.int64})
    for value in ([0, 1], np.array([0, 1], dtype=np.int32)):
        tasks, _ = template.to_tasks(None, {"label": value}, need_outputs=True, like=LIKE)
        assert tasks.data["label"].dtype == torch.int64
    with pytest.raises(TypeError, match="'label' holds torch.float64, but the prior was learned with torch.int64"):
        template.to_tasks(None, {"label": [0.5, 1.0]}, need_outputs=True, like=LIKE)


def test_none_is_absent() -> None:
    tasks, _ = _to_tasks({"x": X, "y": None, "dose": DOSE}, need_outputs=False)
    assert set(tasks.data) == {"x"}
    with pytest.raises(ValueError, match=r"missing data \['y'\]; give all of \['dose', 'x', 'y'\]"):
        _to_tasks({"x": X, "y": None, "dose": DOSE})


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown data key 'doze', the tasks have .*did you mean 'dose'"):
        _to_tasks({"x": X, "y": Y, "doze": DOSE})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("x", torch.ones(3), r"'x' has shape \(3,\); one task's is \(N, 2\).*\(T, N, 2\)"),
        ("y", torch.ones(2, 3, 1), r"'y' has shape \(2, 3, 1\); one task's is \(N\).*\(T, N\)"),
        ("dose", torch.ones(1, 1), r"'dose' has shape \(1, 1\); one task's is \(\).*\(T\)"),
        ("y", torch.ones(2, 3), r"\['x', 'dose'\] hold one task but \['y'\] hold a batch"),
    ],
)
def test_wrong_shape_says_what_is_right(key: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _to_tasks({"x": X, "y": Y, "dose": DOSE, key: value})


def test_tasks_and_tensors_together_are_refused() -> None:
    with pytest.raises(TypeError, match=r"not both; got Tasks and \['y'\]"):
        TEMPLATE.to_tasks(_batch(), {"y": Y}, need_outputs=True, like=LIKE)


def test_tasks_are_checked_like_tensors() -> None:
    swapped = Tasks({"x": torch.ones(2, 3, 2), "y": torch.ones(2, 3), "dose": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"\['dose'\] were given once per task .*give them as constants"):
        TEMPLATE.to_tasks(swapped, {}, need_outputs=True, like=LIKE)
    flat = Tasks({"x": torch.ones(2, 3), "y": torch.ones(2, 3)}, {"dose": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'x' has shape \(2, 3\)"):
        TEMPLATE.to_tasks(flat, {}, need_outputs=True, like=LIKE)


def test_adapted_tasks_give_their_constants() -> None:
    tasks, single = _to_tasks({"x": X}, need_outputs=False, adapted=_batch())
    assert single
    assert tasks.names == ("a", "b")
    assert torch.equal(tasks.constants["dose"], _batch().constants["dose"])
    assert tasks.data["x"].shape == (2, 3, 2)


def test_other_tasks_than_the_adapted_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'x' holds 3 tasks, but the posterior holds 2: \['a', 'b'\]"):
        _to_tasks({"x": X.expand(3, 3, 2)}, need_outputs=False, adapted=_batch())
    for other in (_batch(names=("b", "a")), _batch(names=("a", "c"))):
        with pytest.raises(ValueError, match=r"but the posterior holds \['a', 'b'\], in this order"):
            TEMPLATE.to_tasks(other, {}, need_outputs=True, like=LIKE, adapted=_batch())
    with pytest.raises(ValueError, match="got 1 tasks, but the posterior holds 2"):
        TEMPLATE.to_tasks(_batch()["a"], {}, need_outputs=True, like=LIKE, adapted=_batch())


def test_varied_values_differ_within_and_between_keys() -> None:
    template = Template({"x": (2,), "y": ()}, {"dose": ()}, ("y",), {"y": torch.int64})
    values = template.varied_example(5, torch.zeros((), dtype=torch.float64))
    assert values["y"].unique().tolist() == [0, 1]
    floats = torch.cat([values["x"].flatten(), values["dose"].flatten()])
    assert len(floats.unique()) == 11
    assert ((floats >= 0.1) & (floats <= 0.9)).all()


def test_missing_outputs_are_filled_where_rows_are_real() -> None:
    template = Template({"x": (), "y": (2,), "z": ()}, {}, ("y", "z"), {"z": torch.int64})
    mask = torch.tensor([[True, True], [True, False]])
    given = Tasks({"x": torch.zeros(2, 2), "z": torch.zeros(2, 2).long()}, mask=mask, outputs=("z",))
    filled = template.fill_outputs(given)
    assert torch.equal(filled.data["y"], mask.float().unsqueeze(-1).expand(2, 2, 2))
    assert torch.equal(filled.data["z"], given.data["z"])
