"""A run that is stopped and goes on is the run that never stopped, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bmaml_ppl import LearnedPrior, Tasks, load_prior, meta_learn
from bmaml_ppl.checkpoints import CheckpointWarning
from bmaml_ppl.inference import laplace, map_estimate, svgd
from bmaml_ppl.loop import Loop, MetaStep, StoppedEarly
from bmaml_ppl.memory import checkpointed, truncated
from bmaml_ppl.objectives import Objective, Rollout, chaser, query_nll
from bmaml_ppl.signals import HeldSignals
from tests.toys import level, level_tasks, line, line_tasks

ROOT = Path(__file__).parents[1]
CHEAP = svgd(num_particles=3, num_steps=2)
Learn = Callable[..., LearnedPrior]

quick = partial(meta_learn, num_support=3, progress=False, compile=False, batch_size=5)
learn_level = partial(quick, level, level_tasks(12, 6), inference=CHEAP)


def ragged_tasks() -> Tasks:
    tasks = level_tasks(9, 8)
    mask = torch.arange(8) < torch.tensor([5, 6, 7, 8, 8, 5, 6, 7, 8])[:, None]
    return Tasks({k: v * mask for k, v in tasks.data.items()}, mask=mask, outputs=("y",)).standardize()


def features(x: Tensor, y: Tensor | None = None) -> None:
    """A network whose initial weights are drawn anew whenever the model is run first."""
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2))
    pyro.module("net", net)
    coef = pyro.sample("coef", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(net(x[:, None]) @ coef, 0.5), obs=y)


CASES: dict[str, Learn] = {
    "svgd": partial(learn_level, num_steps=7),
    "svgd, recorded": partial(learn_level, num_steps=24, compile="auto"),
    "chaser, two rates": partial(
        quick, line, line_tasks(12, 8), inference=CHEAP, objective=chaser() + query_nll(), num_steps=7
    ),
    "laplace": partial(quick, level, level_tasks(12, 6), inference=laplace(), num_steps=7),
    "ragged, learned steps, momentum": partial(
        quick,
        level,
        ragged_tasks(),
        num_support=range(2, 5),
        inference=map_estimate(num_steps=2, preconditioner="none", learn_step_size="parameter"),
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        objective=query_nll(),
        num_steps=7,
    ),
    "network": partial(quick, features, line_tasks(12, 8), inference=CHEAP, objective=query_nll(), num_steps=7),
}


class Interrupt:
    """A callback that behaves like Ctrl-C at some steps, and notes all that it sees."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.seen = steps, list[int]()

    def __call__(self, info: MetaStep) -> None:
        self.seen.append(info.step)
        if info.step in self.steps:
            raise KeyboardInterrupt


def stop(learn: Learn, folder: Path, step: int, **changes: Any) -> LearnedPrior:
    with pytest.warns(StoppedEarly, match=f"interrupted at meta-step {step}"):
        return learn(**{"checkpoint_dir": folder, "callbacks": [Interrupt(step)], **changes})


def assert_same(one: LearnedPrior, other: LearnedPrior) -> None:
    assert one.params.keys() == other.params.keys()
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)
    histories = [{k: v for k, v in vars(p.history).items() if k != "tasks_per_second"} for p in (one, other)]
    assert histories[0] == histories[1]
    assert len(one.history.tasks_per_second) == len(other.history.tasks_per_second)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*"))


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(case: str, tmp_path: Path) -> None:
    """Stopped where no checkpoint was due; that writing them changes nothing is seen below."""
    learn = CASES[case]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = learn(checkpoint_dir=whole, checkpoint_every=2)
    stop(learn, parts, 5, checkpoint_every=2)
    assert steps_in(parts) == [4, 5]
    assert_same(learn(checkpoint_dir=parts, checkpoint_every=2), expected)
    assert (parts / "prior.safetensors").read_bytes() == (whole / "prior.safetensors").read_bytes()


def test_a_run_stopped_twice_is_the_run_without_checkpoints(tmp_path: Path) -> None:
    learn = partial(learn_level, num_steps=7)
    for step in (2, 5):
        stop(learn, tmp_path, step, checkpoint_every=2)
    assert_same(learn(checkpoint_dir=tmp_path), learn())


