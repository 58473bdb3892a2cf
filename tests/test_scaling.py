"""Scaling: exact affine identities, and what it refuses."""

import pytest
import torch

from bmaml_ppl.scaling import Scaling


@pytest.fixture
def scaling() -> Scaling:
    return Scaling(
        {"x": torch.tensor(2.0), "v": torch.tensor([1.0, -1.0])},
        {"x": torch.tensor(4.0), "v": torch.tensor([0.5, 2.0])},
    )


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (5, 2, 3)])
def test_apply_then_undo_is_the_identity_for_any_leading_dims(scaling: Scaling, lead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = {"x": torch.randn(lead, generator=generator), "v": torch.randn((*lead, 2), generator=generator)}
    scaled = scaling.apply(raw)
    torch.testing.assert_close(scaled["x"], (raw["x"] - 2) / 4)
    torch.testing.assert_close(scaled["v"][..., 1], (raw["v"][..., 1] + 1) / 2)
    for name, tensor in raw.items():
        torch.testing.assert_close(scaling.undo(name, scaled[name]), tensor)


def test_unknown_names_and_none_pass_through(scaling: Scaling) -> None:
    other = torch.arange(3)
    result = scaling.apply({"other": other, "x": None})
    assert result["other"] is other
    assert result["x"] is None
    assert scaling.undo("other", other) is other


def test_apply_keeps_a_float_dtype_and_promotes_integers(scaling: Scaling) -> None:
    assert scaling.apply({"x": torch.ones(2, dtype=torch.float64)})["x"].dtype == torch.float64
    result = scaling.apply({"x": torch.tensor([3])})["x"]
    torch.testing.assert_close(result, torch.tensor([0.25]))


def test_state_round_trip_keeps_dotted_names() -> None:
    scaling = Scaling({"a.b": torch.tensor(1.0)}, {"a.b": torch.tensor(2.0)})
    state = scaling.state()
    assert set(state) == {"loc.a.b", "scale.a.b"}
    again = Scaling.from_state(state)
    assert again.loc.keys() == {"a.b"}
    assert torch.equal(again.scale["a.b"], torch.tensor(2.0))


def test_to_changes_the_dtype(scaling: Scaling) -> None:
    moved = scaling.to(dtype=torch.float64)
    assert {value.dtype for value in moved.state().values()} == {torch.float64}
    assert {value.dtype for value in scaling.to("cpu").state().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("loc", "scale", "message"),
    [
        ({"x": torch.zeros(())}, {}, "same columns"),
        ({"x": torch.zeros(2)}, {"x": torch.ones(3)}, "'x': loc has shape"),
        ({"x": torch.zeros(())}, {"x": torch.zeros(())}, "'x'.*scale positive"),
        ({"x": torch.tensor(torch.nan)}, {"x": torch.ones(())}, "'x': loc must be finite"),
    ],
)
def test_unusable_units_are_refused(loc: dict[str, torch.Tensor], scale: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scaling(loc, scale)


def test_wrong_components_and_keys_are_refused(scaling: Scaling) -> None:
    with pytest.raises(ValueError, match="column 'v' was standardised with trailing shape"):
        scaling.apply({"v": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="column 'v' was standardised"):
        scaling.undo("v", torch.zeros(()))
    with pytest.raises(ValueError, match=r"key 'mean\.x'"):
        Scaling.from_state({"mean.x": torch.zeros(())})
