"""What of a posterior, or of a learned prior, goes into which group of an ArviZ tree."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.func import vmap

from bmaml_ppl.adaptation import as_task_data, one_task
from bmaml_ppl.diagnostics.export import flatten_observations, to_tree

if TYPE_CHECKING:
    from torch import Tensor

    from bmaml_ppl.learned import LearnedPrior
    from bmaml_ppl.posterior import Posterior
    from bmaml_ppl.tasks import Tasks
    from bmaml_ppl.types import Inference

__all__ = ["posterior_tree", "prior_tree"]

Arrays = dict[str, np.ndarray]
Dims = Mapping[str, Sequence[str]]

_OBSERVATION = "obs_id"
# `task` labels each observation, so that a dimension beside observations needs another name.
_TASK = "task_id"
_LABELS = frozenset({"task", "observation", _OBSERVATION, _TASK})
_RESERVED = _LABELS | {"chain", "draw"}


def posterior_tree(
    posterior: "Posterior",
    tasks: "Tasks",
    num_draws: int,
    coords: Mapping[str, Any] | None = None,
    dims: Dims | None = None,
) -> Any:
    """Exports adapted tasks: latents, predictions and their scores at the same draws.

    Args:
        posterior: Adapted tasks.
        tasks: The same tasks with observations to predict and score, in the user's units. Outputs that are not
            given are predicted, and neither scored nor shown as observed.
        num_draws: S, draws a chain. A chain is a Markov chain of `hmc` or `nuts`, or else one restart.
        coords: Index values of sites' own dimensions, by dimension.
        dims: Names of a site's own dimensions (those of one draw of one task, or of one observation), by site. Where
            none are given, a dimension is named as the `pyro.plate` around the site, or else `SITE_dim_0`.

    Returns:
        `InferenceData` or `DataTree` with the groups

        - posterior: latent sites in the model's units, and deterministic sites that hold one value per task,
          (chain=C, draw=S, ...), with a dimension `task` after the draws for a batch of tasks;
        - posterior_predictive: observed sites in the user's units, and deterministic sites that run over
          observations, flat along `obs_id`, labelled with `task` and `observation`;
        - log_likelihood: of each observation under each draw, nats per user's unit, flat. Sites that observe
          all rows of a task at once are named `SITE_per_task`;
        - log_prior: log density of each latent site at the posterior's draws, in nats, without log-Jacobians;
        - sample_stats: `lp`, the log joint density; `log_q`, that of the approximation where it is known; of Markov
          chains `acceptance_rate`, `diverging`, `energy` and `step_size`. `arviz.loo_approximate_posterior` of several
          tasks wants those of each observation's own task: `lp.sel(task=tree["log_likelihood"]["task"])`;
        - prior, prior_predictive: the same sites before the observations, (chain=1, draw=S, ...);
        - observed_data: sites observed as they are given, in the user's units, flat;
        - constant_data: inputs, flat, and constants per task. An input named as a site is `input_NAME`.

    Raises:
        ValueError: If coords or dims do not fit the sites; the message names the site or the dimension.
    """
    outline = _Outline.of(posterior.prior, tasks, posterior.single)
    num_chains = posterior.num_chains
    total = num_chains * num_draws
    sites = _with_tasks(posterior.sites(total), posterior.single)
    predicted = _with_tasks(posterior.predict(tasks, num_samples=total), posterior.single)
    scores = _score(posterior, tasks, total)
    flat, per_task = _split(predicted, outline)
    layout = _Layout(outline, dims)
    prior = _draw_prior(posterior.prior, tasks, num_draws, outline)
    log_priors = _with_tasks(_score_prior(posterior, total), posterior.single)
    return to_tree(
        log_prior=layout.latent(log_priors, num_chains),
        posterior=layout.latent({**sites, **per_task}, num_chains),
        posterior_predictive=layout.sampled(flat, num_chains),
        log_likelihood=layout.sampled(_rename_totals(scores, flat, outline), num_chains),
        sample_stats=layout.latent(_with_tasks(posterior.sample_stats(total), posterior.single), num_chains),
        prior=layout.latent(prior[0]),
        prior_predictive=layout.sampled(prior[1]),
        observed_data=layout.observed(tasks),
        constant_data=layout.constant(tasks, taken={*sites, *predicted}),
        coords=layout.coords(coords),
        dims=layout.dims,
        attrs=_describe(posterior.inference),
    )


def prior_tree(
    learned_prior: "LearnedPrior",
    tasks: "Tasks",
    num_samples: int,
    coords: Mapping[str, Any] | None = None,
    dims: Dims | None = None,
) -> Any:
    """Exports what the learned prior says of tasks before their observations: prior and prior predictive.

    Args:
        learned_prior: The learned prior.
        tasks: Tasks whose inputs to predict at; their outputs, if there, go to `observed_data`.
        num_samples: S, draws.
        coords: As in `posterior_tree`.
        dims: As in `posterior_tree`.

    Returns:
        `InferenceData` or `DataTree` with the groups prior, prior_predictive, observed_data and
        constant_data; see `posterior_tree`.
    """
    outline = _Outline.of(learned_prior, tasks, single=False)
    latents, flat = _draw_prior(learned_prior, tasks, num_samples, outline)
    layout = _Layout(outline, dims)
    return to_tree(
        prior=layout.latent(latents),
        prior_predictive=layout.sampled(flat),
        observed_data=layout.observed(tasks),
        constant_data=layout.constant(tasks, taken={*latents, *flat}),
        coords=layout.coords(coords),
        dims=layout.dims,
        attrs=_describe(learned_prior.inference),
    )


def _draw_prior(
    learned_prior: "LearnedPrior", tasks: "Tasks", num_samples: int, outline: "_Outline"
) -> tuple[Arrays, Arrays]:
    """Latents and predictions before the observations, (S, T, ...) each."""
    sites = _with_tasks(learned_prior.sites(tasks, num_samples=num_samples), single=False)
    predicted = _with_tasks(learned_prior.predict(tasks, num_samples=num_samples), single=False)
    flat, per_task = _split(predicted, outline)
    return {**sites, **per_task}, flat


class _Outline(NamedTuple):
    """What is known of the tasks before anything is drawn.

    Attributes:
        observed: Observed site -> the key it observes, None if it observes something derived.
        constants: Keys that hold one value per task.
        names: Task names.
        mask: True where an observation is real, (T, N).
        single: Whether one task is shown without a task dimension.
        plates: Of each site, the plate that each dimension of its value in one task runs over, or None.
    """

    observed: Mapping[str, str | None]
    constants: frozenset[str]
    names: Sequence[str]
    mask: np.ndarray
    single: bool
    plates: Mapping[str, Sequence[str | None]]

    @classmethod
    def of(cls, learned_prior: "LearnedPrior", tasks: "Tasks", single: bool) -> "_Outline":
        first = next(iter(tasks.data.values()))
        mask = np.ones(first.shape[:2], dtype=bool) if tasks.mask is None else _as_numpy(tasks.mask)
        plates, observed = _find_plates(learned_prior, tasks), learned_prior.density.observed
        return cls(observed, frozenset(tasks.constants), tasks.names, mask, single, plates)

    def runs_over_rows(self, name: str, values: np.ndarray) -> bool:
        """Whether (S, T, ...) goes on with the observations of a task."""
        if self.observed.get(name) in self.constants:
            return False
        return values.ndim > 2 and values.shape[2] == self.mask.shape[1]


def _find_plates(learned_prior: "LearnedPrior", tasks: "Tasks") -> dict[str, list[str | None]]:
    """Of each site, the plate that each dimension of its value in one task runs over."""
    density, params = learned_prior.density, learned_prior.params
    task = one_task(as_task_data(replace(tasks, scaling=learned_prior.scaling))).data
    z = learned_prior.like.new_zeros(density.dim)
    with torch.no_grad():
        records = density.observe(z, params, density.without_outputs(task))
    found: dict[str, list[str | None]] = {}
    for name, record in records.items():
        num_batch = len(record.fn.batch_shape)
        found[name] = [None] * (num_batch + len(record.fn.event_shape))
        for dim, plate in record.plates:
            if -dim <= num_batch:
                found[name][num_batch + dim] = plate
    return found


class _Names:
    """Names of dimensions: the user's, else those of plates, else `VARIABLE_dim_0`.

    Args:
        given: The user's names of variables' own dimensions.
        plates: See `_Outline`.
    """

    def __init__(self, given: Dims | None, plates: Mapping[str, Sequence[str | None]]) -> None:
        self.given = dict(given or {})
        self.plates = plates
        self.dims: dict[str, list[str]] = {}
        self.lengths: dict[str, int] = {}
        self.num_own: dict[str, int] = {}

    def add(self, variable: str, first: list[str], shape: Sequence[int], num_skipped: int = 0) -> None:
        """Names a variable's dimensions: the first ones, and its own, of this shape.

        A variable's log-densities may have been named before, or be named later: they lack some of its dimensions.
        """
        if variable in self.dims and len(shape) <= self.num_own[variable]:
            return
        plates = dict(enumerate(self.plates.get(variable, ())[num_skipped:]))
        auto = [self._usable(plates.get(i), length) or f"{variable}_dim_{i}" for i, length in enumerate(shape)]
        own = [*self.given.get(variable, auto)]
        self.lengths |= dict(zip(own, shape, strict=False))
        self.dims[variable], self.num_own[variable] = [*first, *own[: len(shape)]], len(shape)

    def _usable(self, plate: str | None, length: int) -> str | None:
        free = plate not in _RESERVED and self.lengths.get(plate or "", length) == length
        return plate if free else None

    def check(self, coords: Mapping[str, Any]) -> None:
        """Raises ValueError where the user's names, or index values, fit no variable."""
        if unknown := sorted({*self.given} - {*self.dims}):
            raise ValueError(f"dims names {unknown[0]!r}, and there are {sorted(self.dims)}; write one of them")
        for variable, given in self.given.items():
            if isinstance(given, str) or len(given) != self.num_own[variable]:
                raise ValueError(
                    f"dims gives {variable!r} the dimensions {given!r}; it has {self.num_own[variable]} of its own, "
                    "after chain, draw and task or observation: list a name for each"
                )
            if taken := sorted({*given} & _RESERVED):
                raise ValueError(f"dims gives {variable!r} a dimension {taken[0]!r}, a name that is taken; rename it")
        for dim, values in coords.items():
            if self.lengths.get(dim) != len(values):
                raise ValueError(
                    f"coords gives {len(values)} values along {dim!r}; sites' own dimensions are {self.lengths}"
                )


