"""The first run of a model: which sites, observations and meta-parameters it has, and what it may not have."""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.func import grad, vmap
from torch.nn.modules.module import register_module_forward_pre_hook

from bmaml_ppl.bijections import bijection
from bmaml_ppl.handlers import ambient, is_deterministic, isolated_store
from bmaml_ppl.sources import derived_keys, plate_dim, refuse_repeated, source_of
from bmaml_ppl.types import Model

__all__ = ["Discovery", "Site", "check_vectorised", "clean_room", "discover", "feasible_point"]


@dataclass(frozen=True)
class Site:
    """One latent site of a task model.

    Attributes:
        name: Its name in the model.
        shape: Shape of its value.
        support: Its support; a support that depends on other values is evaluated anew in each run.
        unconstrained_shape: Shape of its unconstrained coordinates.
        start: First coordinate in z.
        stop: One past its last coordinate in z.
        init: What the model gave as `infer={"init": draw}`: draws a start for free particles.
        shapes: What it gave as `infer={"shapes": [...]}`: shapes of the parameters that a vector of weights is
            made of, in its order.
    """

    name: str
    shape: torch.Size
    support: constraints.Constraint
    unconstrained_shape: torch.Size
    start: int
    stop: int
    init: Callable[[], Tensor] | None = None
    shapes: tuple[tuple[int, ...], ...] | None = None

    @property
    def slice(self) -> slice:
        """The site's coordinates in z."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Discovery:
    """What the first run of a model showed; see `bmaml_ppl.density.Density` for the fields."""

    sites: dict[str, Site]
    observed: dict[str, str | None]
    params: dict[str, Tensor]
    constraints: dict[str, constraints.Constraint]
    networks: frozenset[str]
    plate_dims: dict[str, int | None]
    derived: frozenset[str] = frozenset()


class _Inspect(Messenger):
    """Collects every sample and param message of one run and refuses what cannot be a task model.

    Args:
        refuse_latents: Whether latent sites that cannot be adapted are refused; without outputs, what observes
            them is latent too.
    """

    def __init__(self, *, refuse_latents: bool = True) -> None:
        super().__init__()
        self.refuse_latents = refuse_latents
        self.messages: dict[str, dict[str, Any]] = {}
        self.params: dict[str, Tensor] = {}
        self.constraints: dict[str, constraints.Constraint] = {}
        self.networks: set[str] = set()

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        initial = msg["args"][1] if len(msg["args"]) > 1 else None
        msg["done"], msg["value"] = True, initial
        if isinstance(initial, nn.Parameter):
            if not initial.requires_grad:
                return
            self.networks.add(name)
        if name not in self.params:
            self.constraints[name], self.params[name] = _initial_value(name, initial, msg["kwargs"])
        if name not in self.networks:
            msg["value"] = self.params[name]

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample) or msg["is_observed"]:
            return
        if self.refuse_latents:
            _refuse_latent(msg["name"], msg["fn"])
        try:
            msg["value"] = msg["fn"]()
        except NotImplementedError:
            msg["value"] = feasible_point(msg["fn"])
        msg["done"] = True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample):
            return
        for frame in msg["cond_indep_stack"]:
            if frame.full_size is not None and frame.size != frame.full_size:
                raise ValueError(
                    f"plate {frame.name!r} at site {name!r} subsamples {frame.size} of {frame.full_size} rows; write "
                    f"pyro.plate({frame.name!r}, x.shape[0]) and let Tasks.sample_batch choose the observations"
                )
        if name in self.messages:
            raise ValueError(
                f"site {name!r} is used twice; give each pyro.sample its own name, or write one vectorised "
                f"site, for example pyro.sample({name!r}, dist.Normal(loc, scale).expand([n]).to_event(1))"
            )
        self.messages[name] = dict(msg)


def _initial_value(name: str, initial: Any, settings: Mapping[str, Any]) -> tuple[constraints.Constraint, Tensor]:
    store = pyro.get_param_store()
    constraint = settings.get("constraint", constraints.real)
    if initial is None and name not in store:
        raise ValueError(
            f"pyro.param {name!r} has no initial value; write pyro.param({name!r}, initial_tensor), since the global "
            "parameter store is not read"
        )
    if initial is None:  # a PyroParam puts its own tensor into the store before it asks
        constraint = store._constraints[name]
        value = transform_to(constraint)(store._params[name])
    else:
        value = initial() if callable(initial) else initial
    value = value.detach().clone()
    if not bool(constraint.check(value).all()):
        raise ValueError(
            f"pyro.param {name!r} starts at {value.tolist()}, outside its constraint {constraint}; give an initial "
            "value inside it"
        )
    return constraint, value


def _refuse_latent(name: str, fn: Any) -> None:
    if isinstance(getattr(fn, "base_dist", fn), dist.Delta):
        raise ValueError(
            f"latent site {name!r} is a Delta and has no density; write pyro.deterministic({name!r}, value) instead"
        )
    if fn.support.is_discrete:
        raise ValueError(
            f"latent site {name!r} is discrete ({type(fn).__name__}); sum it out by hand (for example with "
            "torch.logsumexp over its values, or dist.MixtureSameFamily), or give a continuous "
            "relaxation. Enumeration of discrete latents is not offered yet."
        )
    try:
        bijection(fn.support)
    except NotImplementedError as error:
        raise ValueError(
            f"latent site {name!r} ({type(fn).__name__}) lives on {fn.support}, which has no "
            "bijection to unconstrained space; choose a distribution on a supported support"
        ) from error


def feasible_point(fn: Any) -> Tensor:
    """A draw around the middle of a distribution's support, for one that cannot be sampled (ImproperUniform).

    Args:
        fn: A Pyro distribution.

    Returns:
        A value of the distribution's full shape.
    """
    transform = bijection(fn.support)
    value: Tensor = transform(torch.randn(transform.inverse_shape(fn.batch_shape + fn.event_shape)))
    return value


def discover(model: Model, data: Mapping[str, Tensor | None], constants: Collection[str] = ()) -> Discovery:
    """Runs a model once on example data in an empty parameter store, the user's generators untouched.

    Args:
        model: The user's model.
        data: One task's keyword arguments.
        constants: Keys of what is known once per task and has no row per observation.

    Raises:
        ValueError: For a model that cannot be a task model; names the site and what to write instead.
        TypeError: If the model does not take the data's keys as keyword arguments.
    """
    _check_arguments(model, data)
    seen = _Inspect()
    with clean_room(data), seen:
        model(**data)
    _refuse_sites(seen)
    latent = {k: m for k, m in seen.messages.items() if not m["is_observed"]}
    observed = {k: m for k, m in seen.messages.items() if m["is_observed"] and not is_deterministic(m)}
    for name, msg in observed.items():
        refuse_repeated(name, msg)
    sources = {name: source_of(name, m["value"], data) for name, m in observed.items()}
    return Discovery(
        sites=_layout(latent),
        observed=sources,
        params=seen.params,
        constraints=seen.constraints,
        networks=frozenset(seen.networks),
        plate_dims={name: plate_dim(m, sources[name], data, constants) for name, m in observed.items()},
        derived=derived_keys(partial(_messages, model), [k for k, v in sources.items() if v is None], data),
    )


def _check_arguments(model: Model, data: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**data)
    except TypeError as error:
        raise TypeError(
            f"the model takes {signature} and was called with the keyword arguments {sorted(data)}: {error}. "
            "Name the model's arguments as the data's keys"
        ) from error


@contextmanager
def clean_room(data: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Keeps the parameter store and the generators as they were in the block, and refuses running statistics."""
    tensors = [value for value in data.values() if value is not None]
    generators = pyro.util.get_rng_state()
    with ExitStack() as stack:
        stack.callback(pyro.util.set_rng_state, generators)
        stack.enter_context(torch.random.fork_rng(devices=[v.device for v in tensors[:1] if v.is_cuda]))
        stack.enter_context(ambient(tensors))
        stack.enter_context(pyro.settings.context(module_local_params=False))
        stack.enter_context(isolated_store())
        stack.enter_context(pyro.poutine.block())
        stack.callback(register_module_forward_pre_hook(_RunningStatistics()).remove)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*was not registered in the param store.*")
        yield


