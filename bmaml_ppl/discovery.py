"""The first run of a model: which sites, observations and meta-parameters it has, and what it may not have."""

import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.func import grad, vmap

from bmaml_ppl.handlers import is_deterministic, isolated_store
from bmaml_ppl.types import Model

__all__ = ["Discovery", "Site", "check_vectorised", "discover"]


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
    """

    name: str
    shape: torch.Size
    support: constraints.Constraint
    unconstrained_shape: torch.Size
    start: int
    stop: int
    init: Callable[[], Tensor] | None = None

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


class _Inspect(Messenger):
    """Collects every sample and param message of one run and refuses what cannot be a task model."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: dict[str, dict[str, Any]] = {}
        self.networks: dict[str, nn.Parameter] = {}

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if len(msg["args"]) > 1 and isinstance(msg["args"][1], nn.Parameter):
            self.networks[msg["name"]] = msg["args"][1]

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample):
            _refuse_subsample(name, fn)
            return
        if name in self.messages:
            raise ValueError(
                f"site {name!r} is used twice; give each pyro.sample its own name, or write one vectorised "
                f"site, for example pyro.sample({name!r}, dist.Normal(loc, scale).expand([n]).to_event(1))"
            )
        if not msg["is_observed"] and not fn.has_rsample and fn.support.is_discrete:
            raise ValueError(
                f"latent site {name!r} is discrete ({type(fn).__name__}); sum it out by hand (for example with "
                "torch.logsumexp over its values, or dist.MixtureSameFamily), or give a continuous "
                "relaxation. Enumeration of discrete latents is not offered yet."
            )
        self.messages[name] = dict(msg)


def _refuse_subsample(name: str, fn: Any) -> None:
    if fn.subsample_size is not None and fn.subsample_size < fn.size:
        raise ValueError(
            f"plate {name!r} subsamples {fn.subsample_size} of {fn.size} rows; write "
            f"pyro.plate({name!r}, x.shape[0]) and let Tasks.sample_batch choose the observations"
        )


def discover(model: Model, data: Mapping[str, Tensor | None]) -> Discovery:
    """Runs a model once on example data in an empty parameter store, the user's generators untouched.

    Args:
        model: The user's model.
        data: One task's keyword arguments.

    Raises:
        ValueError: For a model that cannot be a task model; names the site and what to write instead.
    """
    inspect = _Inspect()
    with torch.random.fork_rng(), isolated_store(), pyro.poutine.block():
        with inspect, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was not registered in the param store.*")
            _call(model, data)
        state = pyro.get_param_store().get_state()
        params = {name: pyro.param(name).detach().clone() for name in state["params"]}
    _refuse_running_statistics(model, inspect)
    latent = {k: m for k, m in inspect.messages.items() if not m["is_observed"]}
    observed = {k: m for k, m in inspect.messages.items() if m["is_observed"] and not is_deterministic(m)}
    if not observed:
        raise ValueError(
            f"the model observes nothing; its sites are {sorted(inspect.messages)}. Condition one on data, for example "
            'pyro.sample("obs", dist.Normal(mean, noise), obs=y), and pass y in the data'
        )
    if not latent:
        raise ValueError(
            f"the model has no latent site; its observed sites are {sorted(observed)}. Give the task parameters of "
            'its own, for example pyro.sample("coef", dist.Normal(mean, scale))'
        )
    return Discovery(
        sites=_layout(latent),
        observed={name: _source(m["value"], data) for name, m in observed.items()},
        params=params,
        constraints={k: state["constraints"][k] for k in params},
        networks=frozenset(inspect.networks),
        plate_dims={name: _plate_dim(m, data) for name, m in observed.items()},
    )


def _call(model: Model, data: Mapping[str, Tensor | None]) -> None:
    try:
        model(**data)
    except TypeError as error:
        if "argument" in str(error):
            raise TypeError(
                f"the model was called with the keyword arguments {sorted(data)} and refused them: {error}. "
                "Name the model's arguments as the data's keys"
            ) from error
        raise
    except KeyError as error:
        raise ValueError(
            f"pyro.param {error} has no initial value; write pyro.param(name, initial_tensor), since "
            "the global parameter store is not read"
        ) from error


