"""Pyro effect handlers that turn a model into a pure function of latents, meta-parameters and data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bmaml_ppl.types import Model, Tensors

__all__ = ["Record", "Sites", "ambient", "execute", "is_deterministic", "is_factor", "isolated_store", "learned_params"]


class Record(NamedTuple):
    """What one sample statement did in one run.

    Attributes:
        fn: Its distribution.
        value: Its value.
        is_observed: Whether it was conditioned on data.
        log_prob: Scaled and masked log-probability, of the site's batch shape.
        plates: Enclosing vectorised plates as (dim, name).
        weight: Factor of its log-probability by `poutine.scale` and `poutine.mask`, of the site's batch shape; None
            is 1.
    """

    fn: Any
    value: Tensor
    is_observed: bool
    log_prob: Tensor | None
    plates: tuple[tuple[int, str], ...]
    weight: Tensor | None = None


def is_deterministic(msg: Mapping[str, Any]) -> bool:
    """Tells whether a sample message is a `pyro.deterministic` statement."""
    return bool(msg["infer"].get("_deterministic", False))


def is_factor(fn: Any) -> bool:
    """Tells whether a distribution is that of a `pyro.factor` statement."""
    return isinstance(getattr(fn, "base_dist", fn), dist.Unit)


_FILLS = {Tensor.uniform_, Tensor.normal_} | {
    getattr(nn.init, name)
    for name in dir(nn.init)
    if name.startswith(("uniform", "normal", "trunc_normal", "xavier", "kaiming")) and name.endswith("_")
}


class _SwapParameters(TorchFunctionMode):
    """Uses functional tensors wherever a registered `nn.Parameter` is an argument.

    Pyro offers no way to answer a network's parameters: answering the messages of `pyro.module`
    leaves the module's own tensors in use and their gradient silently zero. Swapping by identity at
    the level of torch functions serves `pyro.module`, `PyroModule` and nested lists alike, touches
    no module, and is local to the thread. A network made inside the model starts anew on each run, where
    its random initial values are left out: they are swapped too, or refused by `check_registered`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self.filled: dict[int, nn.Parameter] = {}
        self.unswapped: dict[int, nn.Parameter] = {}

    def check_registered(self) -> None:
        """Refuses parameters that were used before they were registered, or made in this run and never registered."""
        for key, parameter in self.unswapped.items():
            if key in self.values or key in self.filled:
                raise ValueError(
                    f"a network in the model uses a parameter of shape {tuple(parameter.shape)} that was not "
                    'registered by then; write network = pyro.module("name", network) before its first use'
                )

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS:
            filled = args[0] if args else (kwargs or {})["tensor"]
            if isinstance(filled, nn.Parameter):
                self.filled[id(filled)] = filled
                with torch.no_grad():
                    return filled.zero_()
        seen: list[nn.Parameter] = []
        result = func(
            *(self._swap(v, seen) for v in args), **{k: self._swap(v, seen) for k, v in (kwargs or {}).items()}
        )
        if seen and isinstance(result, Tensor) and torch.is_grad_enabled():  # neither initialisation nor shapes
            self.unswapped.update({id(parameter): parameter for parameter in seen})
        return result

    def _swap(self, value: Any, seen: list[nn.Parameter]) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self._swap(v, seen) for v in value)
        if not isinstance(value, nn.Parameter):
            return value
        if id(value) in self.values:
            return self.values[id(value)][1]
        seen.append(value)
        return value


_MODULE_SEPARATOR = "$$$"
"""What `pyro.module` writes between the name of a network and that of its parameter."""


class _AnswerParams(Messenger):
    """Answers every param statement from a dict instead of the global parameter store."""

    def __init__(self, params: Tensors, swap: _SwapParameters) -> None:
        super().__init__()
        self.params = params
        self.swap = swap

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        initial = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(initial, nn.Parameter) and not initial.requires_grad:
            msg["value"], msg["done"] = initial, True
            return
        if name not in self.params:
            raise KeyError(
                f"the model asks for pyro.param {name!r}, which it did not have when it was first traced; "
                f"known: {sorted(self.params)}. Declare the same parameters on every run."
            )
        msg["value"] = self.params[name]
        msg["done"] = True
        if isinstance(initial, nn.Parameter):
            self.swap.values[id(initial)] = (initial, self.params[name])
            if _MODULE_SEPARATOR in name:  # pyro.module(update_module_params=True) would write another value back
                msg["value"] = initial