class _RunningStatistics:
    """Refuses layers that would write running statistics, before they do, wherever in the model they are."""

    def __init__(self) -> None:
        self.callers: list[nn.Module] = []

    def __call__(self, layer: nn.Module, args: Any) -> None:
        self.callers.append(layer)
        if not isinstance(layer, nn.modules.batchnorm._NormBase) or not (layer.training and layer.track_running_stats):
            return
        paths = [(type(root).__name__, path) for root in self.callers for path, m in root.named_modules() if m is layer]
        root, path = paths[0]
        raise ValueError(
            f"{type(layer).__name__} ({f'{path!r} of {root}' if path else 'in the model'}) keeps running statistics, "
            "which tasks in one batch would share; write track_running_stats=False, or use nn.GroupNorm or nn.LayerNorm"
        )


def _refuse_sites(seen: _Inspect) -> None:
    messages = seen.messages
    if shared := sorted(set(messages) & set(seen.params)):
        raise ValueError(f"{shared[0]!r} names both a pyro.param and a site; rename one of them")
    if not any(m["is_observed"] and not is_deterministic(m) for m in messages.values()):
        raise ValueError(
            f"the model observes nothing; its sites are {sorted(messages)}. Condition one on data, for example "
            'pyro.sample("obs", dist.Normal(mean, noise), obs=y), and pass y in the data'
        )
    if all(m["is_observed"] for m in messages.values()):
        raise ValueError(
            f"the model has no latent site; its observed sites are {sorted(messages)}. Give the task parameters of "
            'its own, for example pyro.sample("coef", dist.Normal(mean, scale))'
        )