def _refuse_running_statistics(model: Model, inspect: _Inspect) -> None:
    """Looks for batch normalisation among the modules that own the registered parameters."""
    registered = {id(p): name for name, p in inspect.networks.items()}
    roots = [model] if isinstance(model, nn.Module) else []
    for layer in [m for root in roots for m in root.modules()] + _owners(inspect):
        running = getattr(layer, "track_running_stats", False) and getattr(layer, "training", False)
        if isinstance(layer, nn.modules.batchnorm._NormBase) and running:
            name = next((registered[id(p)] for p in layer.parameters() if id(p) in registered), "")
            raise ValueError(
                f"{type(layer).__name__} ({name or 'in the model'}) keeps running statistics, which tasks in "
                "one batch would share; write track_running_stats=False, or use nn.GroupNorm or nn.LayerNorm"
            )


def _owners(inspect: _Inspect) -> list[nn.Module]:
    """Modules that own a registered parameter, found through the garbage collector's references."""
    wanted = {id(p) for p in inspect.networks.values()}
    if not wanted:
        return []
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.modules.batchnorm._NormBase)]
    return [m for m in modules if any(id(p) in wanted for p in m._parameters.values())]


def _layout(latent: Mapping[str, Mapping[str, Any]]) -> dict[str, Site]:
    sites, start = {}, 0
    for name, msg in latent.items():
        support = msg["fn"].support
        value: Tensor = msg["value"]
        try:
            unconstrained_shape = biject_to(support).inv(value).shape
        except NotImplementedError as error:
            raise ValueError(
                f"latent site {name!r} ({type(msg['fn']).__name__}) lives on {support}, which has no "
                "bijection to unconstrained space; choose a distribution on a supported support"
            ) from error
        stop = start + prod(unconstrained_shape)
        sites[name] = Site(name, value.shape, support, unconstrained_shape, start, stop, msg["infer"].get("init"))
        start = stop
    return sites


def _source(value: Tensor, data: Mapping[str, Tensor | None]) -> str | None:
    """The data key an observed value came from: the same tensor, or one equal to it."""
    tensors = {key: tensor for key, tensor in data.items() if tensor is not None}
    for key, tensor in tensors.items():
        if value is tensor:
            return key
    for key, tensor in tensors.items():
        if value.numel() == tensor.numel() and torch.equal(value.reshape(-1).to(tensor), tensor.reshape(-1)):
            return key
    return None


def _plate_dim(msg: Mapping[str, Any], data: Mapping[str, Tensor | None]) -> int | None:
    """The batch dimension (from the right) that runs over observations; None for one value a task."""
    lengths = {tensor.shape[0] for tensor in data.values() if tensor is not None and tensor.ndim}
    frames = [f.dim for f in msg["cond_indep_stack"] if f.dim is not None and f.size in lengths]
    if frames:
        return max(frames)
    batch_shape = msg["fn"].batch_shape
    if batch_shape and batch_shape[0] in lengths:
        return -len(batch_shape)
    return None


def check_vectorised(log_joint: Callable[..., Tensor], found: Discovery, data: Mapping[str, Tensor | None]) -> None:
    """Differentiates the density under vmap, one latent site at a time, so that a fault has a name.

    Raises:
        ValueError: If the model branches in Python on a latent value or on the data.
    """
    dim = sum(site.stop - site.start for site in found.sites.values())
    like = next(value for value in data.values() if value is not None and value.is_floating_point())
    point = like.new_full((2, dim), 0.1)
    try:
        vmap(lambda z: grad(log_joint)(z, found.params, data))(point)
    except RuntimeError as error:
        for name, site in found.sites.items():
            if _fails_alone(log_joint, found, data, point, site):
                raise ValueError(
                    f"the model cannot be vectorised over site {name!r}: it branches in Python on its value, "
                    "or calls .item() or float() on it. Write torch.where(condition, a, b) instead. "
                    f"(torch: {str(error).splitlines()[0]})"
                ) from error
        raise


def _fails_alone(
    log_joint: Callable[..., Tensor], found: Discovery, data: Mapping[str, Any], point: Tensor, site: Site
) -> bool:
    def along(part: Tensor) -> Tensor:
        z = torch.cat([point[0, : site.start], part, point[0, site.stop :]])
        return log_joint(z, found.params, data)

    try:
        vmap(along)(point[:, site.slice])
    except RuntimeError:
        return True
    return False
