"""The posterior of one adapted task, or of a batch of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from bmaml_ppl.adaptation import Adapter, TaskData, as_task_data, one_task
from bmaml_ppl.checks import check_count
from bmaml_ppl.density import Density
from bmaml_ppl.diagnostics.curvature import describe_curvature
from bmaml_ppl.diagnostics.population import describe_population
from bmaml_ppl.generators import seeded
from bmaml_ppl.guide import particle_guide, posterior_guide
from bmaml_ppl.inference import chains
from bmaml_ppl.linearized import linearized_log_likelihood, simulate_linearized
from bmaml_ppl.precision_normal import gaussian_mixture
from bmaml_ppl.prediction import blank_padding, simulate
from bmaml_ppl.scaling import Scaling
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.template import Template
from bmaml_ppl.types import Inference, Model

if TYPE_CHECKING:
    from bmaml_ppl.learned import LearnedPrior

__all__ = ["RESTART_STREAM", "Posterior"]

RESTART_STREAM = 9_000_011
"""What the seed of one restart is apart from that of the next."""

_GUIDE_DRAWS = 200

# A stream of its own, neither that of the particles' start nor that of predictive noise.
_STREAM = 2_000_003


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """Adapted tasks: draws of their latents, and predictions in the user's units.

    Results of a single task have no task dimension; those of a batch have it after the draws:
    (S, ...) and (S, T, ...).

    Attributes:
        prior: The learned prior that adapted; its meta-parameters hold.
        inference: The algorithm that adapted.
        state: The algorithm's final state, a leading task dimension on every tensor.
        tasks: The observations adapted to, in the user's units.
        single: Whether one task was given without a task dimension.
        seed: Seed of draws.
        restarts: States of the other adaptations from starts of their own, where there are any.
    """

    prior: "LearnedPrior"
    inference: Inference
    state: Any
    tasks: Tasks
    single: bool
    seed: int
    restarts: tuple[Any, ...] = ()

    @property
    def density(self) -> Density:
        """Log density of a task."""
        return self.prior.density

    @property
    def params(self) -> dict[str, Tensor]:
        """Meta-parameters by name, constrained."""
        return self.prior.params

    @property
    def scaling(self) -> Scaling | None:
        """The learned prior's standardisation, or None."""
        return self.prior.scaling

    @property
    def template(self) -> Template:
        """Shape of one task's data."""
        return self.prior.template

    @property
    def states(self) -> tuple[Any, ...]:
        """The states of all restarts, R of them."""
        return (self.state, *self.restarts)

    @property
    def num_chains(self) -> int:
        """C, sequences of draws that began apart: Markov chains of all restarts, or restarts."""
        return len(self.states) * (self.inference.num_particles if self.inference.num_draws else 1)

    @property
    def particles(self) -> Tensor:
        """Unconstrained particles of the first restart, (M, D), or (T, M, D) for a batch."""
        return self.state.particles[0] if self.single else self.state.particles

    def diagnostics(self) -> dict[str, Any]:
        """What the inference reports of itself, one entry a task, by name of the quantity.

        Returns:
            For `laplace`: `repair`, `repaired`, `decrement`, `converged`, `flat_site` and `log_evidence`, see
            `bmaml_ppl.diagnostics.curvature.describe_curvature`. For `smc`: `smallest_ess`, the smallest effective
            sample size of a reweighting as a share of the particles; `acceptance_rate` of the last moves; and
            `log_evidence`, the estimate of the log marginal likelihood. Empty for other particles.
        """
        return {**describe_curvature(self.state, self.density.sites), **describe_population(self.state)}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return self.tasks.names

    @property
    def model(self) -> Model:
        """The user's model with the learned meta-parameters and networks in place, for Pyro's own tools."""
        return self.prior.model

    def __repr__(self) -> str:
        tasks = "1 task" if len(self) == 1 else f"{len(self)} tasks"
        sites = ", ".join(self.density.sites)
        return f"Posterior({tasks}; sites: {sites}; {self.inference.name}, {self.inference.num_particles} particles)"

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, key: int | str | slice | Sequence[int | str] | Tensor) -> "Posterior":
        """The posterior of one task, by position or name, or of several, as `Tasks` selects them."""
        chosen = self.tasks[key]
        single = isinstance(key, str) or not isinstance(key, slice | Sequence | Tensor)
        index = [self.tasks.names.index(name) for name in chosen.names]
        state, restarts = tree_map(lambda value: value[index], (self.state, self.restarts))
        return replace(self, state=state, restarts=restarts, tasks=chosen, single=single)

    def draws(self, num_samples: int | None = None) -> Tensor:
        """Unconstrained draws, (S, D) or (S, T, D), restart by restart; None gives each particle once.

        Of Markov chains, S evenly spaced ones of all that were kept, chain by chain.
        """
        if num_samples is None:
            z = torch.cat([state.particles for state in self.states], 1)
        else:
            check_count("num_samples", num_samples, least=1)
            with torch.no_grad(), seeded(self.seed + _STREAM, self.state.particles.device):
                z = torch.cat([self._sample(*each) for each in self._share_out(num_samples)], 1)
        return self._draw_first(z)

    def _share_out(self, num_samples: int) -> list[tuple[Any, int]]:
        """Each restart's state, and how many of so many draws come from it."""
        count, rest = divmod(num_samples, len(self.states))
        return [(state, count + (i < rest)) for i, state in enumerate(self.states)]

    def _sample(self, state: Any, num_samples: int) -> Tensor:
        """Draws from one restart, (T, S, D)."""
        if num_samples == 0:
            return state.particles[:, :0]
        drawn: Tensor = vmap(lambda s: self.inference.sample(s, num_samples, None), randomness="same")(state)
        return drawn

    def sample_stats(self, num_samples: int) -> dict[str, Tensor]:
        """What is known of each of the draws of `draws(num_samples)`, (S,) or (S, T) each.

        Returns:
            `lp`, the log joint density of latents in unconstrained coordinates and data, in nats; `log_q`, that of the
            approximate posterior where it has one (`laplace`): their difference is a log importance weight; of Markov
            chains `acceptance_rate`, `diverging`, `energy` and `step_size`, see `ChainState`.
        """
        z, batch = self.task_first(self.draws(num_samples)), self.as_task_data(self.tasks)
        with torch.no_grad():
            found = {"lp": self.adapter.log_joint(z, self.params, batch)}
            if self.inference.log_prob is not None:
                found["log_q"] = self._log_q(z)
        for name in ("acceptance_rate", "diverging", "energy", "step_size") if self.inference.num_draws else ():
            each = [chains.thin_tasks(getattr(state, name), n) for state, n in self._share_out(num_samples)]
            found[name] = torch.cat(each, 1)
        return {name: self._draw_first(value) for name, value in found.items()}

    @property
    def adapter(self) -> Adapter:
        """The inference bound to the density."""
        return Adapter(self.density, self.inference, self.prior.start)

    def _log_q(self, z: Tensor) -> Tensor:
        """Log density, (T, S), of the equal mixture of the restarts' approximations."""
        log_prob = self.inference.log_prob
        assert log_prob is not None
        each = [vmap(lambda s, z: vmap(lambda one: log_prob(s, one))(z))(state, z) for state in self.states]
        return torch.stack(each).logsumexp(0) - log(len(each))

    def sites(self, num_samples: int | None = None) -> dict[str, Tensor]:
        """Draws of every latent site on its support, (S, ...) or (S, T, ...).

        Latents are in the model's units: standardised ones where the tasks were standardised.
        """
        z = self.task_first(self.draws(num_samples))
        task_data = self.as_task_data(self.tasks)

        def constrain(z: Tensor, task: dict[str, Tensor]) -> dict[str, Tensor]:
            return vmap(lambda particle: self.density.constrain(particle, self.params, task))(z)

        values = vmap(constrain)(z, task_data.data)
        return {name: self._draw_first(value) for name, value in values.items()}

    def predict(
        self, tasks: Tasks | None = None, /, *, num_samples: int = 1000, linearized: bool = False, **data: Any
    ) -> dict[str, Tensor]:
        """Draws from the posterior predictive at new inputs.

        Args:
            tasks: The same tasks with new observations (inputs suffice), or None.
            num_samples: S.
            linearized: Draw with the parameters of the observations linearised around the mode (the GLM predictive
                of `laplace`, which suits the Gauss-Newton posterior of a network); deterministic sites are left out.
            **data: Inputs as keyword tensors, (N, ...), or (T, N, ...) for a batch; constants given at
                adaptation need not be given again.

        Returns:
            Observed sites in the user's units and deterministic sites in the model's: (S, N, ...) or
            (S, T, N, ...), as `pyro.infer.Predictive` gives them. Padded rows of observed sites are NaN.
        """
        check_count("num_samples", num_samples, least=1)
        new = self.as_task_data(self.read_tasks(tasks, data, need_outputs=False))
        z = self.task_first(self.draws(num_samples))
        if linearized:
            modes = self._mode()
            draws = simulate_linearized(self.density, self.params, modes, z, new, self.scaling, self.seed)
        else:
            draws = simulate(self.density, self.params, z, new, self.scaling, self.seed)
        return {name: self._draw_first(value) for name, value in draws.items()}

    def log_likelihood(
        self,
        tasks: Tasks | None = None,
        /,
        *,
        num_samples: int | None = None,
        linearized: bool = False,
        **data: Any,
    ) -> dict[str, Tensor]:
        """Log-likelihood of observations under every particle, in the user's units.

        Args:
            tasks: The same tasks with their observations, or None.
            num_samples: Evaluate at this many draws, those of `sites` and `predict`, instead of at the particles.
            linearized: As in `predict`.
            **data: Inputs and outputs as keyword tensors.

        Returns:
            Observed site -> (M, N) or (M, T, N), S in place of M for draws; NaN at padded rows. A site that
            observes all rows at once has (M,) or (M, T).
        """
        new = self.as_task_data(self.read_tasks(tasks, data, need_outputs=True))

        def of_task(z: Tensor, task: dict[str, Tensor]) -> dict[str, Tensor]:
            return vmap(lambda particle: self.density.log_likelihood(particle, self.params, task))(z)

        z = self.task_first(self.draws(num_samples))
        if linearized:
            values = linearized_log_likelihood(self.density, self.params, self._mode(), z, new)
        else:
            with torch.no_grad():
                values = vmap(of_task)(z, new.data)
        return {
            name: self._draw_first(blank_padding(value - self._log_scale(name, value, new.data), new.mask))
            for name, value in values.items()
        }

    def to_arviz(
        self,
        tasks: Tasks | None = None,
        /,
        *,
        num_samples: int | None = None,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        **data: Any,
    ) -> Any:
        """Exports to ArviZ: `InferenceData` on ArviZ 0.x, `DataTree` on 1.x; see `posterior_tree` for its groups.

        Args:
            tasks: Observations to predict and score, or None for those adapted to. Inputs suffice: outputs that
                are not given are predicted, and neither scored nor shown as observed.
            num_samples: Draws over all chains, rounded up to as many in each; None takes every draw of Markov chains,
                and 1,000 a restart elsewhere.
            coords: Index values of sites' own dimensions: `{"term": ["intercept", "slope"]}`.
            dims: Names of sites' own dimensions: `{"coef": ["term"]}`. Without, a dimension is called as the
                `pyro.plate` around the site, or else `coef_dim_0`.
            **data: The same as keyword tensors.
        """
        from bmaml_ppl.diagnostics.posterior_tree import posterior_tree

        if num_samples is not None:
            check_count("num_samples", num_samples, least=1)
            num_samples = -(-num_samples // self.num_chains)
        new = self.read_tasks(tasks, data, need_outputs=False)
        return posterior_tree(self, new, num_samples or self.inference.num_draws or 1000, coords, dims)

    def as_guide(self) -> Callable[..., dict[str, Tensor]]:
        """A Pyro guide that draws from this posterior's first restart, for `pyro.infer.Predictive` and `Importance`.

        Its density is that of `laplace`'s Gaussian, or mixture of Gaussians; for particles, a smooth mixture around
        them with their covariance (a point where there is only one), so that importance weights are proper. Data
        passed to it must be in the model's units. Pair it with `posterior.model`, which holds the learned
        meta-parameters and networks where the user's own model would read their initial values:
        `Predictive(posterior.model, guide=posterior.as_guide(), num_samples=1000)(x=x)`.

        Raises:
            ValueError: If the posterior holds several tasks.
        """
        if len(self) != 1:
            raise ValueError(
                f"a guide is for one task, this posterior holds {len(self)}; write "
                f"posterior[{self.names[0]!r}].as_guide()"
            )
        data, state = one_task(self.as_task_data(self.tasks)).data, tree_map(lambda value: value[0], self.state)
        if hasattr(state, "precision"):
            return posterior_guide(self.density, self.params, gaussian_mixture(state), data)
        particles = chains.sample(state, _GUIDE_DRAWS, None) if self.inference.num_draws else state.particles
        return particle_guide(self.density, self.params, particles, data)

    def _mode(self) -> Tensor:
        """The one mode of each task, (T, D)."""
        modes = self.state.particles
        if self.inference.name != "laplace" or modes.shape[1] * len(self.states) != 1:
            raise ValueError(
                f"linearized=True needs one mode, of inference=laplace(num_particles=1), got {self.inference.name} "
                f"with {modes.shape[1]} particles and {len(self.states)} restarts; write linearized=False"
            )
        return modes[:, 0]

    def read_tasks(self, tasks: Tasks | None, data: Mapping[str, Any], *, need_outputs: bool) -> Tasks:
        """What a user gives of the adapted tasks, as `Tasks` in the user's units; nothing is those adapted to."""
        if tasks is None and not data:
            return self.tasks
        like = self.state.particles
        return self.template.to_tasks(tasks, data, need_outputs=need_outputs, like=like, adapted=self.tasks)[0]

    def as_task_data(self, tasks: Tasks) -> TaskData:
        """Tasks in the user's units as the model sees them."""
        return as_task_data(replace(tasks, scaling=self.scaling))

    def _log_scale(self, site: str, like: Tensor, data: Mapping[str, Tensor]) -> Tensor:
        """Log of the factor by which standardisation raised each density of (T, M, ...)."""
        key = self.density.observed[site]
        if self.scaling is None or key is None:
            return like.new_zeros(())
        return self.scaling.log_factor(key, data[key].shape[1:], like, like.shape[2:])

    def _draw_first(self, value: Tensor) -> Tensor:
        return value[0] if self.single else value.transpose(0, 1)

    def task_first(self, value: Tensor) -> Tensor:
        """(S, ...) of a single task and (S, T, ...) of a batch alike as (T, S, ...)."""
        return value.unsqueeze(0) if self.single else value.transpose(0, 1)
