"""What a meta-step needs in memory: an estimate before it runs, a warning where it will not fit, and advice where
it did not."""

import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bmaml_ppl.adaptation import Adapter, TaskData
from bmaml_ppl.memory import Memory, checkpointed, full, truncated
from bmaml_ppl.objectives import Objective
from bmaml_ppl.outer import Constraints, MetaGradient, Views, constrain, meta_gradient
from bmaml_ppl.types import Tensors

__all__ = ["MemoryEstimate", "MemoryProbe", "MemoryWarning", "OutOfMemory", "free_memory", "guard_memory"]

_OVERHEAD = {"cpu": 1.5, "cuda": 1.2}
"""Resident bytes per live one. On CPU 1.3 to 2 were measured with glibc's allocator, and 1.00 where it maps each tensor
by itself (MALLOC_MMAP_THRESHOLD_=65536); on CUDA this is a guess that was never measured."""

_OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory", re.IGNORECASE)

Gradient = Callable[..., MetaGradient]


class MemoryWarning(UserWarning):
    """A meta-step is estimated to need more memory than is free."""


class OutOfMemory(torch.OutOfMemoryError):
    """A meta-step did not fit into memory; the message says what to write."""


class MemoryEstimate(NamedTuple):
    """Bytes of one meta-step at its peak, beyond what is there before.

    Attributes:
        particles: The adapted states of the tasks differentiated together.
        graph: What the unrolled steps keep for the backward pass.
        work: What one step, its gradient and the objective need beside.
        total: All of it, with what the allocator adds.
    """

    particles: int
    graph: int
    work: int
    total: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_show(value)}" for name, value in self._asdict().items() if name != "total")
        return f"{_show(self.total)} ({parts}, and what the allocator adds)"


