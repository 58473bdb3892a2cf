"""Simulation-based calibration: does the inference find the truth, when tasks are simulated from the learned prior?

Truths z* drawn from the model's prior, observations drawn given z*, and draws from a right posterior of z given the
observations are exchangeable: the rank of z* among S draws is uniform on 0..S, for every function of z (Talts et al.
2018). All tasks are simulated at once and adapted to together, so that thousands cost little more than one.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from bmaml_ppl.adaptation import (
    Adapter,
    TaskData,
    as_task_data,
    check_inference,
    even_parts,
    one_task,
    take_tasks,
)
from bmaml_ppl.checks import check_count
from bmaml_ppl.diagnostics.calibration import Calibration
from bmaml_ppl.generators import seeded
from bmaml_ppl.learned import LearnedPrior, choose_chunk_size
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference

__all__ = ["Quantity", "simulation_based_calibration"]

Quantity = Callable[[dict[str, Tensor]], Tensor]
"""A scalar function of the latent sites of one draw, on their supports; `vmap` carries it over draws and tasks."""

_NUM_DRAWS = 99
_CHUNK_FLOATS = 2**24
# Truths must not share random numbers with the chains' starts, nor tasks of one chunk with those of another.
_STREAM = 4_000_037


class _Ranked(NamedTuple):
    """Ranks of one chunk of T tasks.

    Attributes:
        ranks: (T, Q).
        finite: Where all values were finite, (T,).
        values: Of the truths, (T, Q).
        effective: Effective draws of each task's chains, (T,), NaN without chains.
    """

    ranks: Tensor
    finite: Tensor
    values: Tensor
    effective: Tensor


def simulation_based_calibration(
    prior: LearnedPrior,
    tasks: Tasks,
    *,
    num_simulations: int = 1000,
    inference: Inference | None = None,
    num_draws: int | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    chunk_size: int | None = None,
    alpha: float = 0.05,
    seed: int = 0,
) -> Calibration:
    """Simulates tasks from the learned prior, adapts to them, and ranks the truth among the posterior's draws.

    Ranked are every coordinate of every latent site on its support (`coef[0]`), the log joint density (`log_joint`,
    which also sees whether the posterior used the data: a posterior equal to the prior passes in every coordinate),
    and custom quantities. The inference is judged, and the code of the model's density; not whether the model fits
    data.

    Chains are thinned to `num_draws` evenly spaced draws, which should be no more than their effective number of
    draws (`Calibration.effective_draws`): ranks among correlated draws crowd at both ends. Particles that are laid out
    evenly rather than drawn (SVGD) leave half as many truths beyond either end, 1 / 2M instead of 1 / (M+1), and with
    many simulations look too wide for that alone.

    Args:
        prior: The learned prior, at whose parameters z* is drawn; a free start is a start only and says nothing here.
        tasks: Whose inputs, constants and masks simulated tasks take in turn; their outputs are not looked at.
        num_simulations: N.
        inference: Another algorithm than the one learned with, as in `LearnedPrior.adapt`. An `Inference` changed by
            hand goes into the prior: `replace(prior, inference=...)`.
        num_draws: S. None takes 99 from chains, and from posteriors with a density; particles count once each.
        quantities: Custom quantities by name.
        chunk_size: Tasks adapted together; None bounds the memory.
        alpha: Family-wise error of `Calibration.passed`.
        seed: Seed of simulations, starts and draws.

    Returns:
        The ranks, with tests, bands and histograms.

    Raises:
        TypeError: If something else than Tasks is given, or a number is not an integer.
        ValueError: If a site's prior cannot be drawn from, the model observes what cannot be simulated, more draws
            are asked for than there are, a quantity is no scalar or has another's name, or every simulation failed.

    References:
        Talts et al. (2018), Validating Bayesian inference algorithms with simulation-based calibration, algorithm 1.
        Modrak et al. (2023), Simulation-based calibration checking for Bayesian computation: the choice of test
        quantities shapes sensitivity, for the joint density as a quantity.
    """
    check_count("num_simulations", num_simulations, least=2)
    adapter = replace(prior.bind(inference), randomness="different")
    num_draws = _choose_draws(adapter.inference, num_draws)
    batch = _take_inputs(prior, tasks)
    if inference is not None:
        check_inference(adapter.inference, prior.density, prior.params, one_task(batch))
    size = _choose_chunk(adapter, batch, num_draws, num_simulations) if chunk_size is None else chunk_size
    check_count("chunk_size", size, least=1)
    parts = even_parts(num_simulations, size)
    if adapter.inference.num_draws or len(parts) > 1:
        adapter = replace(adapter, mode="recorded")
    truth, batch = _simulate(prior, batch, num_simulations, seed)
    quantities = dict(quantities or {})
    names = _name_quantities(prior, one_task(batch), truth[0], quantities)
    found = []
    for chunk, positions in enumerate(parts):
        rows = positions.to(truth.device)
        part = take_tasks(batch, rows)
        found.append(
            _rank_chunk(prior, adapter, truth[rows], part, num_draws, quantities, seed + _STREAM * (chunk + 1))
        )
    return _gather(found, names, num_simulations, num_draws, adapter.inference.name, alpha)


def _choose_draws(inference: Inference, num_draws: int | None) -> int:
    chains = inference.num_particles * inference.num_draws
    most = chains or (None if inference.log_prob is not None else inference.num_particles)
    if num_draws is None:
        return _NUM_DRAWS if most is None or chains else most
    check_count("num_draws", num_draws, least=1)
    if most is not None and num_draws > most:
        raise ValueError(
            f"num_draws={num_draws}, but {inference.name} gives {most} draws a task, and repeated ones are not "
            "draws; write fewer, or more particles, chains or draws of a chain"
        )
    return num_draws


def _take_inputs(prior: LearnedPrior, tasks: Tasks) -> TaskData:
    """The tasks as the model sees them, with any values where outputs are."""
    density, template = prior.density, prior.template
    if missing := [name for name, key in density.observed.items() if key is None]:
        raise ValueError(
            f"observed site {missing[0]!r} is a pyro.factor or observes a value computed from data, which cannot be "
            "simulated; write obs=... with one of the model's arguments as it is"
        )
    given = template.fill_outputs(template.to_tasks(tasks, {}, need_outputs=False, like=prior.like)[0])
    if given.mask is not None:
        density.refuse_unmaskable(given.data)
    return as_task_data(replace(given, scaling=prior.scaling))


def _choose_chunk(adapter: Adapter, batch: TaskData, num_draws: int, num_simulations: int) -> int:
    rows = max(value[0].numel() for value in batch.data.values())
    evaluated = _CHUNK_FLOATS // ((num_draws + 1) * 8 * (rows + adapter.density.dim))
    return max(1, min(choose_chunk_size(adapter, batch), evaluated, num_simulations))


def _simulate(prior: LearnedPrior, batch: TaskData, num_simulations: int, seed: int) -> tuple[Tensor, TaskData]:
    """Truths z*, (N, D), and tasks with observations drawn given them, at the inputs of the batch in turn."""
    density, params = prior.density, prior.params
    turn = torch.arange(num_simulations, device=prior.device) % len(next(iter(batch.data.values())))
    data = {key: value[turn] for key, value in batch.data.items()}
    mask = None if batch.mask is None else batch.mask[turn]
    with torch.no_grad(), seeded(seed, prior.device):
        try:
            truth = vmap(lambda task: density.draw_prior(params, task), randomness="different")(data)
        except NotImplementedError as error:
            raise ValueError(f"truths cannot be drawn from the model's prior ({error}); give every site one") from error
        drawn = vmap(lambda z, task: density.simulate(z, params, task), randomness="different")(truth, data)
    for site, key in density.observed.items():
        assert key is not None
        like, value = data[key], drawn[site]
        if value.shape != like.shape:
            raise ValueError(
                f"observed site {site!r} draws values of shape {tuple(value.shape[1:])} for data {key!r} of shape "
                f"{tuple(like.shape[1:])}; give the data the shape of the site"
            )
        data[key] = value.to(like.dtype)
        if mask is not None and key not in density.constants:
            data[key] = torch.where(mask.reshape(*mask.shape, *(1,) * (like.ndim - 2)), data[key], like)
    return truth, TaskData(data, mask)


def _name_quantities(
    prior: LearnedPrior, task: TaskData, z: Tensor, quantities: Mapping[str, Quantity]
) -> tuple[str, ...]:
    sites = prior.density.constrain(z, prior.params, task.data)
    names = [name for site, value in sites.items() for name in _name_coordinates(site, value.shape)]
    for name, quantity in quantities.items():
        shape = tuple(quantity(sites).shape)
        if shape:
            raise ValueError(f"quantity {name!r} has shape {shape}, and is to be a scalar; write one for each number")
    every = (*names, *quantities, "log_joint")
    if twice := sorted({name for name in every if every.count(name) > 1}):
        raise ValueError(f"{twice[0]!r} names two quantities; rename yours, names are {[*names, 'log_joint']}")
    return every


def _name_coordinates(site: str, shape: torch.Size) -> list[str]:
    if not shape:
        return [site]
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).tolist()
    return [f"{site}[{','.join(map(str, place))}]" for place in places]


@torch.no_grad()
def _rank_chunk(
    prior: LearnedPrior,
    adapter: Adapter,
    truth: Tensor,
    tasks: TaskData,
    num_draws: int,
    quantities: Mapping[str, Quantity],
    seed: int,
) -> _Ranked:
    inference = adapter.inference
    state = prior.run(adapter, tasks, inference.num_steps, seed)
    with seeded(seed + 1, prior.device):
        if inference.num_draws or inference.log_prob is not None:
            sample = vmap(lambda s: inference.sample(s, num_draws, None), randomness="different")
            z = sample(state)
        else:
            z = state.particles[:, :num_draws]
        values = _evaluate(adapter, torch.cat([truth.unsqueeze(1), z], 1), prior, tasks, quantities)
        truths, draws = values[:, :1], values[:, 1:]
        below, equal = (draws < truths).sum(1), (draws == truths).sum(1)
        within = torch.rand(below.shape, device=below.device)
    ranks = below + (within * (equal + 1)).long().minimum(equal)
    effective = _count_effective(state.draws) if inference.num_draws else truth.new_full((len(truth),), torch.nan)
    return _Ranked(ranks, values.isfinite().flatten(1).all(1), truths[:, 0], effective)


def _evaluate(
    adapter: Adapter, z: Tensor, prior: LearnedPrior, tasks: TaskData, quantities: Mapping[str, Quantity]
) -> Tensor:
    """Every quantity at every draw: (T, S, D) -> (T, S, Q)."""

    def at_one(z: Tensor, data: dict[str, Tensor]) -> Tensor:
        sites = adapter.density.constrain(z, prior.params, data)
        parts = [value.reshape(-1).to(z.dtype) for value in sites.values()]
        return torch.cat([*parts, *(quantity(sites).reshape(1).to(z.dtype) for quantity in quantities.values())])

    values = vmap(lambda z, data: vmap(lambda one: at_one(one, data))(z))(z, tasks.data)
    return torch.cat([values, adapter.log_joint(z, prior.params, tasks).unsqueeze(-1)], -1)


def _count_effective(draws: Tensor) -> Tensor:
    """Effective number of draws of the coordinate that mixes worst, from chains (T, M, S, D): (T,)."""
    if draws.shape[2] < 4:
        return draws.new_full((len(draws),), torch.nan)
    return effective_sample_size(draws, chain_dim=1, sample_dim=2).nan_to_num(0.0).amin(-1)


def _gather(
    found: list[_Ranked], names: tuple[str, ...], num_simulations: int, num_draws: int, inference: str, alpha: float
) -> Calibration:
    every: Any = tree_map(lambda *parts: torch.cat(parts)[:num_simulations].cpu(), *found)
    if not bool(every.finite.any()):
        raise ValueError(
            f"all {num_simulations} simulations failed: draws of {inference}, or the model's values at them, were "
            "not finite; look at one with prior.adapt"
        )
    values = every.values[every.finite]
    # Entries that a support fixes, such as zeros of a Cholesky factor, say nothing.
    varies = (values != values[0]).any(0)
    return Calibration(
        ranks=every.ranks[every.finite][:, varies],
        names=tuple(name for name, varied in zip(names, varies.tolist(), strict=True) if varied),
        num_draws=num_draws,
        num_failed=int((~every.finite).sum()),
        inference=inference,
        effective_draws=None if bool(every.effective.isnan().all()) else float(every.effective[every.finite].median()),
        alpha=alpha,
    )
