"""Questions about an inference: did it find the posterior of the model as it is?"""

from math import log

import torch
from torch import Tensor

from bmaml_ppl.adaptation import TaskData, one_task, over_tasks
from bmaml_ppl.diagnostics.collapse import Collapse, describe_particles, same_starts
from bmaml_ppl.diagnostics.curvature import describe_curvature
from bmaml_ppl.diagnostics.evidence import Evidence, Finding
from bmaml_ppl.diagnostics.export import pareto_khat
from bmaml_ppl.diagnostics.mixing import ess, rhat
from bmaml_ppl.generators import seeded
from bmaml_ppl.posterior import RESTART_STREAM
from bmaml_ppl.task_density import TaskDensity

__all__ = ["find_chains", "find_curvature", "find_finite", "find_khat", "find_restarts", "find_spread"]

_MOVED = ("map_estimate", "svgd")
"""Algorithms whose particles are the posterior."""

_ENOUGH = 100
_LARGE = 128
"""Latents above which chains are compared by their log densities: weights of a network can be exchanged for others."""

_CLOUD = 200
_CHUNK_FLOATS = 2**24


def find_finite(evidence: Evidence) -> Finding:
    """Whether draws and their log densities are numbers."""
    broken = ~(evidence.draws.isfinite().all(-1) & evidence.stats["lp"].isfinite())
    return evidence.grade(
        "finite draws",
        broken.double().mean(1),
        0.0,
        0.0,
        "no draw of zero or undefined density",
        (
            "all draws have a finite log density",
            "draws lie where the density is zero or undefined: check supports, or take shorter steps",
        ),
    )


