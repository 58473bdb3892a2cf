"""Laplace's method as a Pyro guide for any model: found anew at each call, repaired, and differentiable."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_leaves, tree_map

from bmaml_ppl.adaptation import Adapter, TaskData
from bmaml_ppl.checks import check_count
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.diagnostics.curvature import check_measured, describe_curvature
from bmaml_ppl.discovery import feasible_point
from bmaml_ppl.generators import seeded
from bmaml_ppl.guide import posterior_guide, sample_sites
from bmaml_ppl.handlers import ambient
from bmaml_ppl.inference.curvature import Curvature, Form
from bmaml_ppl.inference.laplace import laplace
from bmaml_ppl.inference.particles import Preconditioner
from bmaml_ppl.precision_normal import PrecisionNormal, gaussian_mixture
from bmaml_ppl.task_density import TaskDensity
from bmaml_ppl.types import Model, Tensors

__all__ = ["LaplaceGuide"]

_STARTS = 15
_NO_DATA = "no_data"


class LaplaceGuide:
    r"""A guide N(mode, H^{-1}) in unconstrained coordinates, H the curvature of the model's log joint at its mode.

    Each call finds the mode at the arguments it is given, under the current values of the model's `pyro.param`s and
    networks, so that one guide serves any number of data sets. It has no parameters of its own. Its draws and its
    density are differentiable in those of the model, through the mode by the implicit function theorem, so that
    `SVI(model, LaplaceGuide(model), optim, Trace_ELBO())` is empirical Bayes: it learns the model's parameters.

    Calls with the outputs left out (`y=None`) have nothing to adapt to: to predict, hold the posterior of observed data
    with `laplace_approximation(x, y)` and give that guide to `Predictive`.

    Args:
        model: Any Pyro model with continuous latents whose number does not change; its arguments may be of any kind.
        curvature: What stands for H; see `bmaml_ppl.inference.laplace.laplace`.
        form: How H is kept; see there.
        num_steps: Most steps to the mode; fewer are taken where it is reached.
        preconditioner: Kind of step; see there.
        start: Values of all latent sites at which the search starts; None is the median of draws from the prior.

    Raises:
        ValueError: When called, if the log joint is flat along a site, or the model cannot be differentiated or
            vectorised over its latents; the message names the site.

    Warns:
        RepairedCurvature: When called, if H was not positive definite.
        NotConverged: When called, if the mode was not reached.

    References:
        Tierney and Kadane (1986), Accurate Approximations for Posterior Moments and Marginal Densities; Pyro's
        `AutoLaplaceApproximation`, which this equals where that works.
    """

    def __init__(
        self,
        model: Model,
        *,
        curvature: Curvature = "auto",
        form: Form = "auto",
        num_steps: int = 50,
        preconditioner: Preconditioner = "auto",
        start: Tensors | None = None,
    ) -> None:
        check_count("num_steps", num_steps, least=1)
        self.model = model
        self.start = start
        self._settings: dict[str, Any] = {
            "curvature": curvature,
            "form": form,
            "num_steps": num_steps,
            "preconditioner": preconditioner,
        }
        laplace(**self._settings)
        self._densities: dict[Any, Density] = {}
        self._last: tuple[_Found, tuple[Tensor, Tensor]] | None = None

    def __repr__(self) -> str:
        name = _name_of(self.model)
        return f"LaplaceGuide({name}, {', '.join(f'{key}={value!r}' for key, value in self._settings.items())})"

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every latent site given the model's arguments; the sample statements of a guide."""
        found = self._find(args, kwargs)
        return sample_sites(found.density, found.params, gaussian_mixture(found.state), found.data)

    def get_posterior(self, *args: Any, **kwargs: Any) -> PrecisionNormal:
        """The Gaussian over the unconstrained latents z, (D,), given the model's arguments."""
        posterior: PrecisionNormal = gaussian_mixture(self._find(args, kwargs).state)
        return posterior

    def laplace_approximation(self, *args: Any, **kwargs: Any) -> Callable[..., dict[str, Tensor]]:
        """A guide that holds the posterior given these arguments and ignores those it is called with."""
        with torch.no_grad():
            found = self._find(args, kwargs)
        params = {name: value.detach() for name, value in found.params.items()}
        return posterior_guide(found.density, params, gaussian_mixture(found.state), found.data)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Median of every latent site given the model's arguments."""
        found = self._find(args, kwargs)
        return found.density.constrain(found.state.particles[0], found.params, found.data)

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of every latent site, each coordinate by itself, given the model's arguments.

        Args:
            quantiles: Q numbers between 0 and 1.
            *args: Of the model.
            **kwargs: Of the model.

        Returns:
            Latent site -> (Q, ...).
        """
        found = self._find(args, kwargs)
        posterior = gaussian_mixture(found.state)
        levels = torch.as_tensor(quantiles, dtype=posterior.loc.dtype, device=posterior.loc.device)
        z = dist.Normal(posterior.loc, posterior.stddev).icdf(levels.unsqueeze(-1))
        values = vmap(lambda row: found.density.constrain(row, found.params, found.data))(z)
        return dict(values)

    def diagnostics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the approximation given the model's arguments reports of itself; it neither warns nor refuses.

        Returns:
            `repair`, `repaired`, `decrement`, `converged`, `flat_site` and `log_evidence`, see
            `bmaml_ppl.diagnostics.curvature.describe_curvature`.
        """
        with torch.no_grad():
            found = self._find(args, kwargs, check=False)
        described = describe_curvature(_batch(found.state), found.density.sites)
        return {name: value[0] for name, value in described.items()}

    def _find(self, args: Any, kwargs: Any, *, check: bool = True) -> "_Found":
        density, params, data = self._read(args, kwargs)
        mode = self._recall(density, params, data)
        if isinstance(mode, _Found):
            return mode
        adapter = Adapter(density, laplace(**self._settings, sites=density.sites), "free")
        tasks = TaskData(_batch(data), None)
        is_new = mode is None
        if mode is None:
            mode = _climb(adapter, params, tasks, self._begin(density, params, data))
        state = adapter.adapt({**params, "particles": mode}, tasks, num_steps=0)
        found = _Found(density, params, data, tree_map(lambda value: value[0], state))
        if check and is_new:
            _check(found, _name_of(self.model))
            last = found.detached()
            with torch.no_grad():
                self._last = last, last.signature()
        return found

    def _recall(self, density: Density, params: dict[str, Tensor], data: dict[str, Tensor]) -> Any:
        """What was found last if the log joint is still the same: its mode, or all if no gradient is wanted; or None.

        It is told by its value and score at that mode, since a model may read more than arguments and parameters.
        """
        if self._last is None or self._last[0].density.sites is not density.sites:
            return None
        last, before = self._last
        now = replace(last, density=density, params=params, data=data)
        value, score = now.signature()
        if not (torch.equal(value, before[0]) and torch.equal(score, before[1])):
            return None
        return last.state.particles if value.requires_grad else now

    def _read(self, args: Any, kwargs: Any) -> tuple[Density, dict[str, Tensor], dict[str, Tensor]]:
        """The log joint at these arguments, the model's parameters as they are, and the stand-in for data."""
        trace = _run(self.model, args, kwargs)
        sites = {name: node for name, node in trace.nodes.items() if node["type"] in ("sample", "param")}
        tensors = [v for v in [*tree_leaves((args, kwargs)), *(s["value"] for s in sites.values())] if _is_tensor(v)]
        tensors.sort(key=lambda tensor: tensor.device.type == "cpu")  # the first one's device is that of latents
        bound = _Bound(self.model, args, kwargs, tensors)
        # All that is known is closed over: without an entry, there would be nothing to tell a batch's size by.
        data = {_NO_DATA: torch.zeros(0, dtype=torch.long, device=tensors[0].device if tensors else None)}
        params = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
        key = tuple(_layout(name, site) for name, site in sites.items())
        if key not in self._densities:
            self._densities[key] = from_model(replace(bound, defaults=params), data)
        density = replace(self._densities[key], model=bound)
        return density, {name: params[name] for name in density.prior}, data

    @torch.no_grad()
    def _begin(self, density: Density, params: Tensors, data: Tensors) -> Tensor:
        """Where the search starts, (1, D)."""
        like = density.model.like  # type: ignore[attr-defined]
        if self.start is not None:
            return density.unconstrain(self.start, params, data).to(like).unsqueeze(0)
        with seeded(0, like.device):
            draws = replace(density, prior=dict(params)).initial_particles(_STARTS, data)
        return draws.to(like).median(0, keepdim=True).values


