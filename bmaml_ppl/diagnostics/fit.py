"""Questions about a model: does the posterior agree with the prior, the data seen and the data held out?"""

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.adaptation import TaskData, over_tasks
from bmaml_ppl.diagnostics.evidence import Evidence, Finding, Level
from bmaml_ppl.generators import seeded
from bmaml_ppl.types import Tensors

__all__ = ["find_conflict", "find_coverage", "find_fit"]

_CHECK_STREAM = 4_000_037
_LEVELS = tuple(torch.linspace(0.05, 0.95, 20).tolist())


def find_coverage(evidence: Evidence) -> list[Finding]:
    """Held-out observations: how often they are inside their central 90 % interval, and whether they are below every
    quantile as often as its level says; two findings an observed column.

    Both are held against the same numbers of data that the posterior predicts, task by task, so that observations of
    a task that err together count for what they are worth. p-values are exact where the prediction is right.
    """
    if evidence.query is None:
        reason = "no observations were held out: write check(posterior, query) with observations not adapted to"
        return [Finding("coverage of held-out data", "unknown", None, "0.90", reason)]
    predicted = evidence.posterior.predict(evidence.query, num_samples=evidence.num_samples)
    found = []
    for site, key in evidence.posterior.density.observed.items():
        if key not in evidence.query.data:
            continue
        target, mask = evidence.query.data[key], evidence.query.mask
        real = torch.ones_like(target, dtype=torch.bool)
        if mask is not None:
            real = real & mask.reshape(mask.shape + (1,) * (target.ndim - 2))
        draws = predicted[site].unsqueeze(1) if evidence.posterior.single else predicted[site]
        place = _place_among(draws, target, evidence.posterior.seed).flatten(2)
        found.extend(_judge_places(evidence, key, place, real.flatten(1)))
    return found


def _place_among(draws: Tensor, target: Tensor, seed: int) -> Tensor:
    """Place in (0, 1) of the target and of each draw among all of them, ties at random: (S+1, T, ...).

    Draws of a task keep together, and are paired with draws of other tasks at random.
    """
    generator = torch.Generator().manual_seed(seed)
    every = torch.cat([target.unsqueeze(0).to(draws), draws]).cpu()
    shuffled = torch.rand(every.shape, generator=generator).argsort(0)
    order = shuffled.gather(0, every.gather(0, shuffled).argsort(dim=0, stable=True))
    rank = torch.arange(len(every)).reshape(-1, *(1,) * (every.ndim - 1)).expand_as(every)
    place = (torch.empty_like(rank).scatter(0, order, rank) + 0.5) / len(every)
    turn = (
        torch.rand(draws.shape[:2], generator=generator).argsort(0).reshape(*draws.shape[:2], *(1,) * (draws.ndim - 2))
    )
    return torch.cat([place[:1], place[1:].gather(0, turn.expand_as(draws))])


def _judge_places(evidence: Evidence, key: str, place: Tensor, real: Tensor) -> list[Finding]:
    inside = ((place - 0.5).abs() <= 0.45) & real.cpu()
    share = inside.sum((1, 2)) / real.sum().item()
    covered, apart = share[0].item(), (share - share[1:].mean()).abs()
    below = torch.stack([((place < q) & real.cpu()).sum((1, 2)) / real.sum().item() - q for q in _LEVELS])
    error = below.square().mean(0).sqrt()
    p_values = [((value[1:] >= value[0] - 1e-9).sum().item() + 1) / len(value) for value in (apart, error)]
    low = (inside[0].sum(1) / real.sum(1).clamp_min(1).cpu()).double()
    width = "narrow" if covered < 0.9 else "wide"
    return [
        _judge(
            f"coverage of held-out {key!r}",
            covered,
            (abs(covered - 0.9) > 0.05, abs(covered - 0.9) > 0.02, p_values[0]),
            "0.90; fails beyond 0.05 with p <= 0.005",
            (f"{covered:.1%} of {real.sum().item()} held-out values are inside", f"intervals are too {width}"),
            evidence.worst(1 - low, low < 0.7),
        ),
        _judge(
            f"calibration of held-out {key!r}",
            error[0].item(),
            (error[0].item() > 0.06, error[0].item() > 0.03, p_values[1]),
            "0; fails above 0.06 with p <= 0.005",
            (
                "held-out values are below each quantile about as often as they should be",
                "predictive probabilities are off, look at plot_calibration: the noise has another shape, or the curve "
                "does not fit",
            ),
            (),
        ),
    ]


