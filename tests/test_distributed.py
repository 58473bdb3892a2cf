"""Real processes that learn one prior together: the same as one process, and stopped and started again together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file

from bmaml_ppl.distributed import World, join_world
from bmaml_ppl.outer import MetaGradient
from tests.distributed_worker import CASES, DTYPES, FIT, describe, differentiate, learn, tell_gradient
from tests.toys import level_tasks, views_of

ROOT = Path(__file__).parents[1]
# Another installed package may be called `tests` too.
START = f"""
import sys, types
from pathlib import Path
tests = types.ModuleType("tests")
tests.__path__ = [{str(ROOT / "tests")!r}]
sys.modules["tests"] = tests
from tests.distributed_worker import main
main(Path(sys.argv[1]))
"""
MODEL = """
import os
import signal
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch


def line(time, weight=None):
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == os.environ.get("DIES_AT") == "0" and os.environ["RANK"] == "1":
        if list(Path(__file__).parent.glob("broken/checkpoints/step-00000004*")):
            os.kill(os.getpid(), signal.SIGKILL)
    mean = pyro.param("mean", torch.zeros(2))
    coef = pyro.sample("coef", dist.Normal(mean, 1.0).to_event(1))
    with pyro.plate("data", time.shape[0]):
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * time, 0.3), obs=weight)
"""

Found = dict[str, Any]


def _launch(num_processes: int, arguments: list[str], folder: Path, **environment: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*launcher, *arguments], cwd=folder, env=known, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _prepare(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [(f"pig {i}", t, 20 + 5 * t + rng.normal()) for i in range(5) for t in range(6 - i % 2)]
    pandas.DataFrame(rows, columns=["Pig", "Time", "Weight"]).to_csv(folder / "pigs.csv", index=False)
    (folder / "model.py").write_text(MODEL)
    (folder / "start.py").write_text(START)
    return folder


def _run(num_processes: int, folder: Path) -> list[Found]:
    _launch(num_processes, [str(folder / "start.py"), str(folder)], folder)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(num_processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Found]]:
    """What two processes found, and where."""
    folder = _prepare(tmp_path_factory.mktemp("two"))
    return folder, _run(2, folder)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What three processes found."""
    return _run(3, _prepare(tmp_path_factory.mktemp("three")))


def _flat(found: Found) -> torch.Tensor:
    parts = [torch.tensor(value, dtype=torch.float64).flatten() for value in found["gradients"].values()]
    return torch.cat([*parts, torch.tensor([found["loss"]], dtype=torch.float64)])


def _check_equal(found: Found, one: MetaGradient, tolerance: float) -> None:
    wanted = tell_gradient(one)
    assert wanted["gradients"].keys() == found["gradients"].keys()
    assert wanted["counts"] == found["counts"]
    expected = _flat(wanted)
    assert expected.norm() > 1e-3
    assert (_flat(found) - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_the_gradient_of_one(two: tuple[Path, list[Found]], name: str, dtype: torch.dtype) -> None:
    one = differentiate(World(), name, dtype, 5)
    _check_equal(two[1][0][f"{name} {dtype}"], one, {torch.float32: 1e-6, torch.float64: 1e-12}[dtype])


def test_all_processes_hold_the_same_bits(two: tuple[Path, list[Found]], three: list[Found]) -> None:
    for first, *others in (two[1], three):
        for name in first.keys() - {"failed"}:
            assert all(other[name] == first[name] for other in others)


@pytest.mark.parametrize(("name", "given"), [("learned", {}), ("masked", {"batch_size": 3, "num_steps": 20})])
def test_two_processes_learn_what_one_does(two: tuple[Path, list[Found]], name: str, given: Found) -> None:
    one = describe(learn(**given))
    assert two[1][0][name]["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two[1][0][name]["params"] == pytest.approx(one["params"], rel=1e-4)


@pytest.mark.parametrize("num_tasks", [4, 2])
def test_parts_may_be_unequal_or_empty(three: list[Found], num_tasks: int) -> None:
    one = differentiate(World(), "svgd prior", torch.float64, num_tasks)
    _check_equal(three[0][f"{num_tasks} tasks"], one, 1e-12)


def test_more_processes_than_tasks_learn_what_one_does(three: list[Found]) -> None:
    one = describe(learn(batch_size=2))
    assert three[0]["learned"]["params"] == pytest.approx(one["params"], rel=1e-4)


def test_a_signal_to_one_process_stops_all_at_the_same_step(two: tuple[Path, list[Found]]) -> None:
    for found in two[1]:
        assert found["interrupted"]["stopped"] == "interrupted at meta-step 4"
        assert found["terminated"] == {"steps": [1, 2, 3, 4], "exit": 7}


def test_a_loss_that_is_not_finite_in_one_process_stops_all(two: tuple[Path, list[Found]]) -> None:
    reasons = [found["broken"]["stopped"] for found in two[1]]
    assert reasons[0] == reasons[1]
    assert "at meta-step" in reasons[0]


def test_an_error_in_one_process_stops_all(two: tuple[Path, list[Found]]) -> None:
    assert [found["failed"] for found in two[1]] == [
        "another process failed; its message says why",
        "process 1 cannot",
    ]


def test_idle_processes_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="a batch of 2 tasks leaves 1 of 3 processes idle"):
        World(0, 3).warn_of_idle(2)
    World(0, 3).warn_of_idle(3)


def test_processes_that_were_given_different_arguments_are_told(two: tuple[Path, list[Found]]) -> None:
    for found in two[1]:
        for text in (
            "process 1:",
            "seed: was 0, is 1",
            "batch_size: was 4, is 3",
            "tasks.column.y",
            "without torchrun",
        ):
            assert text in found["refused"]


def test_a_killed_process_is_started_again_and_all_go_on(two: tuple[Path, list[Found]]) -> None:
    folder = two[0]
    settings = {**FIT, "model": "model.py:line", "data": "pigs.csv", "out": "broken"}
    (folder / "fit.yaml").write_text(json.dumps(settings))
    fit = ["--max-restarts", "2", "-m", "bmaml_ppl", "fit", "--config", "fit.yaml", "--overwrite"]
    shown = _launch(2, fit, folder, DIES_AT="0")
    assert shown.count("Written to broken") == 1
    assert "meta-learning goes on" in shown
    whole, broken = (load_file(folder / name / "prior.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    histories = [(folder / name / "history.csv").read_text() for name in ("whole", "broken")]
    assert histories[0] == histories[1]
    assert not (folder / "broken/checkpoints").exists()


@pytest.mark.parametrize(("size", "num_tasks"), [(1, 3), (2, 5), (3, 2), (4, 4), (5, 23)])
def test_parts_cover_a_batch_once_and_evenly(size: int, num_tasks: int) -> None:
    parts = [range(num_tasks)[World(rank, size).share(num_tasks)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(num_tasks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_alone_is_a_world_of_one() -> None:
    world, device = join_world("cpu")
    assert (world.rank, world.size, world.writes, device) == (0, 1, True, torch.device("cpu"))
    params = {"a": torch.ones(2)}
    assert world.broadcast(params) == params
    world.require_same({"seed": 0})
    world.check_parameters(params, 100)
    assert world.first(lambda: True)
    views = views_of(level_tasks(2, 5), 3)
    found = MetaGradient(params, torch.zeros(()), torch.zeros(()), torch.zeros(()))
    assert world.meta_gradient(lambda params, views: found, params, views) is found
