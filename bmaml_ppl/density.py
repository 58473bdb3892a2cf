"""The log density of one task, made from an ordinary Pyro model.

Everything meets here: Pyro knows how to produce `log_joint(z, prior, data) -> scalar`, inference knows
how to consume it, and neither imports the other. Because it is a pure function of tensors,
`torch.func.vmap` carries it over particles and tasks and `grad` and `hessian` differentiate it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.bijections import bijection
from bmaml_ppl.bounded import log_prob_at
from bmaml_ppl.discovery import Discovery, Site, check_vectorised, discover, feasible_point
from bmaml_ppl.draws import reparameterised
from bmaml_ppl.handlers import Record, Sites, execute, is_factor
from bmaml_ppl.observations import refuse_unsupported
from bmaml_ppl.types import Model, Tensors

__all__ = ["Density", "from_model"]

Data = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Density:
    """Pure functions of one task's latents, the meta-parameters and the task's data.

    `z` is (D,): the latents in unconstrained coordinates, in the order of `sites`. `prior` maps the name
    of each `pyro.param` and network parameter to its constrained value. `data` maps the model's keyword
    arguments to one task's tensors. `mask`, (N,), is True at real observations; padded ones count for
    nothing at the observed sites.

    Attributes:
        model: The user's model.
        sites: Latent sites by name, each with its slice of z.
        observed: Observed sites by name, each with the data key it was conditioned on (None if derived).
        prior: Initial value of every meta-parameter.
        constraints: Constraint of every meta-parameter.
        networks: Names of the meta-parameters that belong to a registered network.
        plate_dims: Batch dimension of each observed site that runs over observations, None if none does.
        constants: Keys of data known once per task, which no mask applies to.
        derived: Keys of data from which a value observed at some site is computed.
    """

    model: Model
    sites: dict[str, Site]
    observed: dict[str, str | None]
    prior: dict[str, Tensor]
    constraints: dict[str, constraints.Constraint]
    networks: frozenset[str]
    plate_dims: dict[str, int | None]
    constants: frozenset[str] = frozenset()
    derived: frozenset[str] = frozenset()

    @property
    def dim(self) -> int:
        """D, the number of unconstrained latent coordinates of one task."""
        return sum(site.stop - site.start for site in self.sites.values())

    def log_joint(self, z: Tensor, prior: Tensors, data: Data, mask: Tensor | None = None) -> Tensor:
        """Log p(z, observations | prior), with the log-Jacobian of the change of variables; a scalar."""
        return self._log_joint_of_parts(self._split(z), prior, data, mask)

    def log_prior(self, z: Tensor, prior: Tensors, data: Data) -> Tensor:
        """Log p(z | prior), with the log-Jacobian of the change of variables; a scalar. Outputs may be None."""
        return self._evaluate(self._split(z), prior, data, None)[0]

    def log_priors(self, z: Tensor, prior: Tensors, data: Data) -> dict[str, Tensor]:
        """Log density of every latent site on its support, given those before it: site -> its batch shape, without
        log-Jacobians. Outputs may be None."""
        run = self._evaluate(self._split(z), prior, data, None)[1]
        return {name: _log_prob(run.records[name]) for name in self.sites}

    def log_likelihood(self, z: Tensor, prior: Tensors, data: Data, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Log-likelihood of every observation: observed site -> its batch shape, zero where masked. A
        `pyro.factor` counts as an observed site."""
        return self._mask_likelihoods(self._evaluate(self._split(z), prior, data, mask)[1], data, mask)

    def log_parts(self, z: Tensor, prior: Tensors, data: Data, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The prior and the likelihood part of `log_joint`, scalars, in one run of the model."""
        log_prior, run = self._evaluate(self._split(z), prior, data, mask)
        values = [value.sum() for value in self._mask_likelihoods(run, data, mask).values()]
        return log_prior, torch.stack(values).sum()

    def constrain(self, z: Tensor, prior: Tensors, data: Data) -> dict[str, Tensor]:
        """Maps z, (D,), to the value of every latent site on its support. Outputs may be None."""
        run = self._run(prior, data, _FromParts(self.sites, self._split(z)))
        return {name: run.records[name].value for name in self.sites}

    def unconstrain(self, values: Tensors, prior: Tensors, data: Data) -> Tensor:
        """Maps the value of every latent site to z, (D,); the inverse of `constrain`."""
        missing = sorted(set(self.sites) - set(values))
        if missing:
            raise ValueError(f"no value for latent sites {missing}; give one for each of {list(self.sites)}")
        return self._to_vector(prior, data, lambda name, fn: values[name])

    def draw_prior(self, prior: Tensors, data: Data) -> Tensor:
        """Draws z, (D,), from p(z | prior) with torch's generator, reparameterised so that gradients reach
        the prior; call it under `vmap(randomness="different")` for many draws."""
        return _finite(self._to_vector(prior, data, lambda name, fn: reparameterised(fn)))

    def initial_particles(self, num_particles: int, data: Data) -> Tensor:
        """Distinct starting particles, (M, D): a site's own `infer={"init": draw}` where it gives one, else
        draws from the initial prior, or around the middle of the support of a site that has no draws. Call it
        under a seed."""
        draws = [self._to_vector(self.prior, data, self._draw_initial) for _ in range(num_particles)]
        return _finite(torch.stack(draws))

    def _draw_initial(self, name: str, fn: Any) -> Tensor:
        init = self.sites[name].init
        if init is not None:
            return init()
        try:
            return fn.sample()
        except NotImplementedError:
            return feasible_point(fn)

    def simulate(self, z: Tensor, prior: Tensors, data: Data) -> dict[str, Tensor]:
        """Draws every observed site given z with torch's generator, and evaluates deterministic sites.

        Args:
            z: Latents, (D,).
            prior: Meta-parameters.
            data: Inputs; outputs are ignored and replaced by None.

        Returns:
            Observed and deterministic sites by name; no `pyro.factor`.
        """
        assign = _FromParts(self.sites, self._split(z))

        def draw(name: str, fn: Any) -> Tensor:
            return assign(name, fn) if name in self.sites else reparameterised(fn)

        run = Sites(draw, log_prob=False, resample=True)
        execute(self.model, prior, self.without_outputs(data), run, networks=bool(self.networks))
        drawn = {k: r.value for k, r in run.records.items() if k not in self.sites and not is_factor(r.fn)}
        return drawn | run.deterministic

    def without_outputs(self, data: Data) -> dict[str, Tensor | None]:
        """The same data with every output that the model observes set to None, to be predicted."""
        outputs = self.derived | set(self.observed.values())
        return dict(data) | {key: None for key in outputs if key is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Density":
        """Moves the initial meta-parameters."""
        return replace(self, prior={k: v.to(device=device, dtype=dtype) for k, v in self.prior.items()})

    def observe(self, z: Tensor, prior: Tensors, data: Data, mask: Tensor | None = None) -> dict[str, Record]:
        """What every site of one run at z, (D,), is and holds, without log-probabilities."""
        filled = data if mask is None else self._fill_padding(data, mask)
        return self._run(prior, filled, _FromParts(self.sites, self._split(z))).records

    def refuse_unmaskable(self, rows: Collection[str]) -> None:
        """Raises ValueError if a site that observes one of these data keys, (N, ...) each, cannot be masked."""
        for name, key in self.observed.items():
            if self.plate_dims[name] is None and key in rows:
                raise _unmaskable(name)

    def _split(self, z: Tensor) -> dict[str, Tensor]:
        # `split`, unlike slices, has a gradient without additions.
        return dict(zip(self.sites, z.split([site.stop - site.start for site in self.sites.values()]), strict=True))

    def _log_joint_of_parts(self, parts: Tensors, prior: Tensors, data: Data, mask: Tensor | None = None) -> Tensor:
        log_prior, run = self._evaluate(parts, prior, data, mask)
        return log_prior + sum(value.sum() for value in self._mask_likelihoods(run, data, mask).values())

    def _evaluate(self, parts: Tensors, prior: Tensors, data: Data, mask: Tensor | None) -> tuple[Tensor, Sites]:
        assign = _FromParts(self.sites, parts)
        filled = data if mask is None else self._fill_padding(data, mask)
        run = self._run(prior, filled, assign, score=assign.score)
        log_probs = [_log_prob(run.records[name]).sum() for name in self.sites]
        return torch.stack([*assign.log_dets, *log_probs]).sum(), run

    def _fill_padding(self, data: Data, mask: Tensor) -> dict[str, Tensor | None]:
        """Repeats the first real observation where data is padded: a padded zero may be outside a support or
        a log's domain, and its infinite gradient would survive the mask."""
        first = mask.to(torch.uint8).argmax().reshape(1)
        filled = dict(data)
        for key, value in data.items():
            if value is not None and self._has_rows(key, value, mask):
                rows = (1,) * (value.ndim - 1)
                usual = 0.5 if value.is_floating_point() else False  # inside most supports
                stand_in = torch.where(mask.any(), value.index_select(0, first), usual)
                filled[key] = torch.where(mask.reshape(mask.shape + rows), value, stand_in)
        return filled

    def _has_rows(self, key: str, value: Tensor, mask: Tensor) -> bool:
        return key not in self.constants and value.ndim > 0 and value.shape[0] == mask.shape[-1]

    def _mask_likelihoods(self, run: Sites, data: Data, mask: Tensor | None) -> dict[str, Tensor]:
        masked = {}
        for name, record in run.records.items():
            if name in self.sites:
                continue
            if not record.is_observed:
                key = self.observed.get(name)
                what = f"give data {key!r}" if key else "declare the same sites in every run"
                raise ValueError(f"site {name!r} is not observed in this run, and has no likelihood; {what}")
            log_prob, dim = _log_prob(record), self.plate_dims[name]
            if mask is not None and dim is not None:
                real = mask.reshape(mask.shape + (1,) * (-1 - dim))
                log_prob = torch.where(real, log_prob, torch.zeros_like(log_prob))
            elif mask is not None:
                self._refuse_unmaskable(name, record, data, mask)
            masked[name] = log_prob
        return masked

    def _refuse_unmaskable(self, name: str, record: Record, data: Data, mask: Tensor) -> None:
        key = self.observed[name]
        value = None if key is None else data.get(key)
        is_constant = key is not None and (value is None or not self._has_rows(key, value, mask))
        if not is_constant and not is_factor(record.fn):
            raise _unmaskable(name)

    def _run(
        self,
        prior: Tensors,
        data: Data,
        assign: Callable[[str, Any], Tensor],
        *,
        score: Callable[[str, Any, Tensor], Tensor] | None = None,
    ) -> Sites:
        sites = Sites(assign, log_prob=score is not None, score=score)
        run = execute(self.model, prior, data, sites, networks=bool(self.networks))
        if missing := [name for name in self.sites if name not in run.records]:
            raise ValueError(
                f"latent site {missing[0]!r} is missing from this run, and was there when the model was first traced; "
                "declare the same sites in every run"
            )
        return run

    def _to_vector(self, prior: Tensors, data: Data, value: Callable[[str, Any], Tensor]) -> Tensor:
        assign = _ToVector(self.sites, value)
        self._run(prior, data, assign)
        return torch.cat([assign.parts[name] for name in self.sites])


def _unmaskable(site: str) -> ValueError:
    return ValueError(
        f"observed site {site!r} has no plate over observations, so that padded ones cannot be left out; write "
        '`with pyro.plate("data", n):` around it with n the number of rows, and no to_event over them'
    )


class _FromParts:
    """Assigns each latent site its coordinates, on the site's support, and keeps the log-Jacobians."""

    def __init__(self, sites: Mapping[str, Site], parts: Tensors) -> None:
        self.sites = sites
        self.parts = parts
        self.log_dets: list[Tensor] = []

    def __call__(self, name: str, fn: Any) -> Tensor:
        if name not in self.sites:
            return _stand_in(fn)
        site = self.sites[name]
        if fn.batch_shape + fn.event_shape != site.shape:
            raise ValueError(
                f"latent site {name!r} has shape {tuple(fn.batch_shape + fn.event_shape)}, and had {tuple(site.shape)} "
                "when the model was first traced; a latent value per observation needs tasks of equal length"
            )
        unconstrained = self.parts[name].reshape(site.unconstrained_shape)
        transform = bijection(fn.support)
        value = transform(unconstrained)
        self.log_dets.append(transform.log_abs_det_jacobian(unconstrained, value).sum())
        return value

    def score(self, name: str, fn: Any, value: Tensor) -> Tensor:
        """Log density of an assigned site at its coordinates, of its batch shape."""
        if name not in self.sites:
            return fn.log_prob(value)
        return log_prob_at(fn, value, self.parts[name].reshape(self.sites[name].unconstrained_shape))


class _ToVector:
    """Assigns each latent site a value and keeps its unconstrained coordinates."""

    def __init__(self, sites: Mapping[str, Site], value: Callable[[str, Any], Tensor]) -> None:
        self.sites = sites
        self.value = value
        self.parts: dict[str, Tensor] = {}

    def __call__(self, name: str, fn: Any) -> Tensor:
        if name not in self.sites:
            return _stand_in(fn)
        value = self.value(name, fn)
        self.parts[name] = bijection(fn.support).inv(value).reshape(-1)
        return value


def _stand_in(fn: Any) -> Tensor:
    """A value for an output that is not given, where only latents are asked for."""
    return torch.zeros(fn.batch_shape + fn.event_shape)


def _finite(z: Tensor) -> Tensor:
    return torch.where(torch.isfinite(z), z, 0.0)


def _log_prob(record: Record) -> Tensor:
    assert record.log_prob is not None
    return record.log_prob


def from_model(model: Model, data: Data, constants: Collection[str] = ()) -> Density:
    """Makes the log density of a task from a Pyro model and one task's example data.

    Args:
        model: Any callable on keyword tensors: a function, an `nn.Module`, a `PyroModule`.
        data: One task's keyword arguments, (N, ...) each; outputs must be given so that observed sites show.
        constants: Keys of what is known once per task and has no row per observation.

    Returns:
        The density; its `prior` holds a copy of every meta-parameter's initial value.

    Raises:
        ValueError: If the model cannot be a task model; the message names the site and what to write.
    """
    found: Discovery = discover(model, data, constants)
    density = Density(
        model=model,
        sites=found.sites,
        observed=found.observed,
        prior=found.params,
        constraints=found.constraints,
        networks=found.networks,
        plate_dims=found.plate_dims,
        constants=frozenset(constants),
        derived=found.derived,
    )
    refuse_unsupported(density, data)
    check_vectorised(density._log_joint_of_parts, found, data)
    return density
