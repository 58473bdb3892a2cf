"""The whole hierarchy by NUTS, hyperparameters and all tasks together: the gold standard for small problems."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyro
import torch
from torch import Tensor

from bmaml_ppl.adaptation import TaskData, as_task_data, one_task
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.generators import seeded
from bmaml_ppl.hierarchy import Hierarchy, draw_starts, make_hierarchy, over_draws
from bmaml_ppl.inference.chains import ChainState
from bmaml_ppl.inference.nuts import check_sampler, keep_finite, run_nuts
from bmaml_ppl.observations import check_observations
from bmaml_ppl.prediction import blank_padding
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Model

__all__ = ["FullPosterior", "full_bayes"]

_CANDIDATES = 8


def full_bayes(
    model: Model,
    tasks: Tasks,
    hyperpriors: Mapping[str, Any],
    *,
    num_warmup: int = 500,
    num_draws: int = 500,
    num_chains: int = 1,
    noncentered: Literal["auto"] | bool = "auto",
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> "FullPosterior":
    r"""Samples hyperparameters and all task latents together with `pyro.infer.NUTS`.

    .. math:: p(\theta, z_1, ..., z_T \mid D) \propto p(\theta) \prod_t p(D_t \mid z_t, \theta) \, p(z_t \mid \theta)

    What `meta_learn` estimates, each `pyro.param`, is here unknown with a prior of the user's. All are in the model's
    units: standardised ones where the tasks are standardised. It computes in the tasks' dtype,
    `tasks.to(dtype=torch.float64)` asks for more, and chains run one after another, each from its own start near the
    model's initial values.

    Args:
        model: Pyro model of one task, as `meta_learn` takes it.
        tasks: The tasks; ragged ones are masked.
        hyperpriors: A distribution for each `pyro.param` by name, and for each parameter of a registered network by
            its full name ("net$$$weight"). Scalar ones are spread over a parameter's entries. A support may be
            narrower than the parameter's constraint, and not wider.
        num_warmup: Transitions a chain that adapt step size and mass matrix, and are dropped.
        num_draws: S, transitions a chain that are kept.
        num_chains: C.
        noncentered: Whether to sample z_t = mean(theta) + root(theta) u_t in place of z_t. "auto" does for the latents
            whose prior given theta is normal, seen at a few points, in models of up to 64 latent coordinates: eight
            schools then have ten times the effective draws and few divergences. True asks for it in all of them; False
            suits tasks that each say much more of their latents than the prior does.
        target_accept: Mean acceptance that the step size aims at, in (0, 1): higher takes shorter steps.
        max_tree_depth: A trajectory has at most 2^max_tree_depth steps.
        seed: Seed of starts and transitions.
        progress: Whether to show a progress bar a chain.

    Returns:
        Draws of everything.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If hyperpriors are missing or unknown or do not fit, an option is out of range, or the model cannot
            be a task model.

    References:
        Papaspiliopoulos, Roberts and Sköld (2007), A General Framework for the Parametrization of Hierarchical
        Models; Betancourt and Girolami (2015), Hamiltonian Monte Carlo for Hierarchical Models.
    """
    settings: dict[str, Any] = {"num_warmup": num_warmup, "num_draws": num_draws, "num_chains": num_chains}
    settings |= {"target_accept": target_accept, "max_tree_depth": max_tree_depth}
    check_sampler(**settings)
    if not isinstance(tasks, Tasks):
        raise TypeError(f"tasks is {tasks!r:.80}, a {type(tasks).__name__}; write Tasks.from_frame(...)")
    batch = as_task_data(tasks)
    density = _make_density(model, tasks, batch, seed)
    with pyro.validation_enabled(False):
        hierarchy = make_hierarchy(density, batch, hyperpriors, noncentered, seed)
        starts = keep_finite(draw_starts(hierarchy, _CANDIDATES * num_chains, seed), hierarchy, num_chains)
        state = run_nuts(hierarchy, starts, **settings, seed=seed, progress=progress)
        hyperparameters, sites = hierarchy.evaluate(state.draws)
    return FullPosterior(density, tasks, hyperparameters, sites, state, tuple(hierarchy.noncentered), hierarchy)


@dataclass(frozen=True, eq=False, repr=False)
class FullPosterior:
    """Draws of a whole hierarchy, C chains of S draws each.

    Attributes:
        density: Log density of a task.
        tasks: The observations, in the user's units.
        hyperparameters: Draws of each meta-parameter on its support, (C, S, ...), in the model's units.
        sites: Draws of each task's latents on their support, (C, S, T, ...), in the model's units.
        state: The chains in unconstrained coordinates, and their statistics.
        noncentered: Latent sites that were sampled non-centred.
    """

    density: Density
    tasks: Tasks
    hyperparameters: dict[str, Tensor]
    sites: dict[str, Tensor]
    state: ChainState
    noncentered: tuple[str, ...]
    _hierarchy: Hierarchy = field(repr=False)

    def __repr__(self) -> str:
        chains, draws = self.state.log_density.shape
        return (
            f"FullPosterior({len(self.tasks)} tasks; hyperparameters: {', '.join(self.hyperparameters)}; sites: "
            f"{', '.join(self.sites)}; {chains} chains of {draws} draws)"
        )

    def log_likelihood(self) -> dict[str, Tensor]:
        """Log-likelihood of each observation under each draw, in nats per user's unit.

        Returns:
            Observed site -> (C, S, T, N); NaN at padded rows. A site that observes all rows at once has (C, S, T).
        """
        hierarchy, num_rows = self._hierarchy, next(iter(self.tasks.data.values())).shape[1]
        with pyro.validation_enabled(False):
            values = over_draws(hierarchy.log_likelihood, self.state.draws)
        found = {}
        for name, value in values.items():
            value = value - self._log_scale(name, value)
            rows = value.ndim > 3 and value.shape[3] == num_rows
            blank = blank_padding(value.flatten(0, 1).transpose(0, 1), hierarchy.tasks.mask if rows else None)
            found[name] = blank.transpose(0, 1).reshape(value.shape)
        return found

    def to_arviz(self) -> Any:
        """Exports to ArviZ: `InferenceData` on ArviZ 0.x, `DataTree` on 1.x.

        Groups: posterior, hyperparameters and task latents, these with a dimension `task`; sample_stats;
        log_likelihood and observed_data, flat along `obs_id`, labelled with `task` and `observation`, in the user's
        units. A site that observes all rows of a task at once is named `SITE_per_task`.
        """
        from bmaml_ppl import __version__
        from bmaml_ppl.diagnostics.export import flatten_observations, to_tree

        layout = _Layout(self.tasks)
        names = np.asarray([str(name) for name in self.tasks.names])
        labels = flatten_observations(layout.mask, layout.mask, self.tasks.names, dim="obs_id")[1]
        return to_tree(
            posterior={
                **{name: layout.name(name, [], value, 2) for name, value in self.hyperparameters.items()},
                **{name: layout.name(name, ["task"], value, 3) for name, value in self.sites.items()},
            },
            sample_stats=_sample_stats(self.state),
            log_likelihood=layout.scores(self.log_likelihood(), self.density),
            observed_data=layout.observed(self.density),
            coords={"task": names, "task_id": names, **labels},
            dims=layout.dims,
            attrs={
                "inference_library": "bmaml_ppl",
                "inference_library_version": __version__,
                "inference": "full_bayes",
                "noncentered": ", ".join(self.noncentered),
            },
        )

    def _log_scale(self, site: str, like: Tensor) -> Tensor:
        """Log of the factor by which standardisation raised each density of (C, S, T, ...)."""
        key, scaling = self.density.observed.get(site), self.tasks.scaling
        if scaling is None or key is None:
            return like.new_zeros(())
        given = {**self.tasks.data, **self.tasks.constants}[key]
        return scaling.log_factor(key, given.shape[1:], like, like.shape[3:])


class _Layout:
    """Gives arrays their place in the tree and remembers the names of their dimensions."""

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        mask = tasks.with_mask().mask
        assert mask is not None
        self.mask = mask.cpu().numpy()
        self.dims: dict[str, list[str]] = {}

    def name(self, name: str, first: list[str], value: Tensor, num_before: int) -> np.ndarray:
        """The array, its dimensions named: `first` end at `num_before`."""
        self.dims[name] = first + [f"{name}_dim_{i}" for i in range(value.ndim - num_before)]
        return value.detach().cpu().numpy()

    def scores(self, values: Mapping[str, Tensor], density: Density) -> dict[str, np.ndarray]:
        """(C, S, T, N) -> (C, S, num_real); what observes a task as a whole keeps its task dimension."""
        found = {}
        for name, value in values.items():
            if self._has_rows(value, 3) and density.observed.get(name) not in self.tasks.constants:
                found[name] = self._flatten(name, value, 2)
            else:
                whole = name if density.observed.get(name) in self.tasks.constants else f"{name}_per_task"
                found[whole] = self.name(whole, ["task_id"], value, 3)
        return found

    def observed(self, density: Density) -> dict[str, np.ndarray]:
        """What each site observed; sites that observe something derived from the data are left out."""
        found = {}
        for site, key in density.observed.items():
            if key in self.tasks.data:
                found[site] = self._flatten(site, self.tasks.data[key], 0)
            elif key in self.tasks.constants:
                found[site] = self.name(site, ["task_id"], self.tasks.constants[key], 1)
        return found

    def _has_rows(self, value: Tensor, dim: int) -> bool:
        return value.ndim > dim and value.shape[dim] == self.mask.shape[1]

    def _flatten(self, name: str, value: Tensor, num_before: int) -> np.ndarray:
        from bmaml_ppl.diagnostics.export import flatten_observations

        array = self.name(name, ["obs_id"], value, num_before + 2)
        return flatten_observations(array, self.mask, event_ndim=value.ndim - num_before - 2)[0]


def _sample_stats(state: ChainState) -> dict[str, np.ndarray]:
    stats = {"lp": state.log_density, **{name: getattr(state, name) for name in ChainState._fields[3:]}}
    return {name: value.cpu().numpy() for name, value in stats.items()}


def _make_density(model: Model, tasks: Tasks, batch: TaskData, seed: int) -> Density:
    task = one_task(batch)
    rows = slice(None) if task.mask is None else task.mask
    example = {key: value[rows] if key in tasks.data else value for key, value in task.data.items()}
    with seeded(seed, torch.device("cpu")):  # a model may draw its initial values
        density = from_model(model, example, tasks.constants)
    if batch.mask is not None:
        density.refuse_unmaskable(tasks.data)
    like = next((v for v in example.values() if v.is_floating_point()), torch.zeros(()))
    density = density.to(like.device, like.dtype)
    check_observations(density, density.prior, batch.data, batch.mask, tasks.names)
    return density