class _Layout:
    """Gives arrays their place in the tree and names their dimensions.

    Args:
        outline: What is known of the tasks.
        dims: The user's names of sites' own dimensions.
    """

    def __init__(self, outline: _Outline, dims: Dims | None = None) -> None:
        self.outline = outline
        self.names = _Names(dims, outline.plates)

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of dimensions after (chain, draw), by variable."""
        return self.names.dims

    def coords(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """Names of tasks, the task and place of each observation, and the user's; to be called last."""
        self.names.check(given or {})
        names = np.asarray([str(name) for name in self.outline.names])
        labels = flatten_observations(self.outline.mask, self.outline.mask, self.outline.names, dim=_OBSERVATION)[1]
        return {"task": names, _TASK: names, **labels, **(given or {})}

    def latent(self, values: Arrays, num_chains: int = 1) -> Arrays:
        """(C S, T, ...) -> (C, S, T, ...), or (C, S, ...) for a single task."""
        single = self.outline.single
        for name, value in values.items():
            self.names.add(name, [] if single else ["task"], value.shape[2:])
        return {name: _in_chains(value[:, 0] if single else value, num_chains) for name, value in values.items()}

    def sampled(self, values: Arrays, num_chains: int = 1) -> Arrays:
        """(C S, T, N, ...) -> (C, S, num_real, ...); what holds one value per task keeps its task dimension."""
        found = {}
        for name, value in values.items():
            if self.outline.runs_over_rows(name, value):
                found[name] = _in_chains(self._flatten(name, value, 1), num_chains)
            else:
                self.names.add(name, [_TASK], value.shape[2:])
                found[name] = _in_chains(value, num_chains)
        return found

    def observed(self, tasks: "Tasks") -> Arrays:
        """What each site observed; sites that observe something derived from the data are left out."""
        found = {}
        for site, key in self.outline.observed.items():
            if key in tasks.data:
                found[site] = self._flatten(site, _as_numpy(tasks.data[key]))
            elif key in tasks.constants:
                found[site] = self._one_per_task(site, tasks.constants[key])
        return found

    def constant(self, tasks: "Tasks", taken: set[str]) -> Arrays:
        """Inputs and constants that are not themselves observed."""
        outputs = {*self.outline.observed.values(), *tasks.outputs}
        found = {}
        for key in [*tasks.data, *tasks.constants]:
            if key in outputs:
                continue
            name = f"input_{key}" if key in taken | _LABELS else key
            if key in tasks.data:
                found[name] = self._flatten(name, _as_numpy(tasks.data[key]))
            else:
                found[name] = self._one_per_task(name, tasks.constants[key])
        return found

    def _flatten(self, name: str, values: np.ndarray, num_leading: int = 0) -> np.ndarray:
        own = values.shape[num_leading + 2 :]
        self.names.add(name, [_OBSERVATION], own, num_skipped=1)
        return flatten_observations(values, self.outline.mask, event_ndim=len(own))[0]

    def _one_per_task(self, name: str, value: "Tensor") -> np.ndarray:
        self.names.add(name, [_TASK], value.shape[1:])
        return _as_numpy(value)


