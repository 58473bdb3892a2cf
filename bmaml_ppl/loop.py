"""The outer loop's moving parts: batches, meta-gradients, the optimiser, and what is kept of each step."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from bmaml_ppl.adaptation import Adapter
from bmaml_ppl.checkpoints import Checkpoints, Saved
from bmaml_ppl.chunks import in_chunks
from bmaml_ppl.compiled_gradient import make_gradient
from bmaml_ppl.diagnostics.curvature import NotConverged
from bmaml_ppl.distributed import World
from bmaml_ppl.generators import seeded
from bmaml_ppl.learned import History, LearnedPrior
from bmaml_ppl.memory_estimate import guard_memory
from bmaml_ppl.objectives import Objective
from bmaml_ppl.outer import clip, constrain, episode_views, parameter_groups, unconstrain
from bmaml_ppl.run_settings import describe_optimizer
from bmaml_ppl.signals import HeldSignals
from bmaml_ppl.tasks import Tasks

__all__ = ["Loop", "MetaStep", "Optimizer", "Schedule", "StoppedEarly", "needs_masks"]

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

_FEWEST_STEPS, _LAST_STEPS = 20, 50
_MOST_UNCONVERGED = 0.1
_STOPPED = (
    "meta-learning stopped: {}; the last prior with a finite loss and gradient is kept. If it diverged, standardise "
    'the data, or take shorter or adaptive inner steps (preconditioner="adaptive")'
)


class StoppedEarly(UserWarning):
    """The outer loop met a non-finite loss or gradient and kept the last good prior."""


class MetaStep(NamedTuple):
    """What a callback sees after each meta-step.

    Attributes:
        step: Its number, from 1.
        loss: Objective, mean over the batch's tasks.
        grad_norm: Norm of the meta-gradient before clipping.
        params: Current meta-parameters, constrained.
    """

    step: int
    loss: float
    grad_norm: float
    params: dict[str, Tensor]


class Schedule(NamedTuple):
    """How long and how fast the outer loop goes."""

    num_steps: int
    batch_size: int
    optimizer: Optimizer | None
    max_grad_norm: float
    chunk_size: int | None = None

    @property
    def settings(self) -> dict[str, float | bool]:
        """Numbers that decide the result, and whether the optimiser is the default, whose rates fall on a cosine."""
        numbers = {k: v for k, v in self._asdict().items() if k not in ("optimizer", "chunk_size")}
        return {**numbers, "cosine decay": self.optimizer is None}


class Loop:
    """The outer loop's moving parts.

    Attributes:
        world: The processes that learn together. Its `held` is to be entered around `run`: signals that would end the
            process wait until a step is whole and its checkpoint written, where there are checkpoints or several
            processes.
        kept: The last meta-parameters whose loss and gradient were finite.
        done: Meta-steps taken.
        whole: Whether parameters, optimiser and generator are all those after `done` steps.
    """

    def __init__(
        self,
        learned: LearnedPrior,
        adapter: Adapter,
        tasks: Tasks,
        objective: Objective,
        schedule: Schedule,
        callbacks: list[Callable[[MetaStep], None]],
        world: World,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.world, self.checkpoints = world, checkpoints
        world.held = HeldSignals(checkpoints is not None or world.size > 1)
        learned = replace(learned, params=world.broadcast(learned.params))
        self.learned, self.tasks, self.schedule, self.callbacks = learned, tasks, schedule, callbacks
        self.constraints = learned.constraints
        bound, size = (adapter, objective, self.constraints), schedule.chunk_size
        gradient = guard_memory(in_chunks(make_gradient(*bound, schedule.num_steps), size), *bound, size)
        self.gradient = partial(world.meta_gradient, gradient)
        self.compiles = adapter.mode == "compiled"
        self.masked = needs_masks(tasks, learned.num_support)
        free = unconstrain(learned.params, self.constraints)
        self.params = {k: v.detach().clone().requires_grad_() for k, v in free.items()}
        if schedule.optimizer is None:
            slow = learned.density.networks | {"particles"}
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(parameter_groups(self.params, slow))
        else:
            self.optimizer = schedule.optimizer(list(self.params.values()))
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(schedule.num_steps, 1))
        self.generator = torch.Generator().manual_seed(learned.seed)
        self.history = History()
        self.kept, self.done, self.whole, self.written = self._snapshot(), 0, True, 0
        if checkpoints is not None:
            checkpoints.run.update(describe_optimizer(self.optimizer))

    def run(self, progress: bool) -> LearnedPrior:
        """Takes all meta-steps that are left and returns the learned prior."""
        visible, last = progress and self.world.writes, self.schedule.num_steps
        self._resume(visible)
        steps = range(self.done + 1, last + 1)
        bar = tqdm(steps, disable=not visible, desc="meta-learning", initial=self.done, total=last)
        if self.compiles and not bar.disable:
            bar.set_postfix_str("compiling, once; a minute or two the first time on this machine")
        for step in bar:
            try:
                stopped = self._step(step)
                self.world.check_parameters(self.params, self.done)
                stopping = self.world.stopping  # a signal that comes from here on waits for the next step's checkpoint
                self._write(step == last or stopping)
                if stopping:
                    self.world.deliver()
            except KeyboardInterrupt:
                self._write(True)
                stopped = f"interrupted at meta-step {step}"
            if stopped is not None:
                return self._stop(stopped)
            self._show(bar)
        self._warn_of_unconverged()
        return replace(self.learned, params=self._snapshot(), history=self.history)

    def _resume(self, visible: bool) -> None:
        """Goes on from the newest checkpoint, where there is one."""
        saved = None if self.checkpoints is None else self.checkpoints.load()
        if self.checkpoints is not None and saved is not None:
            self._restore(saved)
            if not self.checkpoints.prior_path.is_file():
                self.checkpoints.save_prior(replace(self.learned, params=self._snapshot()))
            if visible:
                left = self.schedule.num_steps - saved.step
                what = f"meta-learning goes on for {left} meta-steps" if left else "meta-learning was finished"
                tqdm.write(f"{what}: read '{saved.path}'", file=sys.stderr)
        self.world.require_same({"newest checkpoint": self.done, **describe_optimizer(self.optimizer)})

    def _stop(self, why: str) -> LearnedPrior:
        """Ends the run early with the last good prior."""
        self.history.stopped = why
        warnings.warn(_STOPPED.format(why), StoppedEarly, stacklevel=4)
        good = replace(self.learned, params=self.kept, history=self.history)
        if self.checkpoints is not None and not (self.whole and self.checkpoints.prior_path.is_file()):
            self.checkpoints.save_prior(good)  # else it stands there as of the newest checkpoint
        return good

    def _show(self, bar: Any) -> None:
        h = self.history
        rate = sum(h.tasks_per_second[-20:]) / len(h.tasks_per_second[-20:])
        counts = {"repaired": h.num_repaired[-1], "not converged": h.num_unconverged[-1]}
        notes = "".join(f", {count} {what}" for what, count in counts.items() if count)
        bar.set_postfix_str(f"loss {h.loss[-1]:.3f}, gradient {h.grad_norm[-1]:.2g}, {rate:.0f} tasks/s{notes}", False)

    def _step(self, step: int) -> str | None:
        """Takes one meta-step; returns why the loop must stop, or None."""
        began, before, self.whole = perf_counter(), self._snapshot(), False
        episode = self.tasks.sample_batch(self.schedule.batch_size, self.learned.num_support, self.generator)
        params = {k: v.detach() for k, v in self.params.items()}
        seed = int(torch.randint(2**62, (), generator=self.generator))
        with seeded(seed, self.learned.device):
            found = self.gradient(params, episode_views(episode, self.masked))
        loss = found.loss
        gradients, norm = clip(found.gradients, self.schedule.max_grad_norm)
        if not torch.isfinite(loss + norm):
            return f"loss {loss.item():g} with gradient norm {norm.item():g} at meta-step {step}"
        self.history.loss.append(loss.item())
        self.history.grad_norm.append(norm.item())
        self.history.num_repaired.append(int(found.num_repaired))
        self.history.num_unconverged.append(int(found.num_unconverged))
        for name, value in self.params.items():
            value.grad = gradients[name]
        self.optimizer.step()
        if self.schedule.optimizer is None:
            self.decay.step()
        self.history.tasks_per_second.append(len(episode.support) / (perf_counter() - began))
        # Only what had a finite loss and gradient is good; what the optimiser makes of it is not known yet.
        self.kept, self.done, self.whole = before, step, True
        for callback in self.callbacks:
            callback(MetaStep(step, loss.item(), norm.item(), self._snapshot()))
        return None

    def _warn_of_unconverged(self) -> None:
        """Speaks up where gradients at optima were taken elsewhere, toward the end of the run."""
        counts = self.history.num_unconverged[-_LAST_STEPS:]
        tasks = len(counts) * self.schedule.batch_size
        if len(counts) >= _FEWEST_STEPS and sum(counts) > _MOST_UNCONVERGED * tasks:
            warnings.warn(
                f"in the last {len(counts)} meta-steps {sum(counts)} of {tasks} adaptations stopped short of the "
                "optimum at which implicit gradients are taken; write more steps in the inference (num_steps=...), or "
                'gradient="unrolled"',
                NotConverged,
                stacklevel=4,
            )

    def _write(self, now: bool) -> None:
        """Writes a checkpoint where one is due, unless it is there, or the last step was left in the middle."""
        found = self.checkpoints
        if found is None or not self.whole or self.done == self.written:
            return
        if now or self.done % found.every == 0:
            self.written = self.done
            found.save(self.done, self._state(), replace(self.learned, params=self._snapshot()))

    def _state(self) -> dict[str, Any]:
        """All that later steps depend on."""
        return {
            "params": {k: v.detach() for k, v in self.params.items()},
            "kept": self.kept,
            "optimizer": self.optimizer.state_dict(),
            "decay": self.decay.state_dict(),
            "generator": self.generator.get_state(),
            "history": {k: torch.from_numpy(np.asarray(v)) for k, v in vars(self.history).items() if k != "stopped"},
        }

    def _restore(self, saved: Saved) -> None:
        """The inverse of `_state`."""
        state = saved.state
        with torch.no_grad():
            for name, value in self.params.items():
                value.copy_(state["params"][name])
        self.kept = {k: v.to(self.learned.device) for k, v in state["kept"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.decay.load_state_dict(state["decay"])
        self.generator.set_state(state["generator"])
        self.history = History(**{k: v.tolist() for k, v in state["history"].items()})
        self.done = self.written = saved.step

    def _snapshot(self) -> dict[str, Tensor]:
        detached = {k: v.detach().clone() for k, v in self.params.items()}
        return {k: v.clone() for k, v in constrain(detached, self.constraints).items()}


def needs_masks(tasks: Tasks, num_support: int | range) -> bool:
    """Whether some batch of these tasks is padded."""
    return tasks.mask is not None or isinstance(num_support, range)
