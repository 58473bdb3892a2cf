"""Which of the ways to run an adaptation a learned prior's next call takes: eager, recorded or compiled."""

from dataclasses import replace
from typing import Any

from bmaml_ppl.adaptation import Adapter, TaskData
from bmaml_ppl.compile import Mode

__all__ = ["Adapters"]

_MANY_PARTS = 4
_MOST_RECORDED = 8
_MOST_SEEN = 1000


class Adapters:
    """Records adaptation from the second call with the same layout of data on, so that one call alone pays nothing.

    Only so many layouts are recorded, and none of them is given up for a later one: a recording takes about a second,
    and calls that go through many layouts in turn would else record at each.
    """

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.recorded: dict[Any, Adapter] = {}
        self.compiled: dict[Any, Adapter] = {}

    def choose(self, adapter: Adapter, parts: list[TaskData], mode: Mode | None) -> list[Adapter]:
        """The adapter for each part of one call: of this mode, or recorded where the layout came in a call before."""
        keys = [self._key(adapter, part) for part in parts]
        if mode == "eager":
            return [adapter] * len(parts)
        if mode == "compiled":
            return [self._compile(adapter, key) for key in keys]
        if adapter.inference.num_draws or len(keys) >= _MANY_PARTS:  # what runs so often is worth a recording at once
            self.seen.update(keys)
        for key in set(keys) & self.seen - self.recorded.keys():
            if len(self.recorded) < _MOST_RECORDED:
                self.recorded[key] = replace(adapter, mode="recorded")
        if len(self.recorded) < _MOST_RECORDED and len(self.seen) < _MOST_SEEN:
            self.seen.update(keys)
        return [self.recorded.get(key, adapter) for key in keys]

    def _compile(self, adapter: Adapter, key: Any) -> Adapter:
        """The compiled adapter of a layout, of which the latest few are kept."""
        found = self.compiled.pop(key, None) or replace(adapter, mode="compiled")
        self.compiled[key] = found
        if len(self.compiled) > _MOST_RECORDED:
            self.compiled.pop(next(iter(self.compiled)))
        return found

    def _key(self, adapter: Adapter, part: TaskData) -> Any:
        tensors = part.data if part.mask is None else {**part.data, "": part.mask}
        layout = tuple(sorted((k, v.shape, str(v.dtype), str(v.device)) for k, v in tensors.items()))
        return adapter.inference.name, repr(sorted(adapter.inference.config.items())), adapter.start, layout