_HALF_LINE = "choose a distribution on constraints.positive or greater_than, such as dist.Pareto"


def _layout(latent: Mapping[str, Mapping[str, Any]]) -> dict[str, Site]:
    sites, start = {}, 0
    for name, msg in latent.items():
        support, value = msg["fn"].support, msg["value"]
        unconstrained_shape = bijection(support).inverse_shape(value.shape)
        if not bool(torch.isfinite(bijection(support)(value.new_zeros(unconstrained_shape))).all()):
            raise ValueError(f"latent site {name!r} lives on {support}, an interval without an end; {_HALF_LINE}")
        stop = start + prod(unconstrained_shape)
        init, shapes = msg["infer"].get("init"), _parameter_shapes(name, msg["infer"].get("shapes"), stop - start)
        sites[name] = Site(name, value.shape, support, unconstrained_shape, start, stop, init, shapes)
        start = stop
    return sites


def _parameter_shapes(name: str, given: Any, size: int) -> tuple[tuple[int, ...], ...] | None:
    if given is None:
        return None
    try:
        shapes = tuple(tuple(int(length) for length in shape) for shape in given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'site {name!r} has infer={{"shapes": {given!r:.80}}}; give a list of shapes, such as [(40, 1), (40,)]'
        ) from error
    if (total := sum(prod(shape) for shape in shapes)) != size:
        raise ValueError(
            f"the shapes {list(shapes)} of site {name!r} hold {total} numbers, but it has {size} unconstrained "
            "coordinates; list the shape of every parameter in the order of the vector"
        )
    return shapes


def _messages(model: Model, data: Mapping[str, Tensor | None]) -> dict[str, dict[str, Any]]:
    seen = _Inspect(refuse_latents=False)
    with clean_room(data), torch.enable_grad(), seen:
        model(**data)
    return seen.messages


def check_vectorised(log_joint: Callable[..., Tensor], found: Discovery, data: Mapping[str, Tensor | None]) -> None:
    """Runs the density under vmap, over latents (with its gradient) and over data, so that a fault has a name.

    Args:
        log_joint: `log_joint(parts, prior, data)`, where parts maps each latent site to its coordinates.
        found: What the first run showed.
        data: One task's keyword arguments.

    Raises:
        ValueError: If the model branches in Python on a latent value or on the data, writes into a tensor in
            place, or draws random numbers of its own; names the site or the data's key.
    """
    tensors = {key: value for key, value in data.items() if value is not None}
    likes = [v for v in [*tensors.values(), *found.params.values()] if v.is_floating_point()]
    like = likes[0] if likes else torch.ones(())
    points = {site.name: like.new_full((2, site.stop - site.start), 0.1) for site in found.sites.values()}
    pairs = {key: torch.stack([value, value]) for key, value in tensors.items()}

    def along(parts: Mapping[str, Tensor], some: Mapping[str, Tensor]) -> Tensor:
        return log_joint({k: v[0] for k, v in points.items()} | dict(parts), found.params, {**data, **some})

    sites = {f"site {k!r}": (lambda v, k=k: along({k: v}, {}), point) for k, point in points.items()}
    keys = {f"data {k!r}": (lambda v, k=k: along({}, {k: v}), pair) for k, pair in pairs.items()}
    with clean_room(data):
        _vectorise(lambda parts: grad(along)(parts, {}), points, sites)
        _vectorise(lambda rows: along({}, rows), pairs, keys)


_Part = tuple[Callable[[Tensor], Tensor], Tensor]


def _vectorise(function: Callable[[Any], Any], rows: Any, parts: Mapping[str, _Part]) -> None:
    try:
        vmap(function)(rows)
    except (RuntimeError, TypeError):
        for what, (of_part, part_rows) in parts.items():
            try:
                vmap(of_part)(part_rows)
            except (RuntimeError, TypeError) as error:
                raise ValueError(_explain(what, error)) from error
        raise


def _explain(what: str, error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, NotImplementedError):
        return f"the density of {what} is not implemented ({text or 'by Pyro'}); choose another distribution"
    if "randomness" in text:
        return (
            "the model draws random numbers outside pyro.sample (torch.rand, dropout in training mode, or a network "
            "made inside the model and not registered); write pyro.param(name, lambda: torch.randn(n)) for a random "
            "initial value, call .eval() on a network with dropout, and make networks outside the model"
        )
    if "atching rule" in text:
        return f"the model uses an operation on {what} that torch cannot vectorise; write it in others ({text})"
    reason = "it branches in Python on its value, calls .item(), float() or numpy on it, or selects with it"
    advice = "Write torch.where(condition, a, b), and torch functions instead of math and numpy"
    if "inplace" in text or "in-place" in text:
        reason, advice = "it is written into a tensor in place", "Write torch.stack or torch.cat instead"
    return f"the model cannot be vectorised over {what}: {reason}. {advice}. (torch: {text.partition(chr(10))[0]})"
