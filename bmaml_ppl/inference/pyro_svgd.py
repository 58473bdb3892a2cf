"""A bridge to Pyro's own SVGD: one task, from given particles, leaving Pyro's global state as it was."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from pyro.infer import SVGD
from pyro.infer.svgd import IMQSteinKernel, RBFSteinKernel
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_map

from bmaml_ppl.adaptation import as_task_data, one_task
from bmaml_ppl.handlers import isolated_store
from bmaml_ppl.inference.svgd import svgd
from bmaml_ppl.types import SiteLayout, Tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bmaml_ppl.learned import LearnedPrior
    from bmaml_ppl.posterior import Posterior

__all__ = ["pyro_svgd"]

_KERNELS = {"RBF": RBFSteinKernel, "IMQ": IMQSteinKernel}
_MODES = ("univariate", "multivariate")


def pyro_svgd(
    prior: "LearnedPrior",
    /,
    *,
    num_steps: int,
    step_size: float,
    particles: Tensor | None = None,
    kernel: Literal["RBF", "IMQ"] = "RBF",
    mode: Literal["univariate", "multivariate"] = "univariate",
    **data: Any,
) -> "Posterior":
    """Adapts to one task with `pyro.infer.SVGD` and plain gradient steps.

    For comparison: no gradient passes through it, it serves one task at a time, and the model must broadcast
    over a dimension of particles in front of its plates, as Pyro asks. It equals
    `svgd(preconditioner="none", structure="coordinate", repulsion=1.0)` where the model has a single latent
    site and the mode is "univariate". It is wrong elsewhere: with several latent sites it mixes particles, since
    it cuts a vector that is ordered by site as if it were ordered by particle; and in the mode "multivariate" it
    adds up one bandwidth a coordinate, so that the kernel narrows as D grows and the spread collapses.

    Args:
        prior: A learned prior; its parameters stay fixed.
        num_steps: Steps.
        step_size: Rate of the plain gradient steps.
        particles: Start, (M, D), M > 1, in unconstrained coordinates; None starts where `prior.adapt` does.
        kernel: "RBF", or "IMQ", which in Pyro is (1/2 + t)^(-1/2).
        mode: "univariate", a kernel per coordinate, or "multivariate".
        **data: One task's observations as keyword tensors, (N, ...).

    Returns:
        The posterior of this one task.

    Raises:
        ValueError: If an option is unknown, data holds several tasks, the particles are fewer than two or of the
            wrong shape or became non-finite, or the model registers a network.

    Reference:
        Liu and Wang (2016), Stein Variational Gradient Descent, as in Pyro's `pyro/infer/svgd.py`.
    """
    density, num_particles = prior.density, prior.inference.num_particles if particles is None else len(particles)
    _check(kernel, mode, num_particles)
    if density.networks:
        raise ValueError(f"the model registers a network ({min(density.networks)}, ...); use svgd, which can adapt it")
    begun = prior.adapt(num_steps=0, inference=svgd(num_particles=prior.inference.num_particles), **data)
    if not begun.single:
        raise ValueError(f"got a batch of {len(begun)} tasks, but Pyro's SVGD serves one; give (N, ...) tensors")
    start = begun.particles if particles is None else particles.to(begun.particles)
    if start.shape != (num_particles, density.dim):
        raise ValueError(f"particles have shape {tuple(start.shape)}, the model's are (M, {density.dim})")
    structure: Literal["coordinate", "joint"] = "coordinate" if mode == "univariate" else "joint"
    settings: dict[str, Any] = {"step_size": step_size, "preconditioner": "none", "structure": structure}
    inference = svgd(num_particles=num_particles, num_steps=num_steps, sites=density.sites, **settings)
    task = one_task(as_task_data(replace(begun.tasks, scaling=begun.scaling)))
    model = pyro.poutine.block(_FixedParams(prior.params)(density.model), hide_types=["param"])
    end = _run(model, task.data, start, density.sites, num_steps, step_size, kernel, mode)
    if not torch.isfinite(end).all():
        raise ValueError(f"particles became non-finite; take a shorter step than step_size={step_size}")
    state = tree_map(lambda value: value.unsqueeze(0), inference.init({"particles": end}))
    return replace(begun, inference=inference, state=state)


def _run(
    model: Callable[..., Any],
    data: Tensors,
    start: Tensor,
    sites: "Mapping[str, SiteLayout]",
    num_steps: int,
    step_size: float,
    kernel: str,
    mode: str,
) -> Tensor:
    """Steps Pyro's SVGD in a parameter store and a random stream of its own: (M, D) -> (M, D)."""
    slices = [slice(site.start, site.stop) for site in sites.values()]
    num = len(start)
    devices = [start.device] if start.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), isolated_store(), torch.enable_grad(), _quietly():
        optimizer = PyroOptim(torch.optim.SGD, {"lr": step_size})
        engine = SVGD(model, _KERNELS[kernel](), optimizer, num, _plate_nesting(model, data), mode=mode)
        # Pyro orders its one vector by site: all particles of the first, then all of the second.
        pyro.param("svgd_particles", torch.cat([start[:, s].reshape(-1) for s in slices]).detach().clone())
        for _ in range(num_steps):
            engine.step(**data)
        flat = pyro.param("svgd_particles").detach().clone()
    parts = flat.split([num * (s.stop - s.start) for s in slices])
    return torch.cat([part.reshape(num, -1) for part in parts], 1)


@contextmanager
def _quietly() -> Iterator[None]:
    """Leaves it to the caller to speak up about particles that are no numbers."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered (NaN|\\+?-?inf)")
        yield


class _FixedParams(Messenger):
    """Answers every param statement with its learned value, which Pyro's SVGD would otherwise go on learning."""

    def __init__(self, params: Tensors) -> None:
        super().__init__()
        self.params = params

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        msg["value"] = self.params[msg["name"]]
        msg["done"] = True


def _plate_nesting(model: Callable[..., Any], data: Tensors) -> int:
    trace = pyro.poutine.trace(model).get_trace(**data)
    frames = [f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())]
    return max((-f.dim for f in frames if f.dim is not None), default=0)


def _check(kernel: str, mode: str, num_particles: int) -> None:
    for name, got, allowed in (("kernel", kernel, list(_KERNELS)), ("mode", mode, list(_MODES))):
        if got not in allowed:
            raise ValueError(f"{name}={got!r} is not known; choose one of {allowed}")
    if num_particles < 2:
        raise ValueError(f"Pyro's SVGD needs at least 2 particles, got {num_particles}; for one use map_estimate")
