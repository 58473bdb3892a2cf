"""Pyro effect handlers that turn a model into a pure function of latents, meta-parameters and data."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bmaml_ppl.types import Model, Tensors

__all__ = ["Record", "Sites", "execute", "is_deterministic", "isolated_store"]


class Record(NamedTuple):
    """What one sample statement did in one run.

    Attributes:
        fn: Its distribution.
        value: Its value.
        is_observed: Whether it was conditioned on data.
        log_prob: Scaled and masked log-probability, of the site's batch shape.
        plates: Enclosing vectorised plates as (dim, size).
    """

    fn: Any
    value: Tensor
    is_observed: bool
    log_prob: Tensor | None
    plates: tuple[tuple[int, int], ...]


def is_deterministic(msg: Mapping[str, Any]) -> bool:
    """Tells whether a sample message is a `pyro.deterministic` statement."""
    return bool(msg["infer"].get("_deterministic", False))


class _SwapParameters(TorchFunctionMode):
    """Uses functional tensors wherever a registered `nn.Parameter` is an argument.

    Pyro offers no way to answer a network's parameters: answering the messages of `pyro.module`
    leaves the module's own tensors in use and their gradient silently zero. Swapping by identity at
    the level of torch functions serves `pyro.module`, `PyroModule` and nested lists alike, touches
    no module, and is local to the thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(self._swap, args), **{k: self._swap(v) for k, v in (kwargs or {}).items()})

    def _swap(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._swap, value))
        return self.values[id(value)][1] if id(value) in self.values else value


class _AnswerParams(Messenger):
    """Answers every param statement from a dict instead of the global parameter store."""

    def __init__(self, params: Tensors, swap: _SwapParameters) -> None:
        super().__init__()
        self.params = params
        self.swap = swap

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name not in self.params:
            raise KeyError(
                f"the model asks for pyro.param {name!r}, which it did not have when it was first traced; "
                f"known: {sorted(self.params)}. Declare the same parameters on every run."
            )
        initial = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(initial, nn.Parameter):
            self.swap.values[id(initial)] = (initial, self.params[name])
        msg["value"] = self.params[name]
        msg["done"] = True


class Sites(Messenger):
    """Assigns latent sites and records what every site did.

    Args:
        assign: `assign(name, fn) -> value or None`; None lets the site draw from its distribution.
        log_prob: Whether log-probabilities are wanted.
    """

    def __init__(self, assign: Callable[[str, Any], Tensor | None], log_prob: bool = True) -> None:
        super().__init__()
        self.assign = assign
        self.with_log_prob = log_prob
        self.records: dict[str, Record] = {}
        self.deterministic: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample) or msg["is_observed"]:
            return
        value = self.assign(msg["name"], msg["fn"])
        if value is not None:
            msg["value"] = value
            msg["done"] = True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        if is_deterministic(msg):
            self.deterministic[msg["name"]] = msg["value"]
            return
        log_prob = None
        if self.with_log_prob:
            log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
            log_prob = scale_and_mask(log_prob, msg["scale"], msg["mask"])
        plates = tuple((f.dim, f.size) for f in msg["cond_indep_stack"] if f.dim is not None)
        self.records[msg["name"]] = Record(msg["fn"], msg["value"], msg["is_observed"], log_prob, plates)


@contextmanager
def isolated_store() -> Iterator[Any]:
    """Gives the block an empty parameter store and puts the user's back afterwards."""
    with pyro.get_param_store().scope() as state:
        yield state


def execute(model: Model, params: Tensors, data: Mapping[str, Tensor | None], sites: Sites, *, networks: bool) -> Sites:
    """Runs a model once as a pure function: params from a dict, latents assigned, nothing global touched.

    Args:
        model: The user's Pyro model.
        params: Constrained value of every param statement, by name.
        data: Keyword arguments of the model.
        sites: Handler that assigns latents and holds the records afterwards.
        networks: Whether some params are `nn.Parameter` of a registered network.

    Returns:
        The handler.
    """
    swap = _SwapParameters()
    device = next((v.device for v in [*data.values(), *params.values()] if v is not None), None)
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(isolated_store())
        stack.enter_context(pyro.poutine.block())
        if device is not None and device.type != "cpu":
            stack.enter_context(torch.device(device))
        if networks:
            stack.enter_context(swap)
        stack.enter_context(sites)
        stack.enter_context(_AnswerParams(params, swap))
        model(**data)
    return sites
