"""Scale-out: each process takes a part of every batch of tasks, and one sum over processes a step joins the parts.

Every process draws the same batches from the same seed and takes the same optimiser steps on the same gradient, so that
parameters stay equal bit for bit and nothing else is exchanged. On GPUs (nccl) this has not been run yet.
"""

import atexit
import hashlib
import json
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from bmaml_ppl.adaptation import take_tasks
from bmaml_ppl.outer import MetaGradient, Views, equal_weights
from bmaml_ppl.run_settings import Settings, compare_settings
from bmaml_ppl.signals import HeldSignals
from bmaml_ppl.types import Tensors

__all__ = ["ElsewhereError", "World", "join_world", "num_restarts"]

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CHECKED_EVERY, _MOST_DIFFERENCES = 100, 12
_STOPS = (signal.SIGINT, signal.SIGTERM)


class ElsewhereError(RuntimeError):
    """Another process of the run failed, or is gone, and its message says why."""


class World:
    """The processes that learn one prior together, seen from one of them; a process alone is a world of one.

    Args:
        rank: This process, from 0.
        size: How many there are.
        device: Where collectives run.

    Attributes:
        held: The signals that this process holds back.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.held = HeldSignals(active=False)
        self._agreed: int | None = None

    @property
    def writes(self) -> bool:
        """Whether this process shows progress, warns and writes files: one does."""
        return self.rank == 0

    def share(self, num_tasks: int) -> slice:
        """This process's part of a batch; parts differ by at most one task, and may be empty."""
        each, rest = divmod(num_tasks, self.size)
        first = self.rank * each + min(self.rank, rest)
        return slice(first, first + each + (self.rank < rest))

    def meta_gradient(self, gradient: Callable[..., MetaGradient], params: Tensors, views: Views) -> MetaGradient:
        """The gradient over the whole batch, the same bit for bit on every process.

        Processes also hear here of signals that asked one of them to stop; see `deliver`.

        Args:
            gradient: `meta_gradient` of parameters, views of tasks and their weights.
            params: Unconstrained meta-parameters.
            views: Support, query and everything of the whole batch.

        Raises:
            ElsewhereError: If another process failed or is gone.
        """
        if self.size == 1:
            return gradient(params, views)
        weights = equal_weights(views)
        rows, none = self.share(len(weights)), weights.new_zeros(())
        found = MetaGradient({k: torch.zeros_like(v) for k, v in params.items()}, none, none.long(), none.long())
        failure: Exception | None = None
        if rows.start < rows.stop:
            support, query, everything = (take_tasks(view, rows) for view in views)
            try:
                found = gradient(params, (support, query, everything), weights[rows])
            except Exception as error:  # raised below, once the others have heard of it
                failure = error
        joined, failed = self._join(found, failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise ElsewhereError("another process failed; its message says why")
        return joined

    def _join(self, found: MetaGradient, failed: bool) -> tuple[MetaGradient, bool]:
        numbers = (found.loss, found.num_repaired, found.num_unconverged)
        flags = [failed, *(self.held.pending == number for number in _STOPS)]
        told = torch.tensor(flags, dtype=torch.float32, device=found.loss.device)
        # Counts are whole in float32 up to 16 million, but not in the half precisions.
        kind = torch.promote_types(found.loss.dtype, torch.float32)
        parts = [*found.gradients.values(), *numbers, told]
        total = self._sum(torch.cat([part.detach().reshape(-1).to(kind) for part in parts]))
        pieces = total.split([part.numel() for part in parts])
        any_failed, *asked = pieces[-1].tolist()
        self._agreed = next((number for number, count in zip(_STOPS, asked, strict=True) if count), None)
        shaped = [piece.view_as(part).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]
        return MetaGradient(dict(zip(found.gradients, shaped, strict=False)), *shaped[-4:-1]), bool(any_failed)

    @property
    def stopping(self) -> bool:
        """Whether `deliver` is about to let a signal act."""
        return (self.held.pending if self.size == 1 else self._agreed) is not None

    def deliver(self) -> None:
        """Lets a signal held back act once every process has heard of one: all stop at the same step."""
        if self.size > 1:
            if self._agreed is None:
                return
            self._sum(torch.zeros((), device=self.device))  # process 0 has written what it has to
            self.held.pending, self._agreed = self._agreed, None
        self.held.deliver()

    def require_same(self, run: Settings) -> None:
        """Compares what the processes were given; all of them must call this.

        Args:
            run: See `describe_run`.

        Raises:
            ValueError: On every process, if some process was given something else than process 0.
        """
        if self.size == 1:
            return
        lines = compare_settings(json.loads(self._tell(json.dumps(run), 0)), run)
        if not self._sum(torch.tensor(len(lines), device=self.device)).item():
            return
        told = {rank: self._tell("\n  ".join(lines[:_MOST_DIFFERENCES]), rank) for rank in range(self.size)}
        shown = "".join(f"\nprocess {rank}:\n  {text}" for rank, text in told.items() if text)
        raise ValueError(
            "the processes of this run were given different data or settings; each must read the same data and call "
            "with the same arguments, and runs that are to differ are started one by one, without torchrun. What was "
            f"given to process 0, and is given to{shown}"
        )

    def _tell(self, text: str, rank: int) -> str:
        """One process's text, on every process."""
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = torch.tensor(len(content) if rank == self.rank else 0, device=self.device)
        if self._sum(size) == 0:
            return ""
        content = content if rank == self.rank else content.new_empty(int(size))
        dist.broadcast(content, src=rank)
        return bytes(content.tolist()).decode()

    def check_parameters(self, params: Tensors, step: int) -> None:
        """Compares the parameters that the processes hold, every hundred steps; all of them must call this.

        Raises:
            RuntimeError: On every process, if they differ in a bit.
        """
        if self.size == 1 or step % _CHECKED_EVERY:
            return
        digests = torch.zeros(self.size, dtype=torch.int64)
        digests[self.rank] = _digest(params)
        digests = self._sum(digests.to(self.device))
        if ranks := (digests != digests[0]).nonzero().flatten().tolist():
            raise RuntimeError(
                f"after meta-step {step} process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} and "
                "process 0 hold different parameters; run on machines of one kind with the same versions, and let "
                "nothing but meta_learn change the parameters"
            )

    def broadcast(self, params: Tensors) -> dict[str, Tensor]:
        """Process 0's parameters, on every process."""
        if self.size == 1:
            return dict(params)
        sent = {name: value.detach().clone().contiguous() for name, value in params.items()}
        for value in sent.values():
            dist.broadcast(value, src=0)
        return sent

    def first(self, action: Callable[[], bool]) -> bool:
        """Process 0 acts while the others wait; all return what it returned, and where it fails, all fail.

        Raises:
            Exception: What the action raises, on process 0.
            ElsewhereError: On the others.
        """
        if self.size == 1:
            return action()
        failed, answer = None, False
        if self.writes:
            try:
                answer = action()
            except Exception as error:  # raised again below, once the others have heard of it
                failed = error
        told = self._sum(torch.tensor([failed is not None, answer], dtype=torch.int64, device=self.device))
        if failed is not None:
            raise failed
        if told[0]:
            raise ElsewhereError("process 0 failed; its message says why")
        return bool(told[1])

    def warn_of_idle(self, num_tasks: int) -> None:
        """Speaks up where a batch has fewer tasks than there are processes."""
        if num_tasks < self.size:
            warnings.warn(
                f"a batch of {num_tasks} tasks leaves {self.size - num_tasks} of {self.size} processes idle; write a "
                "larger batch_size, or start fewer",
                stacklevel=3,
            )

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Lets only the process that writes warn."""
        if self.writes:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def _sum(self, value: Tensor) -> Tensor:
        """The sum over processes, the same bit for bit on each."""
        try:
            dist.all_reduce(value)
        except RuntimeError as error:
            raise ElsewhereError(
                f"process {self.rank} of {self.size} waits for a process that is gone; the message of that one says "
                "why. With checkpoint_dir=..., torchrun --max-restarts 3 goes on from the last checkpoint"
            ) from error
        return value


def join_world(device: torch.device | str = "cpu") -> tuple[World, torch.device]:
    """The world of an initialised process group, or of `torchrun`'s environment, or of this process alone.

    Args:
        device: Where to compute; CUDA without an index is the GPU of this process's LOCAL_RANK.

    Returns:
        The world, and where this process computes.

    Raises:
        ValueError: If there are fewer GPUs than processes on this machine, or the group cannot serve the device.
    """
    device = torch.device(device)
    if not dist.is_available():
        return World(device=device), device
    if _is_launched() and not dist.is_initialized():
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        _join("cpu:gloo,cuda:nccl" if gpus else "gloo")
        atexit.register(_leave)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return World(device=device), device
    if device.type == "cuda":
        device = _own_gpu(device)
        torch.cuda.set_device(device)
    elif dist.get_backend() == "nccl":
        raise ValueError(
            f"device={str(device)!r}, but the process group was initialised for GPUs alone; write "
            'init_process_group("cpu:gloo,cuda:nccl")'
        )
    return World(dist.get_rank(), dist.get_world_size(), device), device


def _join(backend: str) -> None:
    """Joins the processes that torchrun started."""
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        dist.init_process_group(backend)
        return
    # Restarted processes find the same store as those before them, and in it the addresses of the dead. (Of several
    # machines, each counts its own restarts, so that the count names nothing that all agree on.)
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=PrefixStore(f"restart {num_restarts()}", store), rank=rank, world_size=size)


def _is_launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process, and not a process that it started."""
    several = all(name in os.environ for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"
    return several and multiprocessing.parent_process() is None


def _own_gpu(device: torch.device) -> torch.device:
    if device.index is not None:
        return device
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank() % torch.cuda.device_count()))
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"process {dist.get_rank()} is number {local} on its machine, where torch sees {torch.cuda.device_count()} "
            f'GPUs; start --nproc-per-node {torch.cuda.device_count()}, or write device="cpu"'
        )
    return torch.device("cuda", local)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def num_restarts() -> int:
    """How often torchrun has started this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _digest(params: Tensors) -> int:
    """A number that differs where parameters do."""
    found = hashlib.blake2b(digest_size=8)
    for value in params.values():
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(found.digest(), "little", signed=True)