def _judge(
    name: str, value: float, size: tuple[bool, bool, float], limit: str, said: tuple[str, str], tasks: tuple[str, ...]
) -> Finding:
    """A finding of an effect that is large or notable, and its p-value."""
    large, notable, p = size
    level: Level = "fail" if large and p <= 0.005 else "warn" if notable and p <= 0.02 else "pass"
    reason = said[0] if level == "pass" else f"{said[1]} (p = {p:.2g})"
    return Finding(name, level, value, limit, reason, () if level == "pass" else tasks)


def find_conflict(evidence: Evidence) -> Finding:
    r"""Prior-data conflict: how far each coordinate of a task moved from the prior's mean, in units it should move.

    .. math:: t = (m_{post} - m_{prior}) / \sqrt{v_{prior} - v_{post}}

    t is standard normal where prior and likelihood are normal and the prior is right.

    Reference:
        Evans and Moshonov (2006), Checking for Prior-Data Conflict, section 3.
    """
    name, limit = "prior-data conflict", "p >= 0.001 (Bonferroni over coordinates and tasks)"
    posterior = evidence.posterior
    try:
        with torch.no_grad(), seeded(posterior.seed + _CHECK_STREAM, evidence.draws.device):
            before = posterior.adapter.draw_prior(posterior.params, evidence.batch, evidence.num_samples)
    except (NotImplementedError, RuntimeError, ValueError):
        return Finding(name, "unknown", None, limit, "the model's prior cannot be drawn from")
    apart = before.var(1) - evidence.draws.var(1)
    moved = (evidence.draws.mean(1) - before.mean(1)).abs() * apart.clamp_min(0.05 * before.var(1)).rsqrt()
    tail = torch.special.erfc(moved.double() / 2**0.5).amin(1) * moved.shape[1] * len(moved)
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


def find_fit(evidence: Evidence) -> Finding:
    """Whether data that the model draws are as likely under it as what was adapted to: a posterior predictive p-value
    of all tasks together.

    The p-value is conservative, since a posterior follows its data. Held-out data would be compared with draws that
    know their own latents, and look unlikely under a right model: `find_coverage` asks of those.

    Reference:
        Gelman, Meng and Stern (1996), Posterior Predictive Assessment of Model Fitness, section 2.3.
    """
    posterior = evidence.posterior
    name, limit = "fit of the likelihood", "p > 0.02, fails at 0.002"
    if None in posterior.density.observed.values():
        reason = "the model observes what cannot be simulated, a pyro.factor or a value computed from data"
        return Finding(name, "unknown", None, limit, reason)
    with torch.no_grad(), seeded(posterior.seed + 2 * _CHECK_STREAM, evidence.draws.device):
        observed, replicated = _compare_likelihoods(evidence, evidence.batch)
    if not observed.isfinite().all():
        return Finding(name, "unknown", None, limit, "observations have no density under some draw")
    each = _two_sided(observed, replicated)
    pooled = _two_sided(observed.sum(0, keepdim=True), replicated.sum(0, keepdim=True)).item()
    level: Level = "fail" if pooled <= 2e-3 else "warn" if pooled <= 0.02 else "pass"
    told = "as likely as" if level == "pass" else f"{_compare(observed, replicated)} likely than"
    reason = f"adapted-to data are {told} what the model draws"
    if level != "pass":
        reason += ": the likelihood does not fit (its shape, its noise, or the curve)"
    flagged = () if level == "pass" else evidence.worst(-each, each < 0.01)
    return Finding(name, level, pooled, limit, reason, flagged)


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

    def of_task(task: TaskData, z: Tensor) -> tuple[Tensor, Tensor]:
        return vmap(lambda one: of_draw(one, task), randomness="different")(z)

    found: tuple[Tensor, Tensor] = over_tasks(of_task, batch, evidence.draws, randomness="different")
    return found


def _total(values: Tensors) -> Tensor:
    return torch.stack([value.sum() for value in values.values()]).sum()


def _two_sided(observed: Tensor, replicated: Tensor) -> Tensor:
    """p-value of each row, (T, S) -> (T,), never below 2 / (S + 1)."""
    below = ((replicated <= observed).sum(1) + 1) / (observed.shape[1] + 1)
    above = ((replicated >= observed).sum(1) + 1) / (observed.shape[1] + 1)
    return (2 * torch.minimum(below, above)).clamp_max(1.0)
