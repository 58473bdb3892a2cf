"""Many small related data sets as one batch of tensors, and the episodes that meta-learning draws from it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bmaml_ppl import _columns
from bmaml_ppl._columns import Columns
from bmaml_ppl.scaling import Scaling

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Episode", "Tasks"]


@dataclass(frozen=True, eq=False, repr=False)
class Tasks:
    """T tasks of up to N observations each, in the user's own units.

    Ragged tasks are padded with zeros (NaN padding would poison gradients even under a mask). `scaling` never
    changes `data`: it travels beside it and the learner applies it at the model's door (`scaled`).

    Args:
        data: Column name to tensor `(T, N, ...)`, floating, integer or bool; zero wherever `mask` is False.
        constants: Name to tensor `(T, ...)`: what is known once per task. No name may also be in `data`.
        mask: Bool `(T, N)`, True where an observation is real; None when nothing is padded.
        names: T distinct task names; `task 0`, `task 1`, ... when empty.
        outputs: Which names of `data` are outputs (predicted); `()` = unknown.
        scaling: Standardisation of the columns, in the units of `data`; None = the model sees raw units.

    Raises:
        TypeError: A column is not a tensor, or is complex.
        ValueError: Shapes disagree, a value is NaN or infinite, a padded cell is not zero, a task is empty,
            or a name is repeated or unknown. Messages name the task and the column.
    """

    data: dict[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    names: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        for name, tensor in {**self.data, **self.constants}.items():
            _columns.check_tensor(name, tensor)
        num_tasks = _columns.check_shapes(self.data, self.constants, self.mask)
        names = tuple(self.names) or tuple(f"task {i}" for i in range(num_tasks))
        _columns.check_names(names, num_tasks, self.data, self.constants, self.outputs)
        mask = None if self.mask is None or bool(self.mask.all()) else self.mask
        _columns.check_values(self.data, self.constants, mask, names)
        self.__dict__.update(
            data=dict(self.data),
            constants=dict(self.constants),
            mask=mask,
            names=names,
            outputs=tuple(self.outputs),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator["Tasks"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: int | str | slice | Sequence[int | str] | Tensor) -> "Tasks":
        """Selects tasks by position, name, slice, list or tensor; an int or a name gives a Tasks of length 1.

        Columns that are padding for every selected task are dropped, so one task alone has no mask.

        Raises:
            IndexError: A position is out of range.
            KeyError: No task has that name.
        """
        tasks = self._take_tasks(_columns.find_positions(key, self.names))
        if tasks.mask is None:
            return tasks
        real = tasks.mask.any(0)
        mask = tasks.mask[:, real]
        data = {name: value[:, real] for name, value in tasks.data.items()}
        return tasks._with(data=data, mask=None if bool(mask.all()) else mask)

    def __repr__(self) -> str:
        lengths = self.num_observations
        low, high = int(lengths.min()), int(lengths.max())
        parts = [f"{len(self)} tasks of {low if low == high else f'{low} to {high}'} observations"]
        inputs = [name for name in self.data if name not in self.outputs]
        groups = {
            "inputs" if self.outputs else "data": inputs,
            "outputs": self.outputs,
            "constants": self.constants,
        }
        groups["standardised"] = () if self.scaling is None else self.scaling.loc
        parts += [f"{title}: {', '.join(group)}" for title, group in groups.items() if group]
        return f"Tasks({'; '.join(parts)})"

    @property
    def num_observations(self) -> Tensor:
        """Real observations of each task, int64 `(T,)`."""
        first = next(iter(self.data.values()))
        if self.mask is None:
            return torch.full((len(self),), first.shape[1], device=first.device)
        return self.mask.sum(1)

    @classmethod
    def from_frame(
        cls,
        frame: "DataFrame",
        *,
        task: str,
        inputs: Columns,
        outputs: Columns,
        constants: Columns | None = None,
        min_observations: int = 1,
    ) -> "Tasks":
        """Groups the rows of a pandas data frame by task; one row is one observation.

        Numbers and bools become floats of torch's default dtype. Tasks keep the order of their first
        appearance and rows their order within the task.

        Args:
            frame: The table, in the user's units.
            task: Column that labels the task of each row.
            inputs: The model's keyword to a column, or to a list of columns (which gives a trailing
                dimension).
            outputs: The same for what the model predicts.
            constants: The same for what must be equal in all rows of a task.
            min_observations: Tasks with fewer rows are left out.

        Raises:
            TypeError: A column does not hold numbers.
            ValueError: A column is unknown, a value or task label is missing or infinite, a constant varies
                within a task, a keyword is used twice, or no task is left.
        """
        groups = {"inputs": inputs, "outputs": outputs, "constants": constants or {}}
        return cls(*_columns.read_frame(frame, task, groups, min_observations), outputs=tuple(outputs))

    @classmethod
    def from_list(
        cls,
        tasks: Sequence[Mapping[str, Any]],
        *,
        outputs: Sequence[str] = (),
        constants: Sequence[str] = (),
        names: Sequence[str] | None = None,
    ) -> "Tasks":
        """Stacks tasks given one by one; lengths may differ between tasks.

        Tensors keep their dtype; other floats take torch's default dtype, integers and bools stay what they
        are.

        Args:
            tasks: For each task, column name to tensor, array or sequence `(N_t, ...)`, or any shape for
                constants.
            outputs: Which columns are outputs.
            constants: Which columns are given once per task.
            names: Task names, `task 0`, `task 1`, ... when None.

        Raises:
            TypeError: A column does not hold numbers.
            ValueError: A task is empty, its columns differ in length or from the first task's, or a value is
                not finite.
        """
        return cls(*_columns.read_list(tasks, constants, names), outputs=tuple(outputs))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Tasks":
        """Returns a copy on another device; `dtype` changes the floating tensors only."""

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        return self._with(
            data={name: move(value) for name, value in self.data.items()},
            constants={name: move(value) for name, value in self.constants.items()},
            mask=None if self.mask is None else move(self.mask),
            scaling=None if self.scaling is None else self.scaling.to(device, dtype),
        )

    def split(self, fraction: float, seed: int) -> tuple["Tasks", "Tasks"]:
        """Splits the tasks at random into (train, test), `round(fraction * T)` of them in train, in order.

        Raises:
            ValueError: A side would be empty.
        """
        num_train = round(fraction * len(self))
        if not 0 < num_train < len(self):
            raise ValueError(
                f"split({fraction}) of {len(self)} tasks gives {num_train} train tasks; choose a fraction "
                "that leaves both sides at least one task"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self[order[:num_train].sort().values], self[order[num_train:].sort().values]

    def standardize(self, columns: Sequence[str] | None = None) -> "Tasks":
        """Returns the same data with a Scaling (mean 0, sd 1) fitted to all real observations.

        `data` stays in the user's units: the learner applies the scaling at the model's door, and a
        LearnedPrior remembers it, so that test tasks stay raw and predictions come back in raw units. Call it
        on the training tasks only.

        Args:
            columns: Names in `data` or `constants`; None = every floating column of `data` with more than two
                distinct values (a 0/1 indicator keeps its meaning).

        Raises:
            TypeError: A column is not floating.
            ValueError: A name is unknown.
        """
        everything = {**self.data, **self.constants}
        if columns is None:
            columns = [name for name in self.data if _is_continuous(self._real_values(name))]
        _columns.check_known("columns", columns, everything)
        loc, scale = {}, {}
        for name in columns:
            values = self._real_values(name)
            if not values.is_floating_point():
                raise TypeError(
                    f"column {name!r} is {values.dtype}; only floating columns can be standardised, leave it out"
                )
            loc[name] = values.mean(0)
            # Rounding leaves a constant column with a tiny non-zero sd, so constancy is tested exactly.
            scale[name] = torch.where(values.amax(0) > values.amin(0), values.std(0, correction=0), 1.0)
        return self._with(scaling=Scaling(loc, scale))

    def scaled(self) -> "Tasks":
        """Returns the tasks as the model sees them: `scaling` applied, padding zero, no scaling left."""
        if self.scaling is None:
            return self
        data = {name: _zero_padding(value, self.mask) for name, value in self.scaling.apply(self.data).items()}
        return self._with(data=data, constants=self.scaling.apply(self.constants), scaling=None)

    def split_observations(
        self, num_support: int | range, generator: torch.Generator | None = None, num_query: int | None = None
    ) -> "Episode":
        """Splits each task's real observations into K support rows and all the rest as query rows.

        Rows keep their order on both sides. Widths depend on N and the arguments only, so that a compiled
        step sees one shape.

        Args:
            num_support: K; a range draws K per task, uniformly, and pads the support to the largest K under a
                mask.
            generator: Chooses the rows at random (and K, from a range); None takes the first K rows as
                support.
            num_query: At most so many query rows, chosen at random (the first ones without a generator); None
                = all.

        Raises:
            TypeError: `num_support` is neither int nor range, or `generator` not a torch.Generator.
            ValueError: A task has fewer than K + 1 observations, K or `num_query` is below 1, or a range
                comes without a generator.
        """
        _columns.check_episode(num_support, generator, num_query, self.num_observations, self.names)
        return self._split_rows(num_support, generator, num_query)

    def sample_batch(
        self,
        num_tasks: int,
        num_support: int | range,
        generator: torch.Generator,
        num_query: int | None = None,
    ) -> "Episode":
        """Draws tasks without replacement, at most all T, and splits each as `split_observations` does.

        Raises:
            TypeError: As `split_observations`.
            ValueError: As `split_observations` (every task must be long enough, drawn or not), or `num_tasks`
                is below 1.
        """
        if num_tasks < 1:
            raise ValueError(f"num_tasks is {num_tasks}; draw at least 1 task")
        if generator is None:
            raise TypeError("sample_batch draws at random; give a torch.Generator().manual_seed(...)")
        _columns.check_episode(num_support, generator, num_query, self.num_observations, self.names)
        order = torch.randperm(len(self), generator=generator, device=generator.device)[:num_tasks]
        return self._take_tasks(order.tolist())._split_rows(num_support, generator, num_query)

    def join(self, other: "Tasks") -> "Tasks":
        """Appends the observations of the same tasks in `other` (support joined with query is everything).

        Raises:
            ValueError: The two hold different tasks or different columns.
        """
        if self.names != other.names or set(self.data) != set(other.data):
            raise ValueError(
                f"join needs the same tasks and columns on both sides, got {self!r} and {other!r}; "
                "select the tasks by name first"
            )
        mask = None
        if self.mask is not None or other.mask is not None:
            mask = torch.cat([self._real_rows(), other._real_rows()], 1)
        data = {name: torch.cat([value, other.data[name]], 1) for name, value in self.data.items()}
        return self._with(data=data, mask=mask)

    def with_mask(self) -> "Tasks":
        """Returns the tasks with an explicit mask, all True where nothing is padded."""
        return self._with(mask=self._real_rows())

    def _with(self, **changes: object) -> "Tasks":
        # Skips __post_init__: what is cut out of checked tasks is sound, and episodes are hot.
        tasks = object.__new__(Tasks)
        tasks.__dict__.update({**self.__dict__, **changes})
        return tasks

    def _real_rows(self) -> Tensor:
        first = next(iter(self.data.values()))
        return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device) if self.mask is None else self.mask

    def _real_values(self, name: str) -> Tensor:
        if name in self.constants:
            return self.constants[name]
        return self.data[name][self._real_rows()]

    def _take_tasks(self, positions: list[int]) -> "Tasks":
        index = torch.tensor(positions, device=next(iter(self.data.values())).device)
        return self._with(
            data={name: value[index] for name, value in self.data.items()},
            constants={name: value[index] for name, value in self.constants.items()},
            mask=None if self.mask is None else self.mask[index],
            names=tuple(self.names[i] for i in positions),
        )

    def _split_rows(
        self, num_support: int | range, generator: torch.Generator | None, num_query: int | None
    ) -> "Episode":
        real, sizes = self._real_rows(), _columns.support_sizes(num_support)
        ranks = _rank_rows(real, generator)
        size: Tensor | int = sizes[0]
        if generator is not None and isinstance(num_support, range):
            drawn = torch.randint(len(sizes), (len(self), 1), generator=generator, device=generator.device)
            size = torch.tensor(sizes, device=real.device)[drawn.to(real.device)]
        most = real.shape[1] - min(sizes)
        width = most if num_query is None else min(num_query, most)
        query = real & (ranks >= size) & (ranks < size + width)
        return Episode(self._take_rows(ranks < size, max(sizes)), self._take_rows(query, width))

    def _take_rows(self, chosen: Tensor, width: int) -> "Tasks":
        index = (~chosen).byte().argsort(dim=1, stable=True)[:, :width]
        mask = chosen.gather(1, index)
        padding = None if bool(mask.all()) else mask
        rows = torch.arange(len(self), device=chosen.device)[:, None]
        data = {name: _zero_padding(value[rows, index], padding) for name, value in self.data.items()}
        return self._with(data=data, mask=padding)


class Episode(NamedTuple):
    """The same tasks twice: what a learner adapts on, and what it is judged on."""

    support: Tasks
    query: Tasks


def _rank_rows(real: Tensor, generator: torch.Generator | None) -> Tensor:
    """Ranks the observations `(T, N)` of each task, real ones first: at random, or in order if None."""
    if generator is None:
        keys = torch.arange(real.shape[1], device=real.device, dtype=torch.float32).expand(real.shape)
    else:
        # Drawn where the generator lives, so that one seed gives the same episodes on every device.
        keys = torch.rand(real.shape, generator=generator, device=generator.device, dtype=torch.float32)
        keys = keys.to(real.device)
    return keys.masked_fill(~real, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)


def _zero_padding(value: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return value
    return value.masked_fill(~mask.reshape(*mask.shape, *(1,) * (value.ndim - 2)), 0)


def _is_continuous(values: Tensor) -> bool:
    """Tells whether a column is floating with more than two distinct values."""
    return values.is_floating_point() and bool(((values > values.min()) & (values < values.max())).any())
