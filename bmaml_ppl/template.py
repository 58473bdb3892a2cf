"""The shape of one task's data, and how a user's keyword tensors become tasks of that shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from bmaml_ppl.tasks import Tasks

__all__ = ["Template"]


@dataclass(frozen=True)
class Template:
    """What one task's data looks like.

    Attributes:
        data: Key -> trailing shape of one observation.
        constants: Key -> shape of one task's value.
        outputs: Keys that the model observes, absent where they are to be predicted.
    """

    data: dict[str, tuple[int, ...]]
    constants: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, tasks: Tasks, outputs: tuple[str, ...]) -> "Template":
        """The template of given tasks; `outputs` are the keys that the model observes."""
        data = {key: tuple(value.shape[2:]) for key, value in tasks.data.items()}
        constants = {key: tuple(value.shape[1:]) for key, value in tasks.constants.items()}
        return cls(data, constants, outputs)

    def to_tasks(
        self,
        tasks: Tasks | None,
        values: Mapping[str, Any],
        *,
        need_outputs: bool,
        like: Tensor,
        adapted: Tasks | None = None,
    ) -> tuple[Tasks, bool]:
        """Makes tasks of what a user gave: a `Tasks`, or one task's or a batch's keyword tensors.

        Args:
            tasks: Tasks, or None.
            values: Keyword tensors (arrays, lists), (N, ...) for one task or (T, N, ...) for a batch.
            need_outputs: Whether outputs must be there (adaptation) or may be left out (prediction).
            like: Tensor whose dtype and device the result takes.
            adapted: Tasks already adapted to: they give the constants that `values` leaves out, and one
                task's values serve for all of them.

        Returns:
            The tasks, and whether a single task was given.

        Raises:
            TypeError: Both tasks and values were given.
            ValueError: A key is missing, unknown, or of the wrong shape, or the tasks are not as many as the
                adapted ones.
        """
        single = False
        if tasks is None:
            tasks, single = self._from_values(values, need_outputs, like, adapted)
        elif values:
            raise TypeError(f"give Tasks or keyword tensors, not both; got Tasks and {sorted(values)}")
        else:
            self._check_keys(set(tasks.data) | set(tasks.constants), need_outputs)
        if adapted is not None and len(tasks) != len(adapted):
            names = list(adapted.names[:5])
            raise ValueError(f"got {len(tasks)} tasks, but the posterior holds {len(adapted)}: {names}")
        return tasks.to(device=like.device, dtype=like.dtype), single

    def _from_values(
        self, values: Mapping[str, Any], need_outputs: bool, like: Tensor, adapted: Tasks | None
    ) -> tuple[Tasks, bool]:
        known = {} if adapted is None else {k: v for k, v in adapted.constants.items() if k not in values}
        self._check_keys(set(values) | set(known), need_outputs)
        given = {k: self._as_tensor(k, v, like) for k, v in values.items() if v is not None}
        batched = {k: v.ndim > self._ndim(k) for k, v in given.items()}
        if len(set(batched.values())) > 1:
            one = [k for k, many in batched.items() if not many]
            many = [k for k in batched if k not in one]
            raise ValueError(f"{one} hold one task but {many} hold a batch of tasks; give all alike")
        single = not any(batched.values())
        if single:
            copies = 1 if adapted is None else len(adapted)
            given = {k: v.expand(copies, *v.shape) for k, v in given.items()}
        data = {k: v for k, v in given.items() if k in self.data}
        constants = {**known, **{k: v for k, v in given.items() if k in self.constants}}
        outputs = tuple(k for k in self.outputs if k in data)
        names = () if adapted is None else adapted.names
        return Tasks(data, constants, names=names, outputs=outputs), single

    def _ndim(self, key: str) -> int:
        return 1 + len(self.data[key]) if key in self.data else len(self.constants[key])

    def _as_tensor(self, key: str, value: Any, like: Tensor) -> Tensor:
        tensor = torch.as_tensor(value, device=like.device)
        if tensor.is_floating_point() or not isinstance(value, Tensor):
            tensor = tensor.to(like.dtype)
        ndim = self._ndim(key)
        trailing = self.data.get(key, self.constants.get(key))
        if tensor.ndim not in (ndim, ndim + 1) or tuple(tensor.shape[tensor.ndim - len(trailing or ()) :]) != trailing:
            leading = "N" if key in self.data else ""
            raise ValueError(
                f"{key!r} has shape {tuple(tensor.shape)}; one task's is ({leading}{',' if leading else ''} "
                f"{str(trailing)[1:-1]}), a batch has one more dimension in front"
            )
        return tensor

    def _check_keys(self, given: set[str], need_outputs: bool) -> None:
        known = [*self.data, *self.constants]
        for key in sorted(given - set(known)):
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown data key {key!r}, the tasks have {known}{hint}")
        needed = set(known) if need_outputs else set(known) - set(self.outputs)
        if missing := sorted(needed - given):
            raise ValueError(f"missing data {missing}; give all of {sorted(needed)}")
