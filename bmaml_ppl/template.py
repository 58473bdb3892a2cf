"""The shape of one task's data, and how a user's keyword tensors become tasks of that shape."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmaml_ppl.tasks import Tasks

__all__ = ["Template"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """What one task's data looks like.

    Attributes:
        data: Key -> trailing shape of one observation.
        constants: Key -> shape of one task's value.
        outputs: Keys that the model observes, absent where they are to be predicted.
        integers: Key -> dtype of the keys that hold integers or bools; all others are floating.
    """

    data: dict[str, Shape]
    constants: dict[str, Shape]
    outputs: tuple[str, ...]
    integers: dict[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def of(cls, tasks: Tasks, outputs: tuple[str, ...]) -> "Template":
        """The template of given tasks; `outputs` are the keys that the model observes."""
        data = {key: tuple(value.shape[2:]) for key, value in tasks.data.items()}
        constants = {key: tuple(value.shape[1:]) for key, value in tasks.constants.items()}
        everything = {**tasks.data, **tasks.constants}
        integers = {key: value.dtype for key, value in everything.items() if not value.is_floating_point()}
        return cls(data, constants, outputs, integers)

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
            values: Keyword tensors (arrays, lists), (N, ...) for one task or (T, N, ...) for a batch; None
                is as good as absent.
            need_outputs: Whether outputs must be there (adaptation) or may be left out (prediction).
            like: Tensor whose dtype and device the result takes.
            adapted: Tasks already adapted to: they give the constants that `values` leaves out, and one
                task's values serve for all of them.

        Returns:
            The tasks, and whether a single task was given.

        Raises:
            TypeError: Both tasks and values were given, something else than Tasks, values that are not numbers, or
                a floating value for a key that holds integers.
            ValueError: A key is missing, unknown, or of the wrong shape, or the tasks are not the adapted
                ones.
        """
        if tasks is not None and not isinstance(tasks, Tasks):
            raise TypeError(
                f"got {type(tasks).__name__} where Tasks are expected; give keyword tensors, "
                f"{', '.join(f'{key}=...' for key in [*self.data, *self.constants])}, or make Tasks with "
                "Tasks.from_list"
            )
        given = {key: value for key, value in values.items() if value is not None}
        single = False
        if tasks is None:
            tasks, single = self._from_values(given, need_outputs, like, adapted)
        elif given:
            raise TypeError(f"give Tasks or keyword tensors, not both; got Tasks and {sorted(given)}")
        else:
            tasks = self._conform(tasks, need_outputs, like)
        if adapted is not None:
            _check_same_tasks(tasks.names, adapted.names)
        return tasks, single

    def example(self, num_observations: int, like: Tensor) -> dict[str, Tensor]:
        """One task's data with a one in every cell, for a model to be looked at without a user's data."""
        shapes = {key: (num_observations, *shape) for key, shape in self.data.items()} | self.constants
        return {
            key: torch.ones(shape, dtype=self.integers.get(key, like.dtype), device=like.device)
            for key, shape in shapes.items()
        }

    def varied_example(self, num_observations: int, like: Tensor) -> dict[str, Tensor]:
        """As `example`, with another number between 0.1 and 0.9 in every floating cell, and zeros and ones in integer
        outputs, for keys and models to be told apart; integer inputs, which may be indices, stay one."""
        values = self.example(num_observations, like)
        for index, (key, ones) in enumerate(sorted(values.items())):
            order = torch.arange(1, ones.numel() + 1, device=ones.device, dtype=torch.float64)
            if key in self.outputs and not ones.is_floating_point():
                values[key] = (order % (2 + index) == 1).to(ones).reshape(ones.shape)
            if ones.is_floating_point():
                values[key] = (0.1 + 0.8 * (0.618034 * (order + 0.37 * index) % 1)).to(ones).reshape(ones.shape)
        return values

    def fill_outputs(self, tasks: Tasks) -> Tasks:
        """Puts a one in every cell of outputs that are not given, so that those given can be scored."""
        like = next(iter(tasks.data.values()))
        missing = [key for key in self.outputs if key not in tasks.data and key not in tasks.constants]

        def ones(key: str, *lead: int) -> Tensor:
            return torch.ones(*lead, *self._shape(key), dtype=self.integers.get(key, like.dtype), device=like.device)

        data = {key: ones(key, *like.shape[:2]) for key in missing if key in self.data}
        constants = {key: ones(key, len(tasks)) for key in missing if key in self.constants}
        if tasks.mask is not None:  # padded cells are zero
            data = {k: v * tasks.mask.reshape(*tasks.mask.shape, *(1,) * (v.ndim - 2)).to(v) for k, v in data.items()}
        return replace(tasks, data={**tasks.data, **data}, constants={**tasks.constants, **constants})

    def _conform(self, tasks: Tasks, need_outputs: bool, like: Tensor) -> Tasks:
        self._check_keys(set(tasks.data) | set(tasks.constants), need_outputs)
        self._check_roles(set(tasks.data), set(tasks.constants))
        data = {k: self._as_tensor(k, v, like, "a batch") for k, v in tasks.data.items()}
        constants = {k: self._as_tensor(k, v, like, "a batch") for k, v in tasks.constants.items()}
        return replace(tasks.to(device=like.device, dtype=like.dtype), data=data, constants=constants)

    def _check_roles(self, data: set[str], constants: set[str]) -> None:
        if wrong := sorted(data & set(self.constants)):
            raise ValueError(f"{wrong} were given once per task when the prior was learned; give them as constants")
        if wrong := sorted(constants & set(self.data)):
            raise ValueError(f"{wrong} were given per observation when the prior was learned; give them as data")

    def _from_values(
        self, values: Mapping[str, Any], need_outputs: bool, like: Tensor, adapted: Tasks | None
    ) -> tuple[Tasks, bool]:
        known = {} if adapted is None else {k: v for k, v in adapted.constants.items() if k not in values}
        self._check_keys(set(values) | set(known), need_outputs)
        given = {k: self._as_tensor(k, v, like) for k, v in values.items()}
        one = [k for k, v in given.items() if v.ndim == self._ndim(k)]
        many = [k for k in given if k not in one]
        if one and many:
            raise ValueError(f"{one} hold one task but {many} hold a batch of tasks; give all alike")
        if one:
            copies = 1 if adapted is None else len(adapted)
            given = {k: v.expand(copies, *v.shape) for k, v in given.items()}
        data = {k: v for k, v in given.items() if k in self.data}
        constants = {**known, **{k: v for k, v in given.items() if k in self.constants}}
        if adapted is not None:
            _check_count({k: len(v) for k, v in given.items()}, adapted.names)
        outputs = tuple(k for k in self.outputs if k in data)
        names = () if adapted is None else adapted.names
        return Tasks(data, constants, names=names, outputs=outputs), bool(one)

    def _shape(self, key: str) -> Shape:
        return self.data[key] if key in self.data else self.constants[key]

    def _ndim(self, key: str) -> int:
        return len(self._shape(key)) + (key in self.data)

    def _as_tensor(self, key: str, value: Any, like: Tensor, kind: str = "") -> Tensor:
        tensor = value if isinstance(value, Tensor) else _to_tensor(key, value)
        wanted = self.integers.get(key, like.dtype)
        if tensor.is_floating_point() and not wanted.is_floating_point:
            raise TypeError(f"{key!r} holds {tensor.dtype}, but the prior was learned with {wanted}; convert it")
        shape, ndim = self._shape(key), self._ndim(key)
        allowed = (ndim + 1,) if kind else (ndim, ndim + 1)
        if tensor.ndim not in allowed or tuple(tensor.shape[tensor.ndim - len(shape) :]) != shape:
            one = ", ".join([*(["N"] if key in self.data else []), *map(str, shape)])
            raise ValueError(
                f"{key!r} has shape {tuple(tensor.shape)}; one task's is ({one}), and a batch of T tasks has one more "
                f"dimension in front, ({', '.join(filter(None, ['T', one]))})"
            )
        return tensor.to(device=like.device, dtype=wanted)

    def _check_keys(self, given: set[str], need_outputs: bool) -> None:
        known = [*self.data, *self.constants]
        for key in sorted(given - set(known)):
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown data key {key!r}, the tasks have {known}{hint}")
        needed = set(known) if need_outputs else set(known) - set(self.outputs)
        if missing := sorted(needed - given):
            raise ValueError(f"missing data {missing}; give all of {sorted(needed)}")


def _to_tensor(key: str, value: Any) -> Tensor:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{key!r} holds lists of different lengths; give one rectangular array, or tasks of different lengths as "
            "Tasks.from_list([...])"
        ) from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{key!r} holds {array.dtype} values, got {value!r:.60}; give numbers")
    return torch.tensor(array)


def _check_count(lengths: Mapping[str, int], names: tuple[str, ...]) -> None:
    for key, length in lengths.items():
        if length != len(names):
            raise ValueError(
                f"{key!r} holds {length} tasks, but the posterior holds {len(names)}: {list(names[:5])}; give one "
                "task's values for all of them, or a batch of as many"
            )


def _check_same_tasks(given: tuple[str, ...], adapted: tuple[str, ...]) -> None:
    if len(given) != len(adapted):
        raise ValueError(f"got {len(given)} tasks, but the posterior holds {len(adapted)}: {list(adapted[:5])}")
    if len(given) > 1 and given != adapted:
        raise ValueError(
            f"got the tasks {list(given[:5])}, but the posterior holds {list(adapted[:5])}, in this order; write "
            "tasks[list(posterior.names)], or give keyword tensors to match them by position"
        )
