"""Questions about an inference: did it find the posterior of the model as it is?"""

import torch

from bmaml_ppl.adaptation import TaskData, one_task, seeded
from bmaml_ppl.diagnostics.curvature import describe_curvature
from bmaml_ppl.diagnostics.evidence import Evidence, Finding
from bmaml_ppl.diagnostics.export import ess, pareto_khat, rhat
from bmaml_ppl.posterior import RESTART_STREAM

__all__ = ["find_chains", "find_curvature", "find_finite", "find_khat", "find_restarts", "find_spread"]


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


def find_spread(evidence: Evidence) -> Finding | None:
    r"""Whether draws are as far apart as the density says, by Stein's identity; None where k-hat or R-hat say more.

    .. math:: r_s^2 = -\frac{1}{|s|} \sum_{d \in s} E[(z_d - \bar z_d) \, \partial_d \log p(z, D)] = 1

    for every latent site s under the posterior, whatever its shape; for a Gaussian r is the ratio of standard
    deviations.

    Reference:
        Liu, Lee and Jordan (2016), A Kernelized Stein Discrepancy for Goodness-of-fit Tests, equation 3.
    """
    posterior = evidence.posterior
    if "log_q" in evidence.stats or posterior.inference.num_draws:
        return None
    with torch.no_grad():
        scores = evidence.adapter.score(evidence.draws, posterior.params, evidence.batch)
    away = evidence.draws - evidence.draws.mean(1, keepdim=True)
    each = -(away * scores).mean(1)
    sites = posterior.density.sites.values()
    ratio = torch.stack([each[:, site.slice].mean(1) for site in sites], 1).clamp_min(0.0).sqrt()
    worst = torch.where(ratio.log().abs().amax(1, keepdim=True) == ratio.log().abs(), ratio, 0.0).amax(1)
    found = evidence.grade(
        "spread of particles",
        (ratio.clamp_min(1e-9).log().abs()).amax(1),
        0.223,
        0.693,
        "0.8 to 1.25 of the posterior's sd, fails beyond 0.5 to 2",
        (
            "draws are as far apart as the density says",
            "draws are closer together, or farther apart, than the density says: more particles or steps, laplace or "
            "hmc",
        ),
    )
    return found._replace(value=worst[worst.clamp_min(1e-9).log().abs().argmax()].item())


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
        0.5,
        0.7,
        "<= 0.5, fails above 0.7",
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
    moved = draws.movedim(0, 2).double().cpu().numpy()
    effective = torch.as_tensor(ess(moved)).amin(-1)
    enough = 100.0 * draws.shape[1]
    divergent = torch.cat([state.diverging for state in posterior.states], 1).double().mean((1, 2))
    found = [
        evidence.grade(
            "effective sample size",
            enough / effective,
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


def _compare_chains(evidence: Evidence, name: str, draws: object, warn: float, fail: float, remedy: str) -> Finding:
    values = torch.as_tensor(rhat(draws))  # type: ignore[arg-type]
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
    if posterior.inference.num_draws:
        return None
    if len(posterior.states) == 1:
        return Finding(name, "unknown", None, limit, "there is one adaptation: write prior.adapt(..., num_restarts=4)")
    if _begin_alike(evidence):
        reason = "all restarts began at the same place, so that their agreement says nothing: "
        return Finding(name, "unknown", None, limit, reason + 'start at draws from the prior (init="prior")')
    each = evidence.num_samples // len(posterior.states)
    drawn = evidence.posterior.draws(each * len(posterior.states))
    drawn = drawn.unsqueeze(1) if posterior.single else drawn
    chains = drawn.reshape(len(posterior.states), each, *drawn.shape[1:]).double().cpu().numpy()
    return _compare_chains(evidence, name, chains, 1.05, 1.2, "num_steps")._replace(limit=limit)


def _begin_alike(evidence: Evidence) -> bool:
    """Whether two restarts of the first task have the same start."""
    first, starts = one_task(evidence.batch), []
    task = TaskData({k: v[None] for k, v in first.data.items()}, None if first.mask is None else first.mask[None])
    for restart in (0, 1):
        seed = evidence.posterior.seed + restart * RESTART_STREAM
        with torch.no_grad(), seeded(seed, evidence.draws.device):
            starts.append(evidence.adapter.begin(evidence.posterior.params, task).particles)
    return torch.allclose(*starts)
