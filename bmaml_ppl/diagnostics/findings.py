"""Single questions about a posterior, each answered by a finding: what was measured, against what, and what to do."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.adaptation import Adapter, TaskData, as_task_data, one_task, seeded
from bmaml_ppl.diagnostics import scores
from bmaml_ppl.diagnostics.curvature import describe_curvature
from bmaml_ppl.diagnostics.export import ess, pareto_khat, rhat
from bmaml_ppl.posterior import RESTART_STREAM
from bmaml_ppl.types import Tensors

if TYPE_CHECKING:
    from bmaml_ppl.posterior import Posterior
    from bmaml_ppl.tasks import Tasks

__all__ = [
    "Evidence",
    "Finding",
    "find_chains",
    "find_conflict",
    "find_coverage",
    "find_curvature",
    "find_finite",
    "find_fit",
    "find_khat",
    "find_restarts",
    "find_spread",
]

Level = Literal["pass", "warn", "fail", "unknown"]

_SHARE = 0.05
"""Of many tasks some are beyond any limit by chance: a share above this fails, a single one below it warns."""

_CHECK_STREAM = 4_000_037


class Finding(NamedTuple):
    """The answer to one question.

    Attributes:
        name: Of the question.
        level: "pass", "warn", "fail", or "unknown" where it could not be asked.
        value: What was measured, of the worst task, or None.
        limit: What passes, in words.
        reason: What it means, and what to do where it is no pass.
        tasks: Names of the tasks it concerns, the worst first.
    """

    name: str
    level: Level
    value: float | None
    limit: str
    reason: str
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What the questions are asked of.

    Attributes:
        posterior: Adapted tasks.
        query: The same tasks with observations not adapted to, in the user's units, or None.
        num_samples: S, draws.
    """

    posterior: "Posterior"
    query: "Tasks | None"
    num_samples: int

    @cached_property
    def draws(self) -> Tensor:
        """Unconstrained draws, (T, S, D)."""
        return self._task_first(self.posterior.draws(self.num_samples))

    @cached_property
    def stats(self) -> dict[str, Tensor]:
        """`Posterior.sample_stats`, (T, S) each."""
        return {k: self._task_first(v) for k, v in self.posterior.sample_stats(self.num_samples).items()}

    @cached_property
    def batch(self) -> TaskData:
        """What was adapted to, as the model sees it."""
        return as_task_data(replace(self.posterior.tasks, scaling=self.posterior.scaling))

    @property
    def adapter(self) -> Adapter:
        """The inference bound to the density."""
        posterior = self.posterior
        return Adapter(posterior.density, posterior.inference, posterior.prior.start)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return self.posterior.names

    def _task_first(self, value: Tensor) -> Tensor:
        return value.unsqueeze(0) if self.posterior.single else value.transpose(0, 1)

    def worst(self, values: Tensor, beyond: Tensor) -> tuple[str, ...]:
        """Names of the tasks beyond a limit, in falling order of values, (T,) each."""
        order = values.nan_to_num(nan=torch.inf).argsort(descending=True).tolist()
        return tuple(self.names[i] for i in order if beyond[i])

    def grade(
        self, name: str, values: Tensor, warn: float, fail: float, limit: str, reasons: tuple[str, str]
    ) -> Finding:
        """A finding of one number a task, the larger the worse; `reasons` are those of a pass and of the rest."""
        concerned = ~(values <= warn)
        failed = (~(values <= fail)).double().mean() > _SHARE
        level: Level = "fail" if failed else "warn" if concerned.any() else "pass"
        worst = values.nan_to_num(nan=torch.inf).max().item()
        return Finding(name, level, worst, limit, reasons[level != "pass"], self.worst(values, concerned))


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


def find_coverage(evidence: Evidence) -> list[Finding]:
    """How often held-out observations are inside their central 90 % interval, one finding an observed column.

    The standard error counts tasks, not rows: those of a task err together.
    """
    limit = "0.90 +- (0.02 + 2 standard errors), fails beyond 0.05 + 2"
    if evidence.query is None:
        reason = "no observations were held out: write check(posterior, query) with observations not adapted to"
        return [Finding("coverage of held-out data", "unknown", None, limit, reason)]
    predicted = evidence.posterior.predict(evidence.query, num_samples=evidence.num_samples)
    found = []
    for site, key in evidence.posterior.density.observed.items():
        if key not in evidence.query.data or _is_discrete(evidence, site):
            continue
        target = evidence.query.data[key]
        draws = predicted[site].unsqueeze(1) if evidence.posterior.single else predicted[site]
        inside, real = _count_inside(draws, target, evidence.query.mask)
        found.append(_judge_coverage(evidence, key, inside, real, limit))
    return found


def _is_discrete(evidence: Evidence, site: str) -> bool:
    posterior, task = evidence.posterior, one_task(evidence.batch)
    record = posterior.density.observe(evidence.draws[0, 0], posterior.params, task.data, task.mask)[site]
    return bool(getattr(record.fn.support, "is_discrete", False))


