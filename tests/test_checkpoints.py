"""Checkpoint files: exact, whole or refused by name, of one run; and the folder that holds them."""

import errno
import json
import random
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from bmaml_ppl import checkpoints, storage
from bmaml_ppl.checkpoints import Checkpoints, CheckpointWarning, dump_checkpoint, parse_checkpoint
from bmaml_ppl.files import dump_tensors, write_atomically
from bmaml_ppl.inference import svgd
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.loop import Optimizer
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.run_settings import compare_settings, describe_optimizer
from tests.toys import level, level_tasks

RUN = {"num_steps": 9, "cosine decay": True, "seed": 0}
OPTIMIZERS: dict[str, Optimizer] = {
    "adam": torch.optim.Adam,
    "amsgrad, rate a tensor": partial(torch.optim.Adam, lr=torch.tensor(0.01), amsgrad=True),
    "adamw": partial(torch.optim.AdamW, betas=(0.8, 0.99)),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
    "adafactor": torch.optim.Adafactor,
}


def state_of(number: float) -> dict[str, Any]:
    return {"params": {"mean": torch.tensor(number)}, "generator": torch.Generator().manual_seed(0).get_state()}


@pytest.fixture(scope="module")
def prior() -> LearnedPrior:
    cheap = svgd(num_particles=2, num_steps=1)
    return meta_learn(level, level_tasks(6, 5), num_support=2, inference=cheap, num_steps=0, progress=False)


@pytest.fixture
def folder(tmp_path: Path, prior: LearnedPrior) -> Path:
    """A folder with the checkpoints of steps 4 and 6."""
    writer = Checkpoints(tmp_path, RUN)
    for step in (2, 4, 6):
        writer.save(step, state_of(step), prior)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def reload(tree: Any, tmp_path: Path) -> Any:
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(dump_checkpoint(1, RUN, {"tree": tree}))
    return parse_checkpoint(path).state["tree"]


