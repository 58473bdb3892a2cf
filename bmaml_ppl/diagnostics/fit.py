"""Questions about a model: does the posterior agree with the prior, the data seen and the data held out?"""

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.adaptation import TaskData, seeded
from bmaml_ppl.diagnostics import scores
from bmaml_ppl.diagnostics.evidence import Evidence, Finding, Level
from bmaml_ppl.types import Tensors

__all__ = ["find_conflict", "find_coverage", "find_fit"]

_CHECK_STREAM = 4_000_037


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
        if key not in evidence.query.data:
            continue
        target = evidence.query.data[key]
        draws = predicted[site].unsqueeze(1) if evidence.posterior.single else predicted[site]
        inside, real = _count_inside(draws, target, evidence.query.mask, evidence.posterior.seed)
        found.append(_judge_coverage(evidence, key, inside, real, limit))
    return found


def _count_inside(draws: Tensor, target: Tensor, mask: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """Observations inside their interval and observations, of each task, (T,) each.

    A count or a label, which is equal to many draws, is inside with the probability that is left to its rank.
    """
    real = torch.ones_like(target, dtype=torch.bool)
    if mask is not None:
        real = real & mask.reshape(mask.shape + (1,) * (target.ndim - 2))
    place = scores.pit(draws, target, real, generator=torch.Generator().manual_seed(seed))
    inside = ((place - 0.5).abs() <= 0.45) & real
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
