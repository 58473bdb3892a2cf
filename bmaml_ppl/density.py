"""The log density of one task, made from an ordinary Pyro model.

Everything meets here: Pyro knows how to produce `log_joint(z, prior, data) -> scalar`, inference knows
how to consume it, and neither imports the other. Because it is a pure function of tensors,
`torch.func.vmap` carries it over particles and tasks and `grad` and `hessian` differentiate it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from bmaml_ppl.discovery import Discovery, Site, check_vectorised, discover
from bmaml_ppl.draws import reparameterised
from bmaml_ppl.handlers import Record, Sites, execute
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
    """

    model: Model
    sites: dict[str, Site]
    observed: dict[str, str | None]
    prior: dict[str, Tensor]
    constraints: dict[str, constraints.Constraint]
    networks: frozenset[str]
    plate_dims: dict[str, int | None]

    @property
    def dim(self) -> int:
        """D, the number of unconstrained latent coordinates of one task."""
        return sum(site.stop - site.start for site in self.sites.values())

    def log_joint(self, z: Tensor, prior: Tensors, data: Data, mask: Tensor | None = None) -> Tensor:
        """Log p(z, observations | prior), with the log-Jacobian of the change of variables; a scalar."""
        log_prior, log_likelihood = self._log_probs(z, prior, data, mask)
        return log_prior + _total(log_likelihood, z)

    def log_prior(self, z: Tensor, prior: Tensors, data: Data) -> Tensor:
        """Log p(z | prior), with the log-Jacobian of the change of variables; a scalar."""
        return self._log_probs(z, prior, data, None)[0]

    def log_likelihood(self, z: Tensor, prior: Tensors, data: Data, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Log-likelihood of every observation: observed site -> its batch shape, zero where masked."""
        return self._log_probs(z, prior, data, mask)[1]

    def constrain(self, z: Tensor, prior: Tensors, data: Data) -> dict[str, Tensor]:
        """Maps z, (D,), to the value of every latent site on its support."""
        run = self._run(prior, data, _FromVector(self.sites, z), log_prob=False)
        return {name: run.records[name].value for name in self.sites}

    def unconstrain(self, values: Tensors, prior: Tensors, data: Data) -> Tensor:
        """Maps the value of every latent site to z, (D,); the inverse of `constrain`."""
        missing = sorted(set(self.sites) - set(values))
        if missing:
            raise ValueError(f"no value for latent sites {missing}; give one for each of {list(self.sites)}")
        run = self._run(prior, data, lambda name, fn: values[name], log_prob=False)
        return self._flatten({name: run.records[name] for name in self.sites})

    def draw_prior(self, prior: Tensors, data: Data) -> Tensor:
        """Draws z, (D,), from p(z | prior) with torch's generator, reparameterised so that gradients reach
        the prior; call it under `vmap(randomness="different")` for many draws."""
        run = self._run(prior, data, lambda name, fn: reparameterised(fn), log_prob=False)
        z = self._flatten({name: run.records[name] for name in self.sites})
        return torch.where(torch.isfinite(z), z, 0.0)

    def initial_particles(self, num_particles: int, data: Data) -> Tensor:
        """Distinct starting particles, (M, D): a site's own `infer={"init": draw}` where it gives one, else
        draws from the initial prior. Call it under a seed."""
        rows = []
        for _ in range(num_particles):
            run = self._run(self.prior, data, self._draw_initial, log_prob=False)
            rows.append(self._flatten({name: run.records[name] for name in self.sites}))
        z = torch.stack(rows)
        return torch.where(torch.isfinite(z), z, 0.0)

    def _draw_initial(self, name: str, fn: Any) -> Tensor:
        init = self.sites[name].init
        return fn.sample() if init is None else init()

    def simulate(self, z: Tensor, prior: Tensors, data: Data) -> dict[str, Tensor]:
        """Draws every observed site given z with torch's generator, and evaluates deterministic sites.

        Args:
            z: Latents, (D,).
            prior: Meta-parameters.
            data: Inputs; outputs are ignored and replaced by None.

        Returns:
            Observed and deterministic sites by name.
        """
        assign = _FromVector(self.sites, z)

        def draw(name: str, fn: Any) -> Tensor:
            value = assign(name, fn)
            return reparameterised(fn) if value is None else value

        run = self._run(prior, self.without_outputs(data), draw, log_prob=False)
        drawn = {name: record.value for name, record in run.records.items() if name not in self.sites}
        return drawn | run.deterministic

    def without_outputs(self, data: Data) -> dict[str, Tensor | None]:
        """The same data with every output that the model observes set to None, to be predicted."""
        outputs = set(self.observed.values())
        return dict(data) | {key: None for key in outputs if key is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Density":
        """Moves the initial meta-parameters."""
        return replace(self, prior={k: v.to(device=device, dtype=dtype) for k, v in self.prior.items()})

    def _log_probs(
        self, z: Tensor, prior: Tensors, data: Data, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assign = _FromVector(self.sites, z)
        filled = data if mask is None else _fill_padding(data, mask)
        run = self._run(prior, filled, assign, log_prob=True)
        log_prior = assign.log_det
        log_likelihood = {}
        for name, record in run.records.items():
            assert record.log_prob is not None
            if name in self.sites:
                log_prior = log_prior + record.log_prob.sum()
            else:
                log_likelihood[name] = self._apply_mask(name, record.log_prob, mask)
        return log_prior, log_likelihood

    def _apply_mask(self, name: str, log_prob: Tensor, mask: Tensor | None) -> Tensor:
        dim = self.plate_dims[name]
        if mask is None or dim is None:
            return log_prob
        return log_prob * mask.reshape(mask.shape + (1,) * (-1 - dim)).to(log_prob.dtype)

    def _run(
        self,
        prior: Tensors,
        data: Data,
        assign: Callable[[str, Any], Tensor | None],
        *,
        log_prob: bool,
    ) -> Sites:
        handler = Sites(assign, log_prob)
        return execute(self.model, prior, data, handler, networks=bool(self.networks))

    def _flatten(self, records: Mapping[str, Record]) -> Tensor:
        parts = [biject_to(r.fn.support).inv(r.value).reshape(-1) for r in records.values()]
        return torch.cat(parts)


class _FromVector:
    """Assigns each latent site its slice of z, on the site's support, and sums the log-Jacobians."""

    def __init__(self, sites: Mapping[str, Site], z: Tensor) -> None:
        self.sites = sites
        self.z = z
        self.log_det = z.new_zeros(())

    def __call__(self, name: str, fn: Any) -> Tensor | None:
        if name not in self.sites:
            return None
        site = self.sites[name]
        unconstrained = self.z[site.start : site.stop].reshape(site.unconstrained_shape)
        transform = biject_to(fn.support)
        value = transform(unconstrained)
        self.log_det = self.log_det + transform.log_abs_det_jacobian(unconstrained, value).sum()
        return value


def _fill_padding(data: Data, mask: Tensor) -> dict[str, Tensor | None]:
    """Repeats the first real observation where data is padded: a padded zero may be outside a support or
    a log's domain, and its infinite gradient would survive the mask."""
    first = mask.to(torch.uint8).argmax().reshape(1)
    filled = {}
    for key, value in data.items():
        if value is not None and value.ndim and value.shape[0] == mask.shape[-1]:
            real = mask.reshape(mask.shape + (1,) * (value.ndim - 1))
            value = torch.where(real, value, value.index_select(0, first))
        filled[key] = value
    return filled


def _total(log_likelihood: Mapping[str, Tensor], z: Tensor) -> Tensor:
    return sum((value.sum() for value in log_likelihood.values()), start=z.new_zeros(()))


def from_model(model: Model, data: Data) -> Density:
    """Makes the log density of a task from a Pyro model and one task's example data.

    Args:
        model: Any callable on keyword tensors: a function, an `nn.Module`, a `PyroModule`.
        data: One task's keyword arguments, (N, ...) each; outputs must be given so that observed sites show.

    Returns:
        The density; its `prior` holds a copy of every meta-parameter's initial value.

    Raises:
        ValueError: If the model cannot be a task model; the message names the site and what to write.
    """
    found: Discovery = discover(model, data)
    density = Density(
        model=model,
        sites=found.sites,
        observed=found.observed,
        prior=found.params,
        constraints=found.constraints,
        networks=found.networks,
        plate_dims=found.plate_dims,
    )
    check_vectorised(density.log_joint, found, data)
    return density
