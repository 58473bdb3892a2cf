"""The mixture of sinusoids and lines, on which an ambiguous task has a posterior with two modes."""

from functools import partial
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from bmaml_ppl.datasets.sinusoid import SinusoidTasks
from bmaml_ppl.tasks import Tasks

__all__ = ["AmbiguousTask", "ambiguous_task", "sine_line"]

_RANGES = {"amplitude": (0.1, 5.0), "phase": (0.0, pi), "slope": (-3.0, 3.0), "intercept": (-3.0, 3.0)}


def sine_line(num_tasks: int, num_observations: int, *, seed: int, noise: float = 0.3) -> SinusoidTasks:
    r"""Draws PLATIPUS's tasks, sinusoids and lines in turn: the even ones y = A sin(x - b) + e, the odd ones
    y = s x + c + e.

    A ~ U[0.1, 5], b ~ U[0, pi], s ~ U[-3, 3], c ~ U[-3, 3], x ~ U[-5, 5], e ~ N(0, noise^2). Names tell the
    family: `sine 0`, `line 1`, ... `parameters["is_line"]` is 1 for lines and 0 for sinusoids, and each family's own
    parameters are drawn for all tasks. One seed gives the same curves whatever `num_observations`.

    Args:
        num_tasks: T, half of each family; an odd number has one sinusoid more.
        num_observations: N, per task.
        seed: Of a generator of its own; the global one is not touched.
        noise: Its standard deviation, in units of y.

    Raises:
        ValueError: A size is below 1, or the noise is negative.

    Reference:
        Finn, Xu and Levine (2018), Probabilistic Model-Agnostic Meta-Learning, section 6.
    """
    for name, size in (("num_tasks", num_tasks), ("num_observations", num_observations)):
        if size < 1:
            raise ValueError(f"{name} is {size}; draw at least 1")
    _check_noise(noise)
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: _uniform(num_tasks, *limits, generator) for name, limits in _RANGES.items()}
    parameters["is_line"] = (torch.arange(num_tasks) % 2).to(parameters["slope"])
    x = _uniform((num_tasks, num_observations), -5.0, 5.0, generator)
    curve = partial(_clean, parameters)
    y = curve(x) + noise * torch.randn(x.shape, generator=generator)
    names = tuple(f"{('sine', 'line')[i % 2]} {i}" for i in range(num_tasks))
    return SinusoidTasks(Tasks({"x": x, "y": y}, names=names, outputs=("y",)), curve, parameters)


def _check_noise(noise: float) -> None:
    if noise < 0:
        raise ValueError(f"noise={noise} is a standard deviation; give 0 or more")


def _uniform(shape: int | tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _clean(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    p = {name: value[:, None] for name, value in parameters.items()}
    line = p["slope"] * x + p["intercept"]
    return torch.where(p["is_line"] > 0, line, p["amplitude"] * torch.sin(x - p["phase"]))


class AmbiguousTask(NamedTuple):
    """A few observations that a sinusoid and a line of the two families explain equally well.

    Attributes:
        support: One task with columns x and y, (1, K).
        sine: Amplitude and phase of the sinusoid, in the range of its family.
        line: Slope and intercept of the line, in the range of its family.
    """

    support: Tasks
    sine: dict[str, float]
    line: dict[str, float]


def ambiguous_task(
    num_observations: int = 5, *, amplitude: float = 2.0, phase: float = 1.0, width: float = 0.8
) -> AmbiguousTask:
    r"""Makes a support set that a sinusoid and a line explain equally well, and that disagree everywhere else.

    Around its zero at b a sinusoid is close to its tangent, :math:`A \sin(x - b) \approx A (x - b)`. K points evenly
    spaced over [b - width, b + width] lie half-way between the two, without noise, so that each misses them by
    at most about A width^3 / 12: .085 by default, far below the family's noise of .3. The families give such a
    pair nearly equal prior density as well, 1 / (4.9 pi A) a unit of value and slope to 1/36, so that by default
    the exact posterior probability of a sinusoid is close to one half.

    Args:
        num_observations: K.
        amplitude: A, in units of y, also the line's slope: 0.1 to 3.
        phase: b, 0 to pi, with A b at most 3: the line's intercept is -A b.
        width: Half the length of the interval, in units of x.

    Raises:
        ValueError: K is below 1, a curve is outside its family, or the two part by more than the noise.
    """
    if num_observations < 1:
        raise ValueError(f"num_observations is {num_observations}; give at least 1")
    if not (0.1 <= amplitude <= 3 and 0 <= phase <= pi and amplitude * phase <= 3):
        raise ValueError(
            f"amplitude={amplitude}, phase={phase} is outside a family; amplitudes are 0.1 to 3, phases 0 to pi, and "
            "their product, the line's intercept, at most 3"
        )
    if not width > 0 or amplitude * width**3 / 12 > 0.3:
        raise ValueError(f"width={width} parts the two curves by more than the noise of 0.3, or is not positive")
    x = phase + width * torch.linspace(-1, 1, num_observations)[None]
    line = {"slope": amplitude, "intercept": -amplitude * phase}
    y = 0.5 * (amplitude * torch.sin(x - phase) + line["slope"] * x + line["intercept"])
    tasks = Tasks({"x": x, "y": y}, names=("ambiguous",), outputs=("y",))
    return AmbiguousTask(tasks, {"amplitude": amplitude, "phase": phase}, line)