def _count_inside(draws: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Observations inside their interval and observations, of each task, (T,) each."""
    lower, upper = scores.interval_bounds(draws, 0.9)
    real = torch.ones_like(target, dtype=torch.bool)
    if mask is not None:
        real = real & mask.reshape(mask.shape + (1,) * (target.ndim - 2))
    inside = (lower <= target) & (target <= upper) & real
    return inside.flatten(1).sum(1).double(), real.flatten(1).sum(1).double()


def _judge_coverage(evidence: Evidence, key: str, inside: Tensor, real: Tensor, limit: str) -> Finding:
    covered = (inside.sum() / real.sum()).item()
    missed = inside - covered * real
    error = max(missed.square().sum().sqrt().item(), (0.09 * real.sum().item()) ** 0.5) / real.sum().item()
    excess = abs(covered - 0.9) - 2 * error
    level: Level = "fail" if excess > 0.05 else "warn" if excess > 0.02 else "pass"
    said = {
        "pass": f"{covered:.1%} of {real.sum():.0f} held-out values are inside (standard error {error:.1%})",
        "warn": f"{covered:.1%} are inside (standard error {error:.1%}): intervals are "
        + ("too narrow" if covered < 0.9 else "too wide"),
    }
    low = inside / real.clamp_min(1)
    return Finding(
        f"coverage of held-out {key!r}",
        level,
        covered,
        limit,
        said["pass" if level == "pass" else "warn"],
        () if level == "pass" else evidence.worst(1 - low, low < 0.7),
    )


def find_conflict(evidence: Evidence) -> Finding:
    r"""Prior-data conflict: how far each coordinate of a task moved from the prior's mean, in units it should move.

    .. math:: t = (m_{post} - m_{prior}) / \sqrt{v_{prior} - v_{post}}

    t is standard normal where prior and likelihood are normal and the prior is right.

    Reference:
        Evans and Moshonov (2006), Checking for Prior-Data Conflict, section 3.
    """
    name, limit = "prior-data conflict", "p >= 0.001 (Bonferroni over coordinates)"
    posterior = evidence.posterior
    try:
        with torch.no_grad(), seeded(posterior.seed + _CHECK_STREAM, evidence.draws.device):
            before = evidence.adapter.draw_prior(posterior.params, evidence.batch, evidence.num_samples)
    except (NotImplementedError, RuntimeError, ValueError):
        return Finding(name, "unknown", None, limit, "the model's prior cannot be drawn from")
    apart = before.var(1) - evidence.draws.var(1)
    moved = (evidence.draws.mean(1) - before.mean(1)).abs() * apart.clamp_min(0.05 * before.var(1)).rsqrt()
    tail = torch.special.erfc(moved.double() / 2**0.5).amin(1) * moved.shape[1]
    found = evidence.grade(
        name,
        -tail.clamp(1e-300, 1).log10(),
        3.0,
        torch.inf,
        limit,
        (
            "tasks lie where the learned prior expects them",
            "tasks lie where the learned prior hardly reaches: they differ from those it was learned from, or its "
            "tails are too thin",
        ),
    )
    return found._replace(value=tail.min().clamp_max(1.0).item())


def find_fit(evidence: Evidence) -> Finding | None:
    """Whether data that the model draws are as likely under it as what was adapted to: a posterior predictive p-value
    of all tasks together.

    The p-value is conservative, since a posterior follows its data. Held-out data would be compared with draws that
    know their own latents, and look unlikely under a right model: `find_coverage` asks of those.

    Reference:
        Gelman, Meng and Stern (1996), Posterior Predictive Assessment of Model Fitness, section 2.3.
    """
    posterior = evidence.posterior
    if None in posterior.density.observed.values():
        return None
    with torch.no_grad(), seeded(posterior.seed + 2 * _CHECK_STREAM, evidence.draws.device):
        observed, replicated = _compare_likelihoods(evidence, evidence.batch)
    if not observed.isfinite().all():
        return None
    each = _two_sided(observed, replicated)
    pooled = _two_sided(observed.sum(0, keepdim=True), replicated.sum(0, keepdim=True)).item()
    level: Level = "fail" if pooled <= 2e-3 else "warn" if pooled <= 0.02 else "pass"
    told = "as likely as" if level == "pass" else f"{_compare(observed, replicated)} likely than"
    reason = f"adapted-to data are {told} what the model draws"
    if level != "pass":
        reason += ": the likelihood does not fit (its shape, its noise, or the curve)"
    flagged = () if level == "pass" else evidence.worst(-each, each < 0.01)
    return Finding("fit of the likelihood", level, pooled, "p > 0.02, fails at 0.002", reason, flagged)


def _compare(observed: Tensor, replicated: Tensor) -> str:
    return "less" if (observed.sum(0) < replicated.sum(0)).double().mean() > 0.5 else "more"


def _compare_likelihoods(evidence: Evidence, batch: TaskData) -> tuple[Tensor, Tensor]:
    """Log-likelihood of the observations and of as many drawn ones, under each draw of the latents: (T, S) each."""
    posterior = evidence.posterior
    density, params, outputs = posterior.density, posterior.params, posterior.density.observed

    def of_draw(z: Tensor, task: TaskData) -> tuple[Tensor, Tensor]:
        drawn = density.simulate(z, params, task.data)
        shown = {**task.data, **{key: drawn[site] for site, key in outputs.items() if key is not None}}
        given, made = (density.log_likelihood(z, params, data, task.mask) for data in (task.data, shown))
        return _total(given), _total(made)

    def of_task(z: Tensor, data: dict[str, Tensor], mask: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return vmap(lambda one: of_draw(one, TaskData(data, mask.get("mask"))), randomness="different")(z)

    mask = {} if batch.mask is None else {"mask": batch.mask}
    found: tuple[Tensor, Tensor] = vmap(of_task, randomness="different")(evidence.draws, batch.data, mask)
    return found


def _total(values: Tensors) -> Tensor:
    return torch.stack([value.sum() for value in values.values()]).sum()


def _two_sided(observed: Tensor, replicated: Tensor) -> Tensor:
    """p-value of each row, (T, S) -> (T,), never below 2 / (S + 1)."""
    below = ((replicated <= observed).sum(1) + 1) / (observed.shape[1] + 1)
    above = ((replicated >= observed).sum(1) + 1) / (observed.shape[1] + 1)
    return (2 * torch.minimum(below, above)).clamp_max(1.0)
