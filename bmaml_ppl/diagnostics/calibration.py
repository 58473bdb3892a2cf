"""What simulation-based calibration found: ranks, and whether they are uniform."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmaml_ppl.diagnostics.uniformity import (
    Histogram,
    ecdf_band,
    ecdf_cuts,
    ecdf_difference,
    ecdf_p_values,
    rank_histogram,
)

__all__ = ["Calibration", "DifferenceBand"]

_MOST_FAILED = 0.01


class DifferenceBand(NamedTuple):
    """ECDF of ranks minus that of uniform ones, for a plot.

    Attributes:
        probability: Where it is looked at, k / (S+1), (K,).
        difference: (K,).
        lower: Lower bound, (K,): uniform ranks stay within the bounds everywhere with probability `level`.
        upper: Upper bound, (K,).
        level: Probability of the band.
    """

    probability: Tensor
    difference: Tensor
    lower: Tensor
    upper: Tensor
    level: float


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Ranks of simulated truths among posterior draws, and tests of their uniformity.

    Attributes:
        ranks: Of each simulation that did not fail and each quantity, (N, Q), integers in 0..S.
        names: Q names.
        num_draws: S.
        num_failed: Simulations with a value that is not finite, left out of the ranks.
        inference: Name of the algorithm.
        effective_draws: For chains, the effective number of draws of the coordinate that mixes worst, median over
            simulations; ranks need at least `num_draws`. None without chains.
        alpha: Family-wise error of `passed`.
    """

    ranks: Tensor
    names: tuple[str, ...]
    num_draws: int
    num_failed: int
    inference: str
    effective_draws: float | None = None
    alpha: float = 0.05

    def p_values(self) -> dict[str, float]:
        """P-value of each quantity's ranks; see `bmaml_ppl.diagnostics.uniformity.ecdf_p_values`."""
        return dict(self._p_values)

    @cached_property
    def _p_values(self) -> dict[str, float]:
        return dict(zip(self.names, ecdf_p_values(self.ranks, self.num_draws).tolist(), strict=True))

    @property
    def passed(self) -> bool:
        """Whether no p-value is below `alpha / Q` (Bonferroni), and at most one simulation in a hundred failed.

        Right posteriors fail with a probability of at most `alpha`.
        """
        few = self.num_failed <= _MOST_FAILED * (self.num_failed + len(self.ranks))
        return few and min(self.p_values().values()) > self._each_alpha

    def ecdf(self, name: str, level: float | None = None) -> DifferenceBand:
        """ECDF difference of one quantity, with its simultaneous band.

        Args:
            name: One of `names`.
            level: Probability of the band; None takes that of `passed`, `1 - alpha / Q`.

        Raises:
            KeyError: If there is no such quantity.
        """
        level = 1 - self._each_alpha if level is None else level
        ranks = self.ranks[:, self._find(name)]
        lower, upper = ecdf_band(len(ranks), self.num_draws, level)
        probability = ecdf_cuts(self.num_draws).double() / (self.num_draws + 1)
        return DifferenceBand(probability, ecdf_difference(ranks, self.num_draws), lower, upper, level)

    def histogram(self, name: str, num_bins: int | None = None, level: float = 0.99) -> Histogram:
        """Rank histogram of one quantity; see `bmaml_ppl.diagnostics.uniformity.rank_histogram`."""
        return rank_histogram(self.ranks[:, self._find(name)], self.num_draws, num_bins, level)

    def pit(self, seed: int = 0) -> Tensor:
        """Ranks spread evenly over their cells, `(rank + u) / (S+1)`: exactly uniform for right posteriors, (N, Q)."""
        generator = torch.Generator().manual_seed(seed)
        jitter = torch.rand(self.ranks.shape, generator=generator, dtype=torch.float64)
        return (self.ranks + jitter) / (self.num_draws + 1)

    def to_arviz(self) -> Any:
        """The PIT values as ArviZ's group `prior_sbc`, for `arviz.plot_ecdf_pit` (ArviZ 1.x)."""
        from bmaml_ppl.diagnostics.export import to_tree

        values = self.pit().numpy()
        attrs = {"inference": self.inference, "num_draws": self.num_draws, "num_failed": self.num_failed}
        return to_tree(prior_sbc={name: values[None, :, q] for q, name in enumerate(self.names)}, attrs=attrs)

    def to_dict(self) -> dict[str, Any]:
        """Verdict, p-values and what is wrong, as JSON values."""
        return {
            "passed": self.passed,
            "inference": self.inference,
            "num_simulations": len(self.ranks) + self.num_failed,
            "num_failed": self.num_failed,
            "num_draws": self.num_draws,
            "effective_draws": self.effective_draws,
            "alpha": self.alpha,
            "p_values": self.p_values(),
            "verdicts": self.verdicts(),
        }

    def verdicts(self) -> dict[str, str]:
        """In a word, by quantity: "ok", or how draws differ most from the truth.

        "too narrow" and "too wide" compare the ranks' variance with that of uniform ones, "too low" and "too high"
        their mean, whichever is more standard errors away.
        """
        place = (self.ranks.double() + 0.5) / (self.num_draws + 1) - 0.5
        shift = place.mean(0) * (12 * len(place)) ** 0.5
        variance = (1 - 1 / (self.num_draws + 1) ** 2) / 12
        spread = (place.square().mean(0) - variance) * (180 * len(place)) ** 0.5
        words = []
        for p, mean, width in zip(self.p_values().values(), shift.tolist(), spread.tolist(), strict=True):
            if p > self._each_alpha:
                words.append("ok")
            elif abs(width) >= abs(mean):
                words.append("too narrow" if width > 0 else "too wide")
            else:
                words.append("too low" if mean > 0 else "too high")
        return dict(zip(self.names, words, strict=True))

    def __str__(self) -> str:
        width = max(len("quantity"), *(len(name) for name in self.names))
        verdicts = self.verdicts()
        lines = [
            f"simulation-based calibration of {self.inference}: {len(self.ranks) + self.num_failed} simulations, "
            f"{self.num_failed} failed, ranks among {self.num_draws} draws",
            f"{'quantity':<{width}}  p-value  draws are",
        ]
        lines += [f"{name:<{width}}  {p:7.2g}  {verdicts[name]}" for name, p in self.p_values().items()]
        if self.effective_draws is not None and self.effective_draws < self.num_draws:
            lines.append(
                f"chains gave {self.effective_draws:.0f} effective draws, fewer than are ranked: more draws a chain, "
                "or num_draws below that, or ranks will crowd at both ends"
            )
        verdict = "passed" if self.passed else "FAILED"
        return "\n".join([*lines, f"{verdict} at a family-wise error of {self.alpha:g}"])

    def __repr__(self) -> str:
        return f"Calibration({self.inference}; {len(self.ranks)} simulations; {len(self.names)} quantities)"

    @property
    def _each_alpha(self) -> float:
        return self.alpha / len(self.names)

    def _find(self, name: str) -> int:
        if name not in self.names:
            raise KeyError(f"no quantity {name!r}; choose one of {list(self.names)}")
        return self.names.index(name)
