"""What the sinusoid study does, and how much of it."""

from dataclasses import dataclass
from math import inf

__all__ = ["QUICK", "SinusoidSettings"]


@dataclass(frozen=True)
class SinusoidSettings:
    """What the study does.

    Attributes:
        parts: Which of "pictures", "figure1", "methods" and "ablations", and in which order.
        shots: K, observations that a test task adapts to.
        tasks: |T|, training tasks of Figure 1; `inf` is as many as the run sees.
        methods: Rows of the table of methods, keys of `RECIPES`; None takes all.
        seeds: Of Figure 1's cells; the other parts take the first.
        num_test_tasks: Test tasks, the same for all.
        num_query: Points of each test task that are predicted.
        effort: Share of each recipe's meta-steps; 1 is the study.
        workers: Processes side by side, one thread each.
        device: Where to learn.
    """

    parts: tuple[str, ...] = ("pictures", "methods", "figure1", "ablations")
    shots: tuple[int, ...] = (5, 10, 20)
    tasks: tuple[float, ...] = (100, 1000, inf)
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    num_test_tasks: int = 1000
    num_query: int = 100
    effort: float = 1.0
    workers: int = 2
    device: str = "auto"


QUICK = SinusoidSettings(shots=(5,), tasks=(100,), seeds=(0,), num_test_tasks=50, num_query=50, effort=0.001)
"""A miniature of a few minutes: all parts, with a thousandth of the meta-steps."""