def find_spread(evidence: Evidence) -> list[Finding]:
    """Whether particles, or draws of an approximation, lie where the density says and as far apart; nothing of Markov
    chains. Of several restarts the worst counts."""
    posterior = evidence.posterior
    if posterior.inference.num_draws:
        return []
    if "log_q" in evidence.stats:
        return _weigh(evidence)
    if posterior.inference.name in _MOVED:
        clouds = [state.particles for state in posterior.states]
    else:
        clouds = [evidence.draws[:, :: max(evidence.num_samples // _CLOUD, 1)]]
    if clouds[0].shape[1] == 1:
        reason = "one point has no spread, intervals hold the noise alone: svgd, laplace or hmc"
        return [Finding("spread", "fail", 0.0, "a posterior", reason, posterior.names)]
    found = [_describe(evidence, cloud) for cloud in clouds]
    return _judge_moments(
        evidence,
        torch.cat([each.spread for each in found], 1),
        torch.cat([each.shift for each in found], 1),
        (0.8, 0.5),
    )


def _weigh(evidence: Evidence) -> list[Finding]:
    """Moments of draws beside those of the same draws with importance weights, or beside the density's curvature where
    few of the weights count."""
    weight = torch.softmax((evidence.stats["lp"] - evidence.stats["log_q"]).double(), 1).unsqueeze(-1)
    z = evidence.draws.double()
    mean = (weight * z).sum(1, keepdim=True)
    variance = (weight * (z - mean).square()).sum(1)
    sites = evidence.posterior.density.sites.values()
    ratio = z.var(1) / variance.clamp_min(torch.finfo(z.dtype).tiny)
    moved = (z.mean(1) - mean.squeeze(1)).square() / variance.clamp_min(torch.finfo(z.dtype).tiny)
    spread, shift = (
        torch.stack([value[:, site.slice].mean(1) for site in sites], 1).sqrt() for value in (ratio, moved)
    )
    broad = (1 / weight.square().sum((1, 2)) > _ENOUGH).unsqueeze(1)
    if not bool(broad.all()):  # a few weights that outweigh the others say nothing of moments
        local = _describe(evidence, evidence.draws[:, :: max(evidence.num_samples // _CLOUD, 1)])
        spread, shift = torch.where(broad, spread, local.spread), torch.where(broad, shift, local.shift)
    return _judge_moments(evidence, spread, shift, (0.75, 0.6))


def _judge_moments(evidence: Evidence, spread: Tensor, shift: Tensor, least: tuple[float, float]) -> list[Finding]:
    """Findings on the ratio of standard deviations and on the shift of means of each task and site, (T, K) each; NaN
    where it is not known."""
    warn, fail = least
    away = spread.clamp_min(1e-9).log().abs().nan_to_num(nan=0.0)
    found = evidence.grade(
        "spread",
        away.amax(1),
        -log(warn),
        -log(fail),
        f"{warn} to {1 / warn:.3g} of the posterior's sd, fails beyond {fail} to {1 / fail:.3g}",
        (
            "draws are as far apart as the density says",
            "draws are closer together, or farther apart, than the density says: more particles or steps, or hmc",
        ),
    )
    findings = [found._replace(value=spread.flatten()[away.flatten().argmax()].item())]
    if not shift.isnan().all():
        findings.append(
            evidence.grade(
                "location",
                shift.nan_to_num(nan=0.0).amax(1),
                0.35,
                0.8,
                "mean within 0.35 posterior sd, fails beyond 0.8",
                ("draws lie where the density says", "draws lie aside of the density: more steps, or hmc"),
            )
        )
    return findings


def _describe(evidence: Evidence, cloud: Tensor) -> Collapse:
    """`describe_particles` of every task, (T, M, D), some at a time."""
    posterior = evidence.posterior

    def of_task(task: TaskData, z: Tensor) -> Collapse:
        density = TaskDensity(posterior.density, posterior.params, task.data, task.mask)
        return describe_particles(density, z, posterior.density.sites)

    size = max(1, _CHUNK_FLOATS // (cloud.shape[1] * cloud.shape[2] ** 2))
    with torch.no_grad():
        found: Collapse = over_tasks(of_task, evidence.batch, cloud, chunk_size=size)
    return found


def find_curvature(evidence: Evidence) -> list[Finding]:
    """Laplace: whether the optimiser arrived and the curvature there is that of a maximum."""
    sites = evidence.posterior.density.sites
    found = [described for state in evidence.posterior.states if (described := describe_curvature(state, sites))]
    if not found:
        return []
    repair, decrement = (torch.stack([each[name] for each in found]).amax(0) for name in ("repair", "decrement"))  # type: ignore[misc]
    return [
        evidence.grade(
            "optimum reached",
            decrement,
            1e-2,
            1.0,
            "<= 0.01 nats below the optimum",
            (
                "every task is at its optimum",
                "the Gaussian is not centred at a maximum: more steps, or several starts (num_particles=5)",
            ),
        ),
        evidence.grade(
            "curvature",
            repair,
            0.0,
            1e-2,
            "positive definite",
            (
                "the density curves downward in every direction",
                "some direction curves upward and its spread is a guess: several starts (num_particles=5), or hmc",
            ),
        ),
    ]


def find_khat(evidence: Evidence) -> Finding | None:
    """Pareto's k of the importance weights of an approximation whose density is known.

    Reference:
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?, section 2.
    """
    if "log_q" not in evidence.stats:
        return None
    ratios = evidence.stats["lp"] - evidence.stats["log_q"]
    khat = torch.as_tensor(pareto_khat(ratios.double().cpu().numpy()))
    return evidence.grade(
        "importance weights (k-hat)",
        khat,
        0.7,
        1.0,
        "<= 0.7, fails above 1",
        (
            "the Gaussian is close enough to the posterior to be corrected by importance weights",
            "the posterior has heavier tails or another shape than the Gaussian: use hmc, or another parametrisation",
        ),
    )


def find_chains(evidence: Evidence) -> list[Finding]:
    """Markov chains: agreement, effective size, divergences; worst coordinate of each task.

    Reference:
        Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Rank-Normalization, Folding, and Localization.
    """
    posterior = evidence.posterior
    if not posterior.inference.num_draws:
        return []
    draws = torch.cat([state.draws for state in posterior.states], 1)
    if draws.shape[-1] > _LARGE:
        draws = torch.cat([state.log_density for state in posterior.states], 1).unsqueeze(-1)
    moved = draws.movedim(0, 2)
    effective = ess(moved).amin(-1)
    enough = 100.0 * draws.shape[1]
    divergent = torch.cat([state.diverging for state in posterior.states], 1).double().mean((1, 2))
    found = [
        evidence.grade(
            "effective sample size",
            enough / effective.clamp_min(1e-9),
            1.0,
            4.0,
            f">= {enough:.0f}",
            ("enough independent draws for quantiles", "too few independent draws: raise num_draws"),
        ),
        evidence.grade(
            "divergent transitions",
            divergent,
            0.0,
            0.01,
            "none, fails above 1 %",
            (
                "no transition diverged",
                "the density bends more than the steps can follow: raise target_accept and num_leapfrog, or rewrite "
                "the model non-centred",
            ),
        ),
    ]
    found[0] = found[0]._replace(value=effective.min().item())
    if draws.shape[1] > 1:
        found.insert(0, _compare_chains(evidence, "agreement of chains (R-hat)", moved, 1.01, 1.05, "num_warmup"))
    return found


def _compare_chains(evidence: Evidence, name: str, draws: Tensor, warn: float, fail: float, remedy: str) -> Finding:
    values = rhat(draws)
    return evidence.grade(
        name,
        values.amax(-1),
        warn,
        fail,
        f"<= {warn}",
        (
            "what began apart ended together",
            f"what began apart did not end together, so that no single answer stands: raise {remedy}, or look for "
            "several modes",
        ),
    )


def find_restarts(evidence: Evidence) -> Finding | None:
    """Whether adaptations from starts of their own agree; None for Markov chains, which are restarts themselves."""
    posterior = evidence.posterior
    name, limit = "agreement of restarts (R-hat)", "<= 1.05, fails above 1.2"
    if posterior.inference.num_draws or posterior.inference.name == "map_estimate":
        return None
    if len(posterior.states) == 1:
        return Finding(name, "unknown", None, limit, "there is one adaptation: write prior.adapt(..., num_restarts=4)")
    if _begin_alike(evidence):
        reason = "restarts began at the same place, so that their agreement says nothing: "
        advice = "write laplace(num_particles=5)" if "log_q" in evidence.stats else 'start with init="prior"'
        return Finding(name, "unknown", None, limit, f"{reason}{advice}, at draws from the prior")
    each = max(evidence.num_samples // len(posterior.states), 50)
    drawn = evidence.posterior.draws(each * len(posterior.states))
    drawn = drawn.unsqueeze(1) if posterior.single else drawn
    chains = drawn.reshape(len(posterior.states), each, *drawn.shape[1:])
    if chains.shape[-1] > _LARGE:
        density = posterior.sample_stats(each * len(posterior.states))["lp"]
        chains = density.reshape(len(posterior.states), each, -1, 1)
    return _compare_chains(evidence, name, chains, 1.05, 1.2, "num_steps")._replace(limit=limit)


def _begin_alike(evidence: Evidence) -> bool:
    """Whether any two restarts of the first task had the same start."""
    first, starts = one_task(evidence.batch), []
    task = TaskData({k: v[None] for k, v in first.data.items()}, None if first.mask is None else first.mask[None])
    for restart in range(len(evidence.posterior.states)):
        seed = evidence.posterior.seed + restart * RESTART_STREAM
        with torch.no_grad(), seeded(seed, evidence.draws.device):
            starts.append(evidence.posterior.adapter.begin(evidence.posterior.params, task).particles[0])
    return bool(same_starts(starts))