def _show(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def forget(_: Any) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


class MemoryProbe:
    """Runs a meta-step of one and two tasks and a few steps, and tells from it what a larger one needs.

    Peak memory is linear in the tasks, and in the steps' graphs and states that a memory mode keeps. Steps run eagerly
    here; recording one of them holds its results twice more.

    Args:
        adapter: Inference bound to a density.
        objective: Losses of tasks.
        known: Constraints of the meta-parameters.
        params: Unconstrained meta-parameters.
        views: Support, query and everything of some tasks, two of which are run.
    """

    def __init__(
        self, adapter: Adapter, objective: Objective, known: Constraints, params: Tensors, views: Views
    ) -> None:
        self.adapter, self.objective, self.known, self.params, self.views = adapter, objective, known, params, views
        self.num_steps = adapter.inference.num_steps
        self._peaks: dict[Any, int] = {}
        self.state = self._measure_state()
        self.all_params = sum(value.untyped_storage().nbytes() for value in params.values())

    def _measure_state(self) -> int:
        """Bytes of what one step changes in one task's state."""
        adapter, view = replace(self.adapter, mode="eager", memory=full()), _first(self.views[0], 1)
        prior = constrain(self.params, self.known)
        with torch.no_grad(), _keep_generators(self.params):
            before = adapter.begin(prior, view)
            after = adapter.run(before, prior, view, 1)
        there = {value.data_ptr() for value in tree_leaves(before)}
        return sum(value.nbytes for value in tree_leaves(after) if value.data_ptr() not in there)

    def peak(self, memory: Memory, num_tasks: int, num_steps: int) -> int:
        """Live bytes at the peak of one meta-step, measured."""
        key = str(memory), num_tasks, num_steps
        if key not in self._peaks:
            inference = self.adapter.inference._replace(num_steps=num_steps)
            adapter = replace(self.adapter, inference=inference, memory=memory, mode="eager")
            views = tuple(_first(view, num_tasks) for view in self.views)
            with _keep_generators(self.params), _LiveTensors() as found:
                meta_gradient(adapter, self.objective, self.known, self.params, views)  # type: ignore[arg-type]
            self._peaks[key] = found.peak
        return self._peaks[key]

    @property
    def step(self) -> int:
        """Bytes that one more step of one task keeps for the backward pass."""
        return max(self.peak(full(), 1, 3) - self.peak(full(), 1, 2), 0)

    def estimate(self, num_tasks: int, memory: Memory) -> MemoryEstimate:
        """Of a meta-step that differentiates so many tasks together."""
        small = memory.per_step()
        one, two = self.peak(small, 1, 2), self.peak(small, 2, 2)
        live = one + (num_tasks - 1) * max(two - one, 0)
        had, has = small.keeps(2), memory.keeps(self.num_steps)
        step, particles = num_tasks * self.step, num_tasks * self.state
        live += step * (has.graphs - had.graphs) + particles * (has.states - had.states)
        if self.adapter.mode != "eager":
            live += 2 * step  # that of the recording, and of the trace for TorchScript's interpreter
        graph = step * has.graphs + particles * has.states
        live = max(live, particles) + 2 * self.all_params  # the optimiser's moments
        graph = min(graph, live - particles)
        kind = next(iter(self.params.values())).device.type
        return MemoryEstimate(particles, graph, live - particles - graph, int(live * _OVERHEAD.get(kind, 1.5)))


def _keep_generators(params: Tensors) -> Any:
    return torch.random.fork_rng(devices=list({x.device for x in params.values() if x.device.type == "cuda"}))


def _first(view: TaskData, num_tasks: int) -> TaskData:
    """So many tasks of a batch, the first one again where there are fewer."""
    index = [i if i < len(next(iter(view.data.values()))) else 0 for i in range(num_tasks)]
    mask = None if view.mask is None else view.mask[index]
    return TaskData({name: value[index] for name, value in view.data.items()}, mask)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device, None where that is not known.

    On CPU, the least of what the machine, the control group and the limit on address space leave.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return min(_find_limits(), default=None) if device.type == "cpu" else None


def _find_limits() -> Iterator[int]:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        yield int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield max(limit - pages * resource.getpagesize(), 0)


class _Guard:
    """A gradient that warns before it will not fit into memory, and says what to write where it did not."""

    def __init__(
        self, gradient: Gradient, adapter: Adapter, objective: Objective, known: Constraints, chunk_size: int | None
    ) -> None:
        self.gradient, self.adapter, self.objective, self.known = gradient, adapter, objective, known
        self.chunk_size = chunk_size
        self._looked = False

    def __call__(self, params: Tensors, views: Views, *weights: Any) -> MetaGradient:
        free = None if self._looked else free_memory(_device_of(params))
        if free is not None and self._may_not_fit(params, views, free):
            self._warn(params, views, free)
        self._looked = True
        try:
            return self.gradient(params, views, *weights)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, OutOfMemory) or not _is_out_of_memory(error):
                raise
            failed = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside the handler, whose traceback holds all that the step had computed.
        raise OutOfMemory(self._explain(params, views, failed))

    def _may_not_fit(self, params: Tensors, views: Views, free: int) -> bool:
        """Whether the job is of a size at which it is worth a second or two to measure what it needs."""
        adapter, inference = self.adapter, self.adapter.inference
        rows = max(value[0].numel() for value in views[2].data.values())
        dim = adapter.density.dim
        floats = inference.num_particles * dim * (rows + min(dim, 128))
        graphs = max(adapter.memory.keeps(inference.num_steps).graphs, 1)
        return 4 * 16 * floats * graphs * self._num_together(views) > free

    def _num_together(self, views: Views) -> int:
        num = len(next(iter(views[0].data.values())))
        return num if self.chunk_size is None else min(num, self.chunk_size)

    def _warn(self, params: Tensors, views: Views, free: int) -> None:
        probe = MemoryProbe(self.adapter, self.objective, self.known, params, views)
        try:
            estimate = probe.estimate(self._num_together(views), self.adapter.memory)
        except Exception:  # an aid alone: the run may fit all the same
            return
        if estimate.total > free:
            warnings.warn(
                f"{self._name(views)} is estimated to need {estimate}, and {_show(free)} are free on "
                f"{_device_of(params)}; {self._advise(probe, views, free)}",
                MemoryWarning,
                stacklevel=5,
            )

    def _explain(self, params: Tensors, views: Views, failed: str) -> str:
        """What was needed, and what to write."""
        device, probe, needed = _device_of(params), None, ""
        with suppress(Exception):  # without the numbers the advice is as good
            probe = MemoryProbe(self.adapter, self.objective, self.known, params, views)
            needed = f"; it needs about {probe.estimate(self._num_together(views), self.adapter.memory)}"
        free = free_memory(device)
        left = "" if free is None else f", {_show(free)} are free now"
        advice = self._advise(probe, views, free)
        return f"{self._name(views)} ran out of memory on {device}{needed}{left}. {advice}\n(torch said: {failed})"

    def _name(self, views: Views) -> str:
        adapter = self.adapter
        return (
            f"a meta-step of {len(next(iter(views[0].data.values())))} tasks, {adapter.inference.name} with "
            f"{adapter.inference.num_particles} particles and {adapter.inference.num_steps} steps, "
            f"memory={adapter.memory}, chunk_size={self.chunk_size}"
        )

    def _advise(self, probe: MemoryProbe | None, views: Views, free: int | None) -> str:
        """What to write, first what changes the result least."""
        lines = "".join(f"\n  {line}" for line in self._alternatives(probe, views, free))
        return f"write one of these, of which the first changes the result least:{lines}"

    def _alternatives(self, probe: MemoryProbe | None, views: Views, free: int | None) -> Iterator[str]:
        inference, num, memory = self.adapter.inference, self._num_together(views), self.adapter.memory

        def need(num_tasks: int, memory: Memory) -> str:
            return "" if probe is None else f", about {_show(probe.estimate(num_tasks, memory).total)}"

        unrolled = not inference.implicit and not inference.num_draws and (probe is None or probe.step > 0)
        most = memory.keeps(inference.num_steps).graphs
        if unrolled and most > 1:
            yield f"memory=checkpointed()  (the same gradient{need(num, checkpointed())}; more time)"
        if num > 1:
            fits = _most_that_fit(probe, num, memory, free)
            yield f"chunk_size={fits}  (the same gradient{need(fits, memory)}; less in parallel)"
            yield f"batch_size={fits}  (a noisier gradient{need(fits, memory)})"
        if unrolled and inference.name == "map_estimate":
            yield 'map_estimate(gradient="implicit")  (the gradient at the optimum instead of through the steps)'
        if unrolled and most > 1:
            last = max(most // 4, 1)
            yield f"memory=truncated({last})  (the gradient of the last steps alone{need(num, truncated(last))})"
        if unrolled and not self.adapter.first_order:
            yield "first_order=True  (scores count as constants)"


def _most_that_fit(probe: MemoryProbe | None, num: int, memory: Memory, free: int | None) -> int:
    """Most tasks that are estimated to fit together, half of them where nothing is known."""
    if probe is None or free is None:
        return max(num // 2, 1)
    sizes = [num // 2**i for i in range(1, num.bit_length()) if num // 2**i]
    return next((size for size in sizes if probe.estimate(size, memory).total <= free), 1)


def _device_of(params: Tensors) -> torch.device:
    return next(iter(params.values())).device


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def guard_memory(
    gradient: Gradient, adapter: Adapter, objective: Objective, known: Constraints, chunk_size: int | None
) -> Gradient:
    """The same gradient, which warns before its first run where it is estimated not to fit, and advises where it did
    not.

    Args:
        gradient: Of parameters, views of tasks and more.
        adapter: What it runs.
        objective: Losses of tasks.
        known: Constraints of the meta-parameters.
        chunk_size: Tasks that it differentiates together, None for all.
    """
    return _Guard(gradient, adapter, objective, known, chunk_size)