def test_a_step_left_in_the_middle_is_not_written(tmp_path: Path) -> None:
    """The second Ctrl-C comes while a gradient is taken; the run goes on from the checkpoint before that step."""
    calls: list[int] = []

    def loss(rollout: Rollout) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return query_nll().terms[0][2](rollout)

    learn = partial(learn_level, num_steps=6, objective=Objective(((1.0, "mine", loss),)), checkpoint_every=2)
    with pytest.warns(StoppedEarly, match="interrupted at meta-step 4"):
        learn(checkpoint_dir=tmp_path)
    assert steps_in(tmp_path) == [2]
    assert_same(learn(checkpoint_dir=tmp_path), learn())


def test_a_run_that_begins_at_a_prior_goes_on(tmp_path: Path) -> None:
    first = learn_level(num_steps=2)
    learn = partial(learn_level, num_steps=5, start=first)
    stop(learn, tmp_path, 3)
    assert_same(learn(checkpoint_dir=tmp_path), learn())
    with pytest.raises(ValueError, match=r"initial value.mean: was 'float32 \(\) with SHA-256"):
        learn_level(num_steps=5, start=learn_level(num_steps=1), checkpoint_dir=tmp_path)


def test_a_finished_run_returns_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = learn_level(num_steps=3, checkpoint_dir=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    seen = Interrupt()
    again = learn_level(num_steps=3, checkpoint_dir=tmp_path, callbacks=[seen], progress=True)
    assert_same(again, expected)
    assert seen.seen == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "meta-learning was finished: read '" in capsys.readouterr().err
    (tmp_path / "prior.safetensors").unlink()
    learn_level(num_steps=3, checkpoint_dir=tmp_path)
    assert torch.equal(load_prior(tmp_path / "prior.safetensors", level).params["mean"], expected.params["mean"])


def test_it_is_said_and_callbacks_see_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop(partial(learn_level, num_steps=5), tmp_path, 3)
    seen = Interrupt()
    learn_level(num_steps=5, checkpoint_dir=tmp_path, callbacks=[seen], progress=True)
    assert seen.seen == [4, 5]
    shown = capsys.readouterr().err
    assert f"meta-learning goes on for 2 meta-steps: read '{tmp_path / 'step-00000003.safetensors'}'" in shown
    assert "5/5" in shown


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path: Path) -> None:
    learn = partial(learn_level, num_steps=7, checkpoint_every=2)
    stop(learn, tmp_path, 5)
    newest = tmp_path / "step-00000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    with pytest.warns(CheckpointWarning, match="step-00000005.safetensors' is refused.*cut short.*step-00000004"):
        resumed = learn(checkpoint_dir=tmp_path)
    assert_same(resumed, learn())
    assert steps_in(tmp_path) == [6, 7]


