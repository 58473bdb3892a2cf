"""Log density of a whole hierarchy: hyperparameters with priors of their own, and the latents of all tasks."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.func import grad, jacrev, vmap

from bmaml_ppl.adaptation import TaskData, one_task, over_tasks
from bmaml_ppl.bijections import bijection
from bmaml_ppl.bounded import log_prob_at
from bmaml_ppl.density import Density
from bmaml_ppl.generators import seeded
from bmaml_ppl.types import Tensors

__all__ = ["Hierarchy", "draw_starts", "make_hierarchy", "over_draws"]

_CHUNK = 256
_DENSE_LIMIT = 64
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Hierarchy:
    """Log density of everything unknown as one vector v: hyperparameters, then each task's latents.

    Attributes:
        density: Log density of a task.
        tasks: All tasks as the model sees them.
        hyperpriors: Prior of each meta-parameter, of the parameter's shape.
        normal: Coordinates of z that are sampled non-centred, bool (D,).
        select: Rows of I that pick them, (A, D).
    """

    density: Density
    tasks: TaskData
    hyperpriors: Mapping[str, Any]
    normal: Tensor
    select: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """Log joint density with the log-Jacobians of all changes of variables: (P + T D,) -> scalar."""
        theta, log_prior, u = self.unpack(v)
        z, log_det = self.place(u, theta)
        joint = over_tasks(lambda task, z: self.density.log_joint(z, theta, task.data, task.mask), self.tasks, z)
        return (joint.sum() + log_det.sum() + log_prior).to(v)

    @property
    def noncentered(self) -> list[str]:
        """Latent sites that are sampled non-centred."""
        return _sites_of(self.density, self.normal)

    def unpack(self, v: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Hyperparameters, their log prior density in coordinates, and the tasks' u, (T, D)."""
        theta, at, log_prob = {}, 0, v.new_zeros(())
        for name, fn in self.hyperpriors.items():
            transform = bijection(fn.support)
            shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
            x = v[at : at + shape.numel()].reshape(shape)
            value = transform(x)
            theta[name] = value
            log_prob = log_prob + log_prob_at(fn, value, x).sum() + transform.log_abs_det_jacobian(x, value).sum()
            at += shape.numel()
        return theta, log_prob, v[at:].reshape(-1, self.density.dim)

    def pack(self, coordinates: list[Tensor], z: Tensor, theta: Tensors) -> Tensor:
        """The vector v of hyperparameters' coordinates and latents z, (T, D): the inverse of both steps."""

        def of_task(task: TaskData, z: Tensor) -> Tensor:
            mean, factor = self._moments(theta, task)
            u = factor.T @ (self.select @ z - mean)
            return torch.where(self.normal, self.select.T @ u, z)

        u = over_tasks(of_task, self.tasks, z) if len(self.select) else z
        return torch.cat([*(x.reshape(-1) for x in coordinates), u.reshape(-1)])

    def place(self, u: Tensor, theta: Tensors) -> tuple[Tensor, Tensor]:
        """Latents z, (T, D), and the log-Jacobian of each task, (T,)."""
        if len(self.select) == 0:
            return u, u.new_zeros(len(u))

        def of_task(task: TaskData, u: Tensor) -> tuple[Tensor, Tensor]:
            mean, factor = self._moments(theta, task)
            white = (self.select @ u).unsqueeze(1)
            placed = mean + torch.linalg.solve_triangular(factor.T, white, upper=True).squeeze(1)
            return torch.where(self.normal, self.select.T @ placed, u), -factor.diagonal().log().sum()

        return over_tasks(of_task, self.tasks, u)

    def evaluate(self, draws: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Hyperparameters, (C, S, ...), and latent sites, (C, S, T, ...), of draws (C, S, P + T D)."""

        def of_draw(v: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            theta, _, u = self.unpack(v)
            z = self.place(u, theta)[0]
            return theta, over_tasks(lambda task, z: self.density.constrain(z, theta, task.data), self.tasks, z)

        return over_draws(of_draw, draws)

    def log_likelihood(self, v: Tensor) -> dict[str, Tensor]:
        """Log-likelihood of every observation: observed site -> (T, ...)."""
        theta, _, u = self.unpack(v)
        z = self.place(u, theta)[0]
        return over_tasks(lambda task, z: self.density.log_likelihood(z, theta, task.data, task.mask), self.tasks, z)

    def _moments(self, theta: Tensors, task: TaskData) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the precision of a task's normal latents, (A,) and (A, A)."""

        def score(z: Tensor) -> tuple[Tensor, Tensor]:
            slope = grad(lambda z: self.density.log_prior(z, theta, task.data))(z)
            return slope, slope

        select, zero = self.select, self.select.new_zeros(self.density.dim)
        hessian, slope = jacrev(score, has_aux=True)(zero)
        factor = torch.linalg.cholesky_ex(-select @ hessian @ select.T).L
        return torch.cholesky_solve((select @ slope).unsqueeze(1), factor).squeeze(1), factor


def make_hierarchy(
    density: Density,
    tasks: TaskData,
    hyperpriors: Mapping[str, Any],
    noncentered: Literal["auto"] | bool,
    seed: int,
) -> Hierarchy:
    """Joins a task's density, the tasks and priors of its meta-parameters; see `full_bayes` for arguments."""
    if noncentered not in ("auto", True, False):
        raise ValueError(f'noncentered={noncentered!r} is not known; choose "auto", True or False')
    priors = _match_hyperpriors(density, hyperpriors)
    normal = torch.zeros(density.dim, dtype=torch.bool)
    if noncentered:
        normal = _find_normal(density, priors, tasks, seed)
    if noncentered is True and not normal.all():
        raise ValueError(
            f"noncentered=True needs latents whose prior is normal, and of at most {_DENSE_LIMIT} coordinates; that of "
            f'{_sites_of(density, ~normal)} is not; write noncentered="auto"'
        )
    like = _floating(tasks)
    select = torch.eye(density.dim, dtype=like.dtype)[normal]
    return Hierarchy(density, tasks, priors, normal.to(like.device), select.to(like.device))


def _floating(tasks: TaskData) -> Tensor:
    return next((value for value in tasks.data.values() if value.is_floating_point()), torch.zeros(()))


def over_draws(function: Any, draws: Tensor) -> Any:
    """Maps a function of one draw over (C, S, ...), some at a time."""
    with torch.no_grad():
        return vmap(vmap(function, chunk_size=_CHUNK), chunk_size=1)(draws)


def _match_hyperpriors(density: Density, hyperpriors: Mapping[str, Any]) -> dict[str, Any]:
    """A hyperprior of each meta-parameter's shape, in the model's order."""
    known, given = list(density.prior), list(hyperpriors)
    missing, unknown = [n for n in known if n not in given], [n for n in given if n not in known]
    if missing or unknown:
        raise ValueError(
            f"hyperpriors must name every pyro.param of the model, {known}; missing: {missing}, unknown: {unknown}. "
            'Give a distribution for each, for example {"scale": dist.HalfNormal(1.0)}; parameters of networks too'
        )
    return {name: _fit(name, hyperpriors[name], density) for name in known}


def _fit(name: str, fn: Any, density: Density) -> Any:
    """A hyperprior spread over its parameter's entries."""
    if not isinstance(fn, Distribution):
        raise TypeError(f"hyperpriors[{name!r}] is {fn!r:.80}; give a distribution, for example dist.Normal(0.0, 1.0)")
    shape, constraint = density.prior[name].shape, density.constraints.get(name, constraints.real)
    free = len(shape) - len(fn.event_shape)
    spread = all(have in (1, want) for have, want in zip(fn.batch_shape[::-1], shape[:free][::-1], strict=False))
    if fn.event_shape != shape[free:] or len(fn.batch_shape) > free or not spread:
        raise ValueError(
            f"hyperpriors[{name!r}] has shape {tuple(fn.batch_shape + fn.event_shape)}, the parameter has "
            f"{tuple(shape)}; give one of that shape, or a scalar one for all entries alike"
        )
    plain = _copy_plainly(fn, density.prior[name].device).expand(shape[:free])
    if not _is_within(plain, constraint, density.prior[name].device):
        raise ValueError(
            f"hyperpriors[{name!r}], a {type(fn).__name__}, lives on {fn.support}, and pyro.param {name!r} on "
            f"{constraint}; give a continuous distribution with no values outside"
        )
    return plain


def _copy_plainly(fn: Any, device: torch.device) -> Any:
    """A distribution on a device that does not check its values, which a recording cannot follow."""
    plain = copy(fn)
    plain._validate_args = False
    for name, value in vars(fn).items():
        if isinstance(value, Distribution):
            plain.__dict__[name] = _copy_plainly(value, device)
        elif isinstance(value, Tensor):
            plain.__dict__[name] = value.to(device)
    return plain


def _is_within(fn: Any, constraint: Any, device: torch.device) -> bool:
    """Whether values all over a distribution's support satisfy a constraint."""
    try:
        transform = bijection(fn.support)
    except NotImplementedError:
        return False
    shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(_CHUNK, *shape, dtype=torch.float64, generator=generator)
    return bool(constraint.check(transform(x.to(device))).all())


def _find_normal(density: Density, hyperpriors: Mapping[str, Any], batch: TaskData, seed: int) -> Tensor:
    """Coordinates of z whose prior given the hyperparameters is normal and independent of the others, bool (D,)."""
    if density.dim > _DENSE_LIMIT:
        return torch.zeros(density.dim, dtype=torch.bool)
    exact = TaskData({k: v.double() if v.is_floating_point() else v for k, v in batch.data.items()}, None)
    normal, device = torch.ones(density.dim, dtype=torch.bool), _floating(batch).device
    with seeded(seed, torch.device("cpu")):
        points = torch.randn(4, density.dim, dtype=torch.float64)
    with seeded(seed, device):
        thetas = [{name: fn.sample().to(device, torch.float64) for name, fn in hyperpriors.items()} for _ in range(3)]
    for theta in thetas:
        normal &= _is_quadratic(_prior_hessians(density, theta, exact, points.to(device))).cpu()
    return normal


def _prior_hessians(density: Density, theta: Tensors, tasks: TaskData, points: Tensor) -> Tensor:
    """Hessians of each task's log prior at some points, (K, D) -> (T, K, D, D)."""

    def of_task(task: TaskData) -> Tensor:
        def log_prior(z: Tensor) -> Tensor:
            return density.log_prior(z, theta, task.data)

        return vmap(jacrev(grad(log_prior)))(points)

    found: Tensor = over_tasks(of_task, tasks)
    return found


def _is_quadratic(hessian: Tensor) -> Tensor:
    """Coordinates whose rows of the Hessian, (T, K, D, D), are negative and the same at K points; bool (D,)."""
    curvature = hessian.diagonal(dim1=-2, dim2=-1)
    size = curvature[:, :1].abs().sqrt().clamp_min(torch.finfo(hessian.dtype).tiny)
    relative = hessian / size.unsqueeze(-1) / size.unsqueeze(-2)
    same = ((relative - relative[:, :1]).abs() <= _TOLERANCE).all(-1)
    good = (same & (curvature < 0)).flatten(0, 1).all(0)
    coupled = (relative.abs() > _TOLERANCE).flatten(0, 1).any(0)
    for _ in range(len(good)):
        good = good & ~(coupled & ~good).any(1)
    return good


def _sites_of(density: Density, coordinates: Tensor) -> list[str]:
    return [name for name, site in density.sites.items() if bool(coordinates[site.slice].any())]


def draw_starts(hierarchy: Hierarchy, num: int, seed: int) -> Tensor:
    """Starts near the model's initial values, their latents drawn from the prior there, (num, P + T D)."""
    like = _floating(hierarchy.tasks)
    with torch.no_grad(), seeded(seed, like.device):
        return torch.stack([_draw_start(hierarchy, like) for _ in range(num)])


def _draw_start(hierarchy: Hierarchy, like: Tensor) -> Tensor:
    coordinates, theta = [], {}
    for name, fn in hierarchy.hyperpriors.items():
        transform, initial = bijection(fn.support), hierarchy.density.prior[name]
        inside = initial if bool(fn.support.check(initial).all()) else fn.sample()
        x = transform.inv(inside.to(like))
        coordinates.append(x + 2 * torch.rand_like(x) - 1)
        theta[name] = transform(coordinates[-1])
    z = _draw_latents(hierarchy, theta)
    return hierarchy.pack(coordinates, z.to(like), theta)


def _draw_latents(hierarchy: Hierarchy, theta: Tensors) -> Tensor:
    density, tasks = hierarchy.density, hierarchy.tasks
    try:
        return vmap(lambda data: density.draw_prior(theta, data), randomness="different")(tasks.data)
    except RuntimeError:  # a site that has no reparameterised draws
        num_tasks = len(next(iter(tasks.data.values())))
        return density.initial_particles(num_tasks, one_task(tasks).data)