@dataclass(frozen=True, eq=False)
class _Found:
    """A Laplace approximation at one set of arguments.

    Attributes:
        density: The log joint at these arguments.
        params: The model's parameters, constrained.
        data: Stand-in for the data that the log joint has closed over.
        state: State of the inference.
    """

    density: Density
    params: dict[str, Tensor]
    data: dict[str, Tensor]
    state: Any

    def signature(self) -> tuple[Tensor, Tensor]:
        """Log joint and score at the mode."""
        mode = self.state.particles[0].detach()
        score, value = grad_and_value(TaskDensity(self.density, self.params, self.data))(mode)
        return value, score

    def detached(self) -> "_Found":
        """The same as constants."""
        params = {name: value.detach() for name, value in self.params.items()}
        return replace(self, params=params, state=tree_map(torch.detach, self.state))


@dataclass(frozen=True, eq=False)
class _Bound:
    """A model with its arguments, whatever they are; a model of no arguments.

    Attributes:
        model: The user's model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        tensors: What sets the device and floating dtype of tensors that it makes.
        defaults: First values of params that it gives none for.
    """

    model: Model
    args: Any
    kwargs: Any
    tensors: Sequence[Tensor]
    defaults: Tensors | None = None

    def __call__(self, **no_data: Tensor) -> Any:
        with ambient(self.tensors), _Defaults(self.defaults or {}):
            return self.model(*self.args, **self.kwargs)

    @property
    def like(self) -> Tensor:
        """A scalar of the device and dtype of latents."""
        with ambient(self.tensors):
            return torch.zeros(())