def _score_prior(posterior: "Posterior", num_samples: int) -> dict[str, "Tensor"]:
    """Log densities of the latents under the prior, (S, ...), or (S, T, ...)."""
    z, density, params = posterior.draws(num_samples), posterior.density, posterior.params
    data = posterior.as_task_data(posterior.tasks).data

    def of_task(z: "Tensor", task: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
        return vmap(lambda one: density.log_priors(one, params, task))(z)

    with torch.no_grad():
        found = vmap(of_task)(posterior.task_first(z), data)
    return {name: value[0] if posterior.single else value.transpose(0, 1) for name, value in found.items()}


def _score(posterior: "Posterior", tasks: "Tasks", num_samples: int) -> Arrays:
    """Log-likelihoods of the sites whose outputs are given; of those observing something derived, if all are."""
    given = {*tasks.data, *tasks.constants}
    complete = given.issuperset(posterior.template.outputs)
    kept = {site for site, key in posterior.density.observed.items() if (complete if key is None else key in given)}
    if not kept:
        return {}
    scores = posterior.log_likelihood(posterior.template.fill_outputs(tasks), num_samples=num_samples)
    return {k: v for k, v in _with_tasks(scores, posterior.single).items() if k in kept}


def _split(predicted: Arrays, outline: _Outline) -> tuple[Arrays, Arrays]:
    """Predictions, and deterministic sites that hold one value per task and so belong to the latents."""
    flat = {k: v for k, v in predicted.items() if k in outline.observed or outline.runs_over_rows(k, v)}
    return flat, {k: v for k, v in predicted.items() if k not in flat}


def _rename_totals(scores: Arrays, predicted: Arrays, outline: _Outline) -> Arrays:
    def rename(name: str, value: np.ndarray) -> str:
        rows = name in predicted and outline.runs_over_rows(name, predicted[name])  # a pyro.factor predicts nothing
        total = rows and not outline.runs_over_rows(name, value)
        return f"{name}_per_task" if total else name

    return {rename(name, value): value for name, value in scores.items()}


def _with_tasks(draws: Mapping[str, "Tensor"], single: bool) -> Arrays:
    """(S, ...) of a single task and (S, T, ...) of a batch alike as (S, T, ...)."""
    return {name: _as_numpy(value)[:, None] if single else _as_numpy(value) for name, value in draws.items()}


def _in_chains(value: np.ndarray, num_chains: int) -> np.ndarray:
    """(C S, ...), chain by chain -> (C, S, ...)."""
    return value.reshape(num_chains, -1, *value.shape[1:])


def _as_numpy(value: "Tensor") -> np.ndarray:
    return value.detach().cpu().numpy()


def _describe(inference: "Inference") -> dict[str, Any]:
    from bmaml_ppl import __version__

    return {
        "inference_library": "bmaml_ppl",
        "inference_library_version": __version__,
        "inference": inference.name,
        "num_particles": inference.num_particles,
    }