def test_a_run_that_diverges_after_it_went_on_keeps_the_same_prior(tmp_path: Path) -> None:
    """An outer rate of 5 throws the parameters away step by step; what was good before the stop is kept over it."""
    learn = partial(
        learn_level, num_steps=30, optimizer=partial(torch.optim.SGD, lr=5.0), max_grad_norm=1e9, checkpoint_every=1
    )
    with pytest.warns(StoppedEarly, match="loss|gradient norm"):
        expected = learn()
    last = len(expected.history.loss)
    stop(learn, tmp_path, last)
    for _ in range(2):
        with pytest.warns(StoppedEarly, match=f"at meta-step {last + 1}"):
            assert_same(learn(checkpoint_dir=tmp_path), expected)
        good = load_prior(tmp_path / "prior.safetensors", level).params
        assert all(torch.equal(good[name], expected.params[name]) for name in good)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "num_steps": ({"num_steps": 8}, r"num_steps: was 6, is 8\n.*learning rate falls to zero"),
    "batch_size": ({"batch_size": 4}, "batch_size: was 5, is 4"),
    "seed": ({"seed": 3}, "seed: was 0, is 3"),
    "num_support": ({"num_support": range(2, 4)}, r"num_support: was 3, is \[2, 4, 1\]"),
    "max_grad_norm": ({"max_grad_norm": 1.0}, "max_grad_norm: was 10.0, is 1.0"),
    "first_order": ({"first_order": True}, "first_order: was False, is True"),
    "inference": ({"inference": svgd(num_particles=4, num_steps=2)}, "inference.config.num_particles: was 3, is 4"),
    "objective": ({"objective": query_nll()}, r"objective: was 'marginal_nll', is 'query_nll\(mixture\)'"),
    "optimizer": ({"optimizer": torch.optim.SGD}, "optimizer.class: was 'Adam', is 'SGD'"),
    "memory": ({"memory": truncated(1)}, r"memory: was 'exact', is 'truncated\(1"),
    "precision": ({"precision": "float64"}, "precision: was 'float32', is 'float64'"),
    "data": ({"tasks": level_tasks(12, 6, seed=1)}, r"tasks.column.y: was 'float32 \(12, 6\) with SHA-256"),
    "units": ({"tasks": level_tasks(12, 6).standardize()}, "tasks.standardised.loc.y: was not there"),
    "model": ({"model": line, "tasks": line_tasks(12, 6)}, "sites.coef.shape: was not there"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_by_what_differs(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": level, "tasks": level_tasks(12, 6), "inference": CHEAP, "num_steps": 6}
    with pytest.warns(StoppedEarly):
        quick(**given, checkpoint_dir=tmp_path, callbacks=[Interrupt(2)])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    change, message = CHANGES[name]
    with pytest.raises(ValueError, match=f"another run, the newest after meta-step 2(.|\n)*{message}"):
        quick(**{**given, "checkpoint_dir": tmp_path, **change})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_with_other_numbers_is_another(tmp_path: Path) -> None:
    def make(noise: float, mean: float) -> Callable[..., None]:
        def model(x: Tensor, y: Tensor | None = None) -> None:
            a = pyro.sample("a", dist.Normal(pyro.param("mean", torch.tensor(mean)), 1.0))
            with pyro.plate("data", x.shape[0]):
                pyro.sample("obs", dist.Normal(a, noise), obs=y)

        return model

    learn = partial(quick, tasks=level_tasks(12, 6), inference=CHEAP, num_steps=3, checkpoint_dir=tmp_path)
    learn(make(0.5, 0.0))
    with pytest.raises(ValueError, match=r"fingerprint.obs.log_prob: was -\d.*, is -\d"):
        learn(make(0.6, 0.0))
    with pytest.raises(ValueError, match="initial value.mean: was"):
        learn(make(0.5, 0.1))
    learn(make(0.5, 0.0))


def test_how_it_is_computed_may_change(tmp_path: Path) -> None:
    """A run that ran out of memory goes on in smaller parts."""
    learn = partial(learn_level, num_steps=5, objective=query_nll())
    stop(learn, tmp_path, 3)
    found = learn(checkpoint_dir=tmp_path, memory=checkpointed(), chunk_size=2, checkpoint_every=1)
    for name, value in learn().params.items():
        torch.testing.assert_close(found.params[name], value)


def test_a_run_without_a_falling_rate_may_be_made_longer(tmp_path: Path) -> None:
    learn = partial(learn_level, optimizer=partial(torch.optim.Adam, lr=0.01))
    learn(num_steps=3, checkpoint_dir=tmp_path)
    assert_same(learn(num_steps=6, checkpoint_dir=tmp_path), learn(num_steps=6))


@pytest.mark.parametrize(("number", "stopped"), [(signal.SIGINT, "interrupted at meta-step 2"), (signal.SIGTERM, None)])
def test_signals_wait_for_the_step_and_its_checkpoint(number: int, stopped: str | None, tmp_path: Path) -> None:
    """SIGTERM's own handler lets the run go on here; both find the checkpoint of the step in which they came."""
    found: list[list[int]] = []

    def note(number: int, frame: object) -> None:
        found.append(steps_in(tmp_path))
        if number == signal.SIGINT:
            raise KeyboardInterrupt

    def send(info: MetaStep) -> None:
        if info.step == 2:
            signal.raise_signal(number)
            assert found == []

    before = signal.signal(number, note)
    try:
        run = partial(learn_level, num_steps=4, checkpoint_dir=tmp_path, callbacks=[send])
        if stopped is None:
            assert run().history.stopped is None
        else:
            with pytest.warns(StoppedEarly, match=stopped):
                run()
        assert signal.getsignal(number) is note
    finally:
        signal.signal(number, before)
    assert found == [[2]]
    assert_same(learn_level(num_steps=4, checkpoint_dir=tmp_path), learn_level(num_steps=4))


def test_the_second_signal_acts_at_once() -> None:
    with HeldSignals() as held:
        signal.raise_signal(signal.SIGINT)
        assert held.pending == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_comes_last_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), HeldSignals():
        signal.raise_signal(signal.SIGINT)


def test_signals_are_held_in_the_main_thread_alone_and_with_checkpoints_alone(tmp_path: Path) -> None:
    handlers: list[object] = []
    note = partial(learn_level, num_steps=1, callbacks=[lambda info: handlers.append(signal.getsignal(signal.SIGTERM))])
    thread = threading.Thread(target=partial(note, checkpoint_dir=tmp_path))
    thread.start()
    thread.join()
    note()
    assert handlers == [signal.SIG_DFL] * 2
    assert steps_in(tmp_path) == [1]
    with HeldSignals(active=False):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_between_a_step_and_its_end_finds_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes just after the loop has seen that nothing is to be written."""
    write = Loop._write

    def write_then_signal(self: Loop, now: bool) -> None:
        write(self, now)
        if self.done == 2 and self.world.held.pending is None:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Loop, "_write", write_then_signal)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
    try:
        with pytest.raises(SystemExit):
            learn_level(num_steps=9, checkpoint_dir=tmp_path, checkpoint_every=1000)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps_in(tmp_path) == [3]


class Killable:
    """The program `killable.py`, one run at a time."""

    def __init__(self) -> None:
        program = [sys.executable, str(ROOT / "tests" / "killable.py")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.wait("ready")

    def wait(self, *words: str) -> str:
        """Reads on to a line that begins with one of the words, and returns it."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            if text.startswith(words):
                return text.strip()
        pytest.fail(f"killable.py has ended: {self.process.communicate()[1]}")

    def run(self, folder: Path, kill: tuple[int, float, int] | None = None, **order: Any) -> int:
        """Runs to the end, or sends a signal some steps and some seconds later; returns how the run ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), "every": 1, "num_steps": 40, **order}) + "\n")
        self.process.stdin.flush()
        number = int(self.wait("process").split()[1])
        if kill is not None:
            steps, seconds, signum = kill
            for _ in range(steps):
                if (text := self.wait("step", "ended")).startswith("ended"):
                    return int(text.split()[1])
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                os.kill(number, signum)
        return int(self.wait("ended").split()[1])


@pytest.fixture(scope="module")
def killable() -> Iterator[Killable]:
    program = Killable()
    yield program
    program.process.stdin.close()  # type: ignore[union-attr]
    program.process.wait()
    program.process.stdout.close()  # type: ignore[union-attr]
    program.process.stderr.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_killed_again_and_again_is_the_run_never_killed(every: int, killable: Killable, tmp_path: Path) -> None:
    """SIGKILL up to 12 times, spread over steps and over what a step and its two files take."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert killable.run(whole, every=every) == 0
    chance = random.Random(every)
    ends = []
    for _ in range(12):
        moment = (chance.randint(0, 5), chance.uniform(0, 0.05), signal.SIGKILL)
        ends.append(killable.run(killed, moment, every=every))
    assert ends.count(-signal.SIGKILL) >= 2
    assert set(ends) <= {0, -signal.SIGKILL}
    assert killable.run(killed, every=every) == 0
    assert (killed / "prior.safetensors").read_bytes() == (whole / "prior.safetensors").read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_sigterm_writes_a_checkpoint_and_ends_the_process_by_it(killable: Killable, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = partial(killable.run, every=1000, num_steps=80)
    assert run(whole) == 0
    assert run(killed, (4, 0.0, signal.SIGTERM)) == -signal.SIGTERM
    (step,) = steps_in(killed)
    assert 4 <= step < 80
    assert run(killed) == 0
    assert (killed / "prior.safetensors").read_bytes() == (whole / "prior.safetensors").read_bytes()


def test_a_full_disk_is_survived(killable: Killable, tmp_path: Path) -> None:
    """No file may grow beyond 8000 bytes: a checkpoint is larger, the prior is not."""
    assert killable.run(tmp_path, num_steps=2, most_bytes=8000) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["prior.safetensors"]