class Sites(Messenger):
    """Assigns latent sites and records what every site did.

    Args:
        assign: `assign(name, fn) -> value` of a site.
        log_prob: Whether log-probabilities are wanted.
        resample: Whether observed sites are assigned too, and what they observe is ignored.
        score: `score(name, fn, value) -> log-probability` of an assigned site; None is `fn.log_prob`.
    """

    def __init__(
        self,
        assign: Callable[[str, Any], Tensor],
        *,
        log_prob: bool,
        resample: bool = False,
        score: Callable[[str, Any, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.assign = assign
        self.with_log_prob = log_prob
        self.resample = resample
        self.score = score
        self.records: dict[str, Record] = {}
        self.deterministic: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        if msg["is_observed"] and (not self.resample or is_deterministic(msg) or is_factor(msg["fn"])):
            return
        msg["value"], msg["done"], msg["is_observed"] = self.assign(msg["name"], msg["fn"]), True, False

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        if is_deterministic(msg):
            self.deterministic[msg["name"]] = msg["value"]
            return
        log_prob = None
        if self.with_log_prob:
            log_prob = scale_and_mask(self._log_prob(msg), msg["scale"], msg["mask"])
        plates = tuple((f.dim, f.name) for f in msg["cond_indep_stack"] if f.dim is not None)
        weight = None
        if msg["mask"] is not None or not (isinstance(msg["scale"], float | int) and msg["scale"] == 1):
            weight = scale_and_mask(torch.ones(msg["fn"].batch_shape), msg["scale"], msg["mask"])
        self.records[msg["name"]] = Record(msg["fn"], msg["value"], msg["is_observed"], log_prob, plates, weight)

    def _log_prob(self, msg: dict[str, Any]) -> Tensor:
        fn, value = msg["fn"], msg["value"]
        if self.score is not None and not msg["is_observed"]:
            return self.score(msg["name"], fn, value)
        if msg["is_observed"] and not value.is_floating_point() and not _counts_categories(fn):
            value = value.to(torch.get_default_dtype())
        log_prob: Tensor = fn.log_prob(value, *msg["args"], **msg["kwargs"])
        return log_prob


def _counts_categories(fn: Any) -> bool:
    """Tells whether values are indices, which must stay integers."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Categorical)


@contextmanager
def isolated_store() -> Iterator[Any]:
    """Gives the block an empty parameter store and puts the user's back afterwards, object for object."""
    store = pyro.get_param_store()
    # store.scope() copies, and strips the `unconstrained` attribute from tensors that the user holds.
    saved = store._params, store._constraints, store._param_to_name
    store._params, store._constraints, store._param_to_name = {}, {}, {}
    try:
        yield store
    finally:
        store._params, store._constraints, store._param_to_name = saved


@contextmanager
def ambient(tensors: Iterable[Tensor | None]) -> Iterator[None]:
    """Gives tensors that the block makes the device and the widest floating dtype of these tensors."""
    given = [tensor for tensor in tensors if tensor is not None]
    before = torch.get_default_dtype()
    dtype = before
    for tensor in given:
        dtype = torch.promote_types(dtype, tensor.dtype) if tensor.is_floating_point() else dtype
    with ExitStack() as stack:
        if given and given[0].device.type != "cpu":
            stack.enter_context(given[0].device)
        if dtype != before:
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(dtype)
        yield


@contextmanager
def _answered(params: Tensors, networks: bool) -> Iterator[None]:
    """Answers param statements and swaps registered networks in the block; the parameter store is empty in it."""
    swap = _SwapParameters()
    with ExitStack() as stack:
        stack.enter_context(pyro.settings.context(module_local_params=False))
        stack.enter_context(isolated_store())
        if networks:
            stack.enter_context(swap)
        stack.enter_context(_AnswerParams(params, swap))
        yield
    swap.check_registered()


@contextmanager
def learned_params(params: Tensors, *, networks: bool) -> Iterator[None]:
    """Answers param statements and uses of registered networks in the block; sample statements go on to outer handlers.

    Args:
        params: Constrained value of every param statement, by name.
        networks: Whether some params are `nn.Parameter` of a registered network.
    """
    with ambient(params.values()), pyro.poutine.block(hide_types=["param"]), _answered(params, networks):
        yield


@contextmanager
def _own_plate_dims() -> Iterator[None]:
    """Lets plates in the block choose their dimensions as if there were none around it."""
    saved, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = saved


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
    with (
        ambient([*data.values(), *params.values()]),
        pyro.validation_enabled(False),
        _own_plate_dims(),
        pyro.poutine.block(),
        sites,
        _answered(params, networks),
    ):
        model(**data)
    return sites
