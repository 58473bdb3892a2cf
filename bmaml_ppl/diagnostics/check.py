"""One call that answers whether a posterior can be believed, and why."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bmaml_ppl.checks import check_count
from bmaml_ppl.diagnostics import findings, fit
from bmaml_ppl.diagnostics.evidence import Evidence, Finding

if TYPE_CHECKING:
    from bmaml_ppl.posterior import Posterior
    from bmaml_ppl.tasks import Tasks

__all__ = ["Verdict", "check"]

_QUESTIONS: tuple[Callable[[Evidence], Finding | list[Finding] | None], ...] = (
    findings.find_finite,
    findings.find_spread,
    findings.find_curvature,
    findings.find_khat,
    findings.find_chains,
    findings.find_restarts,
    fit.find_conflict,
    fit.find_fit,
    fit.find_coverage,
)
_SHOWN_TASKS = 4
_DRAW_FLOATS = 2**26


@dataclass(frozen=True)
class Verdict:
    """What `check` found. `print(verdict)` is a table for people, `verdict.to_dict()` JSON values for programs.

    Attributes:
        findings: The answer to each question.
        about: The posterior, in words.
        num_tasks: Tasks that were looked at.
    """

    findings: tuple[Finding, ...]
    about: str
    num_tasks: int

    @property
    def believe(self) -> bool:
        """Whether no question failed; those that could not be asked do not count against."""
        return not any(found.level == "fail" for found in self.findings)

    def __bool__(self) -> bool:
        return self.believe

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name, or the only one whose name begins so."""
        matching = [found for found in self.findings if found.name.startswith(name)]
        exact = [found for found in matching if found.name == name]
        if len(exact or matching) != 1:
            raise KeyError(f"no one finding is named {name!r}; there are {[found.name for found in self.findings]}")
        return (exact or matching)[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: `believe`, `about`, `num_tasks`, and `findings`, a list of dicts."""
        rows = [{**found._asdict(), "tasks": list(found.tasks)} for found in self.findings]
        return {"believe": self.believe, "about": self.about, "num_tasks": self.num_tasks, "findings": rows}

    def __str__(self) -> str:
        return "\n".join([self.headline, self.about, "", *self._rows()])

    def __repr__(self) -> str:
        return f"Verdict({self.headline})"

    @property
    def headline(self) -> str:
        """The verdict in one sentence."""
        counts = {level: sum(f.level == level for f in self.findings) for level in ("fail", "warn", "unknown")}
        words = {"fail": "failed", "warn": "with a warning", "unknown": "not asked"}
        said = ", ".join(f"{count} {words[level]}" for level, count in counts.items() if count) or "all passed"
        return f"{'believe it' if self.believe else 'do not believe it'}: {said}, of {len(self.findings)} questions"

    def _rows(self) -> Iterator[str]:
        width = max(len(found.name) for found in self.findings)
        for found in self.findings:
            value = "" if found.value is None else f"{found.value:.3g}"
            yield f"{found.level:<8}{found.name:<{width}}  {value:>8}  {found.limit}"
            if found.level != "pass":
                yield f"{'':8}{found.reason}"
            if found.tasks and self.num_tasks > 1:
                more = len(found.tasks) - _SHOWN_TASKS
                listed = ", ".join(found.tasks[:_SHOWN_TASKS]) + (f" and {more} more" if more > 0 else "")
                yield f"{'':8}in {len(found.tasks)} of {self.num_tasks} tasks: {listed}"


def check(posterior: "Posterior", query: "Tasks | None" = None, /, *, num_samples: int = 1000, **data: Any) -> Verdict:
    """Asks whether a posterior can be believed.

    Questions: are draws finite; do they lie where the density says, as far apart as it says (by curvature, or by
    importance weights); did the optimiser arrive, is the curvature that of a maximum, is Pareto's k-hat small
    (`laplace`); do chains mix (`hmc`, `nuts`); do restarts agree; does the posterior lie where the prior expects it;
    are the data as likely as data that the model draws; are held-out observations covered. Above 128 latents chains
    and restarts are compared by their log densities. A posterior can pass all of them and be wrong:
    simulation-based calibration (`bmaml_ppl.diagnostics.sbc`) asks whether the inference is right on average.

    Args:
        posterior: Adapted tasks; adapt with `num_restarts=4` to let restarts be compared.
        query: The same tasks with observations that were not adapted to, in the user's units.
        num_samples: S, draws a task; fewer, and at least 200, where tasks times latents are so many that draws would
            not fit into a quarter of a gigabyte.
        **data: The same as keyword tensors.

    Returns:
        The verdict; true where it is to be believed.

    Raises:
        TypeError: If something else than a posterior of tasks is given.
        ValueError: If the query is of other tasks, holds the data adapted to, or does not fit the model.
    """
    check_count("num_samples", num_samples, least=100)
    if not hasattr(posterior, "read_tasks"):
        raise TypeError(f"got a {type(posterior).__name__}; give what prior.adapt(...) or nuts(...) returns")
    held_out = None if query is None and not data else posterior.read_tasks(query, data, need_outputs=True)
    if held_out is not None and _is_adapted_to(posterior.tasks, held_out):
        raise ValueError("the query holds the observations that were adapted to; give others, or none")
    room = _DRAW_FLOATS // (len(posterior) * posterior.density.dim)
    evidence = Evidence(posterior, held_out, min(num_samples, max(room, 200)))
    found: list[Finding] = []
    for question in _QUESTIONS:
        answer = question(evidence)
        found.extend(answer if isinstance(answer, list) else [] if answer is None else [answer])
    return Verdict(tuple(found), repr(posterior), len(posterior))


def _is_adapted_to(seen: "Tasks", query: "Tasks") -> bool:
    return all(key in query.data and torch.equal(value, query.data[key]) for key, value in seen.data.items())