def train(optimizer: torch.optim.Optimizer, weights: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        optimizer.step()


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_equal(list(one.values()), list(other.values()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    weights = [torch.ones(3, 4), torch.tensor(0.3)]
    optimizer = OPTIMIZERS[name](weights)
    train(optimizer, weights, 0)
    copies = [w.clone() for w in weights]
    other = OPTIMIZERS[name](copies)
    other.load_state_dict(reload(optimizer.state_dict(), tmp_path))
    assert_equal(other.state_dict(), optimizer.state_dict())
    train(optimizer, weights, 1)
    train(other, copies, 1)
    assert_equal(copies, weights)


def test_a_state_comes_back_exactly(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {
        "numbers": [0, -(2**70), True, None, 0.1, 1e-320, float("inf"), "text \N{SNOWMAN}"],
        3: (shared, shared.T, shared[:0], shared[0, 1]),
        "a.b": torch.tensor([True, False]),
        "a": {"b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)},
        "empty": ({}, [], ()),
    }
    assert_equal(reload(tree, tmp_path), {**tree, 3: tuple(x.contiguous() for x in tree[3])})


def test_what_cannot_be_kept_is_named() -> None:
    with pytest.raises(TypeError, match=r"optimizer.0.window is deque.*tensors, numbers.*another optimizer"):
        dump_checkpoint(1, RUN, {"optimizer": [{"window": deque([1])}]})


def test_the_same_content_has_the_same_bytes() -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float64), "c": torch.tensor(True)}
    metadata = {"format": "x", "schema": '{"k": "\N{SNOWMAN}"}', "sha256": "y"}
    files = {dump_tensors(tensors, metadata) for _ in range(10)}
    assert len(files) == 1
    assert_equal(dict(sorted(safetensors.torch.load(files.pop()).items())), dict(sorted(tensors.items())))


def sizes(content: bytes) -> list[int]:
    """A length of every kind: nothing, within and at the end of each part, one byte short, one byte more."""
    header = 8 + int.from_bytes(content[:8], "little")
    prefix = content.index(b"sha256") + 9
    cuts = [0, 1, 7, 8, 9, prefix, prefix + 30, prefix + 64, header // 2, header - 1, header, header + 1]
    return [*cuts, (header + len(content)) // 2, len(content) - 1, len(content) + 1]


def spoil_length(size: int, content: bytes) -> bytes:
    return (content + b"\0")[:size]


def spoil_bit(bit: int, content: bytes) -> bytes:
    spoilt = bytearray(content)
    spoilt[bit // 8] ^= 1 << bit % 8
    return bytes(spoilt)


def test_every_cut_and_flip_is_refused_by_name(folder: Path) -> None:
    """Lengths of every kind, and 40 bits: the first ones, which hold the header's length, and others at random."""
    path = folder / "step-00000006.safetensors"
    content = path.read_bytes()
    bits = [0, 7, 12, 40, 63, *random.Random(0).sample(range(64, 8 * len(content)), 35)]
    spoilt = [partial(spoil_length, size) for size in sizes(content)] + [partial(spoil_bit, bit) for bit in bits]
    for spoil in spoilt:
        path.write_bytes(spoil(content))
        with pytest.warns(CheckpointWarning, match=f"'{path}' is refused: it.*'step-00000004.safetensors' is used"):
            saved = Checkpoints(folder, RUN).load()
        assert saved is not None
        assert (saved.step, saved.state["params"]["mean"]) == (4, 4.0)
    path.write_bytes(content)
    saved = Checkpoints(folder, RUN).load()
    assert saved is not None
    assert saved.step == 6


def test_no_single_bit_of_a_checkpoint_can_change(tmp_path: Path) -> None:
    """One bit of each byte."""
    path = tmp_path / "step-00000001.safetensors"
    content = dump_checkpoint(1, RUN, {"w": torch.arange(9.0)})
    path.write_bytes(content)
    parse_checkpoint(path)
    for i in range(len(content)):
        path.write_bytes(spoil_bit(8 * i + i % 8, content))
        with pytest.raises(ValueError, match="it is no checkpoint|its checksum does not match"):
            parse_checkpoint(path)


def test_tensors_of_another_checkpoint_are_refused(folder: Path) -> None:
    """The safetensors format itself has nothing against it."""
    six, four = ((folder / f"step-0000000{n}.safetensors").read_bytes() for n in (6, 4))
    mixed = six[: 8 + int.from_bytes(six[:8], "little")]
    path = folder / "step-00000006.safetensors"
    path.write_bytes(mixed + four[len(mixed) :])
    assert safetensors.torch.load_file(path)["params.mean"] == 4.0
    with pytest.raises(ValueError, match="checksum"):
        parse_checkpoint(path)


def test_where_none_is_whole_nothing_is_begun(folder: Path) -> None:
    for name in ("step-00000004.safetensors", "step-00000006.safetensors"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: '.*6.safetensors': it.*4.safetensors.*Delete"):
        Checkpoints(folder, RUN).load()


def test_a_newer_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_VERSION", 0)
    with pytest.raises(ValueError, match=r"step-00000006.safetensors' has version 1.*up to 0.*upgrade"):
        Checkpoints(folder, RUN).load()


def test_the_newest_two_are_kept_and_the_damaged_ones_go(folder: Path, prior: LearnedPrior) -> None:
    assert names(folder) == ["prior.safetensors", "step-00000004.safetensors", "step-00000006.safetensors"]
    (folder / "step-00000006.safetensors").write_bytes(b"")
    writer = Checkpoints(folder, RUN)
    with pytest.warns(CheckpointWarning, match="step-00000006"):
        writer.load()
    writer.save(5, state_of(5), prior)
    assert names(folder) == ["prior.safetensors", "step-00000004.safetensors", "step-00000005.safetensors"]
    writer.save(6, state_of(6), prior)
    assert names(folder) == ["prior.safetensors", "step-00000005.safetensors", "step-00000006.safetensors"]


def test_a_damaged_file_is_none_of_the_two(folder: Path, prior: LearnedPrior) -> None:
    (folder / "step-00000006.safetensors").write_bytes(b"")
    writer = Checkpoints(folder, RUN)
    with pytest.warns(CheckpointWarning, match="step-00000006"):
        writer.load()
    writer.save(8, state_of(8), prior)
    assert names(folder) == ["prior.safetensors", "step-00000004.safetensors", "step-00000008.safetensors"]


def test_what_killed_processes_left_is_cleared(folder: Path) -> None:
    left = [folder / f".{name}.0badcafe.partial" for name in ("step-00000007.safetensors", "prior.safetensors", "mine")]
    for path in left:
        path.write_bytes(b"half")
    Checkpoints(folder, RUN, writes=False)
    assert all(path.exists() for path in left)
    Checkpoints(folder, RUN)
    assert [path.exists() for path in left] == [False, False, True]


def test_a_process_that_does_not_write_reads(folder: Path, prior: LearnedPrior) -> None:
    reader = Checkpoints(folder, RUN, writes=False)
    before = names(folder)
    reader.save(8, state_of(8), prior)
    assert names(folder) == before
    saved = reader.load()
    assert saved is not None
    assert saved.step == 6
    assert Checkpoints(folder / "none", RUN, writes=False).load() is None
    assert names(folder) == before


@pytest.mark.parametrize(("module", "file"), [(checkpoints, "step-00000008"), (storage, "prior")])
def test_a_full_disk_costs_no_run(
    module: Any, file: str, folder: Path, prior: LearnedPrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old files stay, and where the prior could not be written no checkpoint says that it was."""
    before = {path: path.read_bytes() for path in folder.glob("step-*")}

    def fail(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", fail)
    with pytest.warns(CheckpointWarning, match=f"{file}.safetensors' could not be written .*No space left.*goes on"):
        Checkpoints(folder, RUN).save(8, state_of(8), prior)
    assert {path: path.read_bytes() for path in folder.glob("step-*")} == before


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(number: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(path, b"new")
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file", RUN)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="checkpoint_dir=.*cannot be written to; give another folder"):
        Checkpoints(tmp_path, RUN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"after meta-step 6.*\n  seed: was 0, is 1\n.*start=load_prior\('.*prior.safetensors', model\)"),
        ({"num_steps": 12}, r"num_steps: was 9, is 12\n  \(the learning rate falls to zero over num_steps"),
        ({"shots": [1, 2]}, r"shots: was not there, is \[1, 2\]"),
        ({"cosine decay": False, "num_steps": 12}, "cosine decay: was True, is False"),
    ],
)
def test_another_run_is_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpoints(folder, {**RUN, **change}).load()


def test_a_run_whose_rate_does_not_decay_may_be_made_longer(tmp_path: Path, prior: LearnedPrior) -> None:
    run = {**RUN, "cosine decay": False}
    Checkpoints(tmp_path, run).save(6, state_of(6), prior)
    saved = Checkpoints(tmp_path, {**run, "num_steps": 20}).load()
    assert saved is not None
    assert saved.step == 6
    with pytest.raises(ValueError, match="num_steps: was 9, is 5"):
        Checkpoints(tmp_path, {**run, "num_steps": 5}).load()


def test_settings_are_compared_one_by_one() -> None:
    was = {"a": {"b": 1, "log_prob": -2.0}, "c": [1, 2], "only": None}
    assert compare_settings(was, json.loads(json.dumps(was))) == []
    now = {"a": {"b": 2, "log_prob": -2.001}, "c": [1], "new": True}
    lines = ["a.b: was 1, is 2", "c: was [1, 2], is [1]", "new: was not there, is True", "only: was None, is not there"]
    assert compare_settings(was, now) == lines
    assert compare_settings(was, {**was, "a": {"b": 1, "log_prob": -2.1}}) == ["a.log_prob: was -2.0, is -2.1"]


def test_optimisers_are_told_apart_by_their_settings() -> None:
    def describe(**settings: Any) -> dict[str, Any]:
        return describe_optimizer(torch.optim.Adam([torch.zeros(2)], lr=torch.tensor(0.5), **settings))

    assert describe() == json.loads(json.dumps(describe()))
    assert compare_settings(describe(), describe(eps=0.25)) == ["optimizer.group 0.eps: was 1e-08, is 0.25"]
