"""Tasks: what every episode must satisfy, selection and standardisation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bmaml_ppl.tasks import Episode, Tasks

LENGTHS = (7, 4, 9, 5, 9)


def make_ragged() -> Tasks:
    """Five tasks whose every observation is a distinct positive number."""
    start = np.cumsum((1, *LENGTHS[:-1]))
    rows = [{"x": torch.arange(n) + 1.0 * int(s)} for n, s in zip(LENGTHS, start, strict=True)]
    return Tasks.from_list(
        [{"x": row["x"], "y": torch.stack([row["x"], -row["x"]], -1), "dose": float(i)} for i, row in enumerate(rows)],
        outputs=("y",),
        constants=("dose",),
        names=[f"pig {i}" for i in range(5)],
    )


def make_even() -> Tasks:
    x = torch.arange(1.0, 31.0).reshape(3, 10)
    return Tasks({"x": x, "y": torch.stack([x, -x], -1)}, outputs=("y",))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(tasks: Tasks) -> list[list[float]]:
    """The real x of each task, in order, after checking that padding is zero and x and y went together."""
    x, y = tasks.data["x"], tasks.data["y"]
    assert torch.equal(torch.stack([x, -x], -1), y)
    mask = torch.ones(x.shape, dtype=torch.bool) if tasks.mask is None else tasks.mask
    assert tasks.mask is None or not bool(tasks.mask.all())
    assert bool((x[~mask] == 0).all())
    return [row[keep].tolist() for row, keep in zip(x, mask, strict=True)]


def positions_of(tasks: Tasks, names: tuple[str, ...]) -> list[int]:
    return [tasks.names.index(name) for name in names]


# --- episodes ------------------------------------------------------------


@pytest.mark.parametrize("make", [make_ragged, make_even])
@pytest.mark.parametrize("num_support", [1, 3, range(1, 4), range(0, 4, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_every_observation_lands_in_exactly_one_side(
    make: Callable[[], Tasks], num_support: int | range, seed: int
) -> None:
    tasks = make()
    everything = rows_of(tasks)
    support, query = tasks.split_observations(num_support, seeded(seed))
    assert support.names == query.names == tasks.names
    sizes = [num_support] if isinstance(num_support, int) else num_support
    for chosen, rest, every in zip(rows_of(support), rows_of(query), everything, strict=True):
        assert len(chosen) in sizes
        assert sorted(chosen + rest) == every
        assert chosen == sorted(chosen)
        assert rest == sorted(rest)
    assert support.data["x"].shape[1] == max(sizes)
    joined = support.join(query)
    assert [sorted(row) for row in rows_of(joined)] == everything
    assert torch.equal(joined.num_observations, tasks.num_observations)


def test_without_a_generator_the_first_rows_are_support() -> None:
    tasks = make_ragged()
    support, query = tasks.split_observations(3)
    assert rows_of(support) == [row[:3] for row in rows_of(tasks)]
    assert rows_of(query) == [row[3:] for row in rows_of(tasks)]
    assert support.mask is None
    assert query.mask is not None
    assert query.data["x"].shape == (5, 6)
    limited = tasks.split_observations(3, num_query=1).query
    assert rows_of(limited) == [row[3:4] for row in rows_of(tasks)]
    assert limited.mask is None


def test_even_tasks_have_no_mask_unless_support_sizes_differ() -> None:
    episode = make_even().split_observations(4, seeded(0))
    assert episode.support.mask is None
    assert episode.query.mask is None
    episode = make_even().split_observations(range(1, 9), seeded(0))
    assert episode.support.mask is not None
    assert episode.query.mask is not None


def test_num_query_is_a_random_subset_of_the_rest() -> None:
    tasks = make_ragged()
    seen: set[float] = set()
    for seed in range(60):
        support, query = tasks.split_observations(2, seeded(seed), num_query=3)
        for chosen, rest, every, count in zip(rows_of(support), rows_of(query), rows_of(tasks), LENGTHS, strict=True):
            assert len(rest) == min(3, count - 2)
            assert set(rest) <= set(every) - set(chosen)
            seen.update(rest)
    assert seen == {value for row in rows_of(tasks) for value in row}


def test_support_rows_and_sizes_are_uniform() -> None:
    x = torch.arange(1.0, 6.0).expand(20_000, 5)
    tasks = Tasks({"x": x, "y": torch.stack([x, -x], -1)})
    support, _ = tasks.split_observations(range(1, 4), seeded(0))
    sizes = support.num_observations.bincount() / len(tasks)
    # 5 standard errors, sqrt(2/9/20000) = .0033: false alarm below 1e-5.
    torch.testing.assert_close(sizes, torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3]), atol=0.017, rtol=0)
    rows = support.data["x"][support.mask].long().bincount()[1:] / len(tasks)
    torch.testing.assert_close(rows, torch.full((5,), 2 / 5), atol=0.018, rtol=0)


def test_sample_batch_draws_distinct_tasks_with_their_own_constants() -> None:
    tasks = make_ragged()
    drawn: set[str] = set()
    for seed in range(30):
        support, query = tasks.sample_batch(2, 3, seeded(seed))
        drawn.update(support.names)
        assert len(set(support.names)) == len(support) == 2
        positions = positions_of(tasks, support.names)
        assert support.constants["dose"].tolist() == [float(i) for i in positions]
        assert rows_of(support.join(query)) is not None
        for i, chosen, rest in zip(positions, rows_of(support), rows_of(query), strict=True):
            assert sorted(chosen + rest) == rows_of(tasks)[i]
    assert drawn == set(tasks.names)


def test_sample_batch_is_capped_at_all_tasks() -> None:
    support, _ = make_ragged().sample_batch(50, 2, seeded(0))
    assert sorted(support.names) == sorted(make_ragged().names)


def test_shapes_do_not_depend_on_the_draw() -> None:
    shapes = set()
    for seed in range(20):
        episode = make_ragged().sample_batch(2, range(1, 4), seeded(seed), num_query=4)
        shapes.add((episode.support.data["y"].shape, episode.query.data["y"].shape))
    assert shapes == {(torch.Size([2, 3, 2]), torch.Size([2, 4, 2]))}


def test_one_seed_gives_one_episode_and_the_global_generator_rests() -> None:
    before = torch.get_rng_state()
    first, again = (make_ragged().sample_batch(3, range(1, 4), seeded(7)) for _ in range(2))
    assert first.support.names == again.support.names
    assert torch.equal(first.support.data["x"], again.support.data["x"])
    make_ragged().split(0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_integer_and_bool_columns_go_through_episodes() -> None:
    label = torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    tasks = Tasks({"label": label, "flag": label > 1}, mask=mask)
    _, query = tasks.split_observations(1)
    assert query.data["label"].tolist() == [[2, 3], [5, 0]]
    assert query.data["flag"].tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (4,),
            ValueError,
            r"leaves no query row in 1 of 5 tasks.*\{'pig 1': 4\}; drop them or lower num_support",
        ),
        ((range(2, 6), seeded(0)), ValueError, r"2 of 5 tasks.*'pig 1': 4, 'pig 3': 5"),
        ((range(1, 3),), ValueError, "give a generator"),
        ((0,), ValueError, "at least 1 support row"),
        ((range(3, 3), seeded(0)), ValueError, "at least 1 support row"),
        ((2.0,), TypeError, "num_support is 2.0; give an int, or a range"),
        ((True,), TypeError, "num_support is True"),
        ((2, 0), TypeError, "generator is 0; give torch.Generator"),
        ((2, None, 0), ValueError, "num_query is 0"),
    ],
)
def test_impossible_episodes_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_ragged().split_observations(*arguments)


def test_only_the_first_five_short_tasks_are_listed() -> None:
    tasks = Tasks({"x": torch.ones(8, 2)})
    with pytest.raises(ValueError, match=r"8 of 8 tasks.*'task 4': 2\} \.\.\.; drop"):
        tasks.sample_batch(2, 2, seeded(0))
    with pytest.raises(ValueError, match="num_tasks is 0"):
        tasks.sample_batch(0, 1, seeded(0))


def test_join_refuses_other_tasks() -> None:
    with pytest.raises(ValueError, match="join needs the same tasks and columns"):
        make_ragged().join(make_ragged()[:2])


def test_episode_unpacks_in_order() -> None:
    assert Episode._fields == ("support", "query")


# --- selection ------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (1, [1]),
        (-1, [4]),
        ("pig 3", [3]),
        (slice(1, None, 2), [1, 3]),
        ([4, 0], [4, 0]),
        (["pig 4", "pig 0"], [4, 0]),
        (np.array([2, 3]), [2, 3]),
        (torch.tensor([2, 3]), [2, 3]),
        (torch.tensor([True, False, False, False, True]), [0, 4]),
    ],
)
def test_selection(key: Any, expected: list[int]) -> None:
    tasks = make_ragged()
    chosen = tasks[key]
    assert isinstance(chosen, Tasks)
    assert rows_of(chosen) == [rows_of(tasks)[i] for i in expected]
    assert chosen.names == tuple(f"pig {i}" for i in expected)
    assert chosen.constants["dose"].tolist() == [float(i) for i in expected]
    assert chosen.data["x"].shape[1] == max(LENGTHS[i] for i in expected)


def test_iteration_yields_single_tasks_without_mask() -> None:
    singles = list(make_ragged())
    assert [task.names[0] for task in singles] == list(make_ragged().names)
    assert [task.data["x"].shape for task in singles] == [(1, n) for n in LENGTHS]
    assert all(task.mask is None for task in singles)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (5, IndexError, "task 5 is out of range; there are 5"),
        ("pig3", KeyError, "did you mean 'pig 3'"),
        ("zebra", KeyError, "no task is named 'zebra'"),
        (slice(9, None), ValueError, "selects none of the 5"),
        ([True, False], TypeError, "Python bool"),
        (1.5, TypeError, "integer"),
    ],
)
def test_impossible_selections(key: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_ragged()[key]


def test_split_parts_the_tasks() -> None:
    tasks = make_ragged()
    train, test = tasks.split(0.6, seed=0)
    assert (len(train), len(test)) == (3, 2)
    assert set(train.names) | set(test.names) == set(tasks.names)
    assert positions_of(tasks, train.names) == sorted(positions_of(tasks, train.names))
    assert tasks.split(0.6, seed=0)[0].names == train.names
    assert {tasks.split(0.6, seed=s)[0].names for s in range(10)} != {train.names}


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.99, 1.0, -1.0, 2.0])
def test_split_leaves_no_side_empty(fraction: float) -> None:
    with pytest.raises(ValueError, match="both sides at least one task"):
        make_ragged().split(fraction, seed=0)


def test_to_moves_floating_tensors_only() -> None:
    tasks = Tasks({"x": torch.rand(2, 3, generator=seeded(0)), "k": torch.ones(2, 3, dtype=torch.int64)})
    moved = tasks.standardize().to(dtype=torch.float64)
    assert moved.data["x"].dtype == torch.float64
    assert moved.data["k"].dtype == torch.int64
    assert moved.scaling is not None
    assert moved.scaling.loc["x"].dtype == torch.float64
    assert make_ragged().to("cpu").mask is not None


def test_repr_says_what_is_inside() -> None:
    assert repr(make_ragged().standardize(["x"])) == (
        "Tasks(5 tasks of 4 to 9 observations; inputs: x; outputs: y; constants: dose; standardised: x)"
    )
    assert repr(Tasks({"x": torch.ones(1, 2)})) == "Tasks(1 tasks of 2 observations; data: x)"


# --- standardisation ------------------------------------------------------------


def test_standardize_fits_real_observations_and_leaves_data_raw() -> None:
    raw = make_ragged()
    tasks = raw.standardize()
    assert tasks.data["x"] is raw.data["x"]
    scaled = tasks.scaled()
    assert scaled.scaling is None
    assert scaled.mask is not None
    for name in ("x", "y"):
        values = scaled.data[name][scaled.mask]
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1:]), atol=1e-6, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones(values.shape[1:]))
        assert bool((scaled.data[name][~scaled.mask] == 0).all())
    assert torch.equal(scaled.constants["dose"], raw.constants["dose"])
    assert raw.scaled() is raw


def test_scaled_and_split_commute() -> None:
    tasks = make_ragged().standardize()
    before = tasks.scaled().split_observations(3, seeded(0))
    after = tasks.split_observations(3, seeded(0))
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first.data["y"], second.scaled().data["y"])


def test_standardize_skips_indicators_and_integers_and_keeps_constant_columns_finite() -> None:
    x = torch.tensor([[0.1, 0.2, 0.3]])
    tasks = Tasks({"x": x, "flag": (x > 0.15).float(), "k": torch.tensor([[1, 2, 3]]), "same": 0.1 * torch.ones(1, 3)})
    default = tasks.standardize().scaling
    assert default is not None
    assert default.loc.keys() == {"x"}
    explicit = tasks.standardize(["same", "flag"]).scaling
    assert explicit is not None
    assert float(explicit.scale["same"]) == 1.0
    assert explicit.loc.keys() == {"same", "flag"}


def test_standardize_takes_constants_by_name() -> None:
    scaled = make_ragged().standardize(["dose"]).scaled()
    torch.testing.assert_close(scaled.constants["dose"].mean(), torch.tensor(0.0))


def test_standardize_refusals() -> None:
    tasks = Tasks({"time": torch.rand(2, 3, generator=seeded(0)), "k": torch.ones(2, 3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="columns: unknown name 'tme'; did you mean 'time'"):
        tasks.standardize(["tme"])
    with pytest.raises(TypeError, match=r"column .k. is torch\.int64"):
        tasks.standardize(["k"])