class _Defaults(Messenger):
    """Gives `pyro.param(name)` a first value."""

    def __init__(self, values: Tensors) -> None:
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        if len(msg["args"]) < 2 and msg["name"] in self.values:
            msg["args"] = (msg["name"], self.values[msg["name"]].detach())


class _Draw(Messenger):
    """Draws latent sites, also those whose distribution has no draws."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or msg["value"] is not None:
            return
        try:
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
        except NotImplementedError:
            msg["value"] = feasible_point(msg["fn"])
        msg["done"] = True


def _run(model: Model, args: Any, kwargs: Any) -> Any:
    """A trace of one run, which registers the model's params; the generators are put back."""
    generators = pyro.util.get_rng_state()
    cuda = {leaf.device for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf) and leaf.is_cuda}
    try:
        hidden = pyro.poutine.block(hide_types=["sample", "observe"])
        with torch.random.fork_rng(devices=list(cuda)), pyro.validation_enabled(False), hidden:
            return pyro.poutine.trace(_Draw()(model)).get_trace(*args, **kwargs)
    finally:
        pyro.util.set_rng_state(generators)


def _layout(name: str, site: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a density depends on of one site."""
    if site["type"] == "param":
        return name, "param"
    is_latent = not site["is_observed"] and type(site["fn"]).__name__ != "_Subsample"
    support = type(site["fn"].support) if is_latent else None
    return name, site["is_observed"], getattr(site["value"], "shape", None), support


@torch.no_grad()
def _climb(adapter: Adapter, params: Tensors, tasks: TaskData, start: Tensor) -> Tensor:
    """The mode, (1, D), from a start, (1, D), in at most the inference's steps."""
    state = adapter.begin({**params, "particles": start}, tasks)
    tolerance = 10 * torch.finfo(start.dtype).eps ** 0.75
    for _ in range(adapter.inference.num_steps):
        before = state.particles
        state = adapter.run(state, params, tasks, 1)
        if bool(((state.particles - before).abs() <= tolerance * (1 + before.abs())).all()):
            break
    mode: Tensor = state.particles[0]
    return mode


def _check(found: "_Found", name: str) -> None:
    """Refuses or warns of an approximation that is none."""
    if not bool(found.state.log_evidence.isfinite().all()):
        raise ValueError(
            f"the log joint density of {name!r} or its curvature is not finite where its mode was sought; check the "
            "data and parameters, or give values of all latent sites to start at, LaplaceGuide(model, start={...})"
        )
    check_measured(_batch(found.state), found.density.sites, [name], must_converge=True)


def _batch(tensors: Any) -> Any:
    return tree_map(lambda value: value.unsqueeze(0), tensors)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _name_of(model: Model) -> str:
    return getattr(model, "__name__", type(model).__name__)
