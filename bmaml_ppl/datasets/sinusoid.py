"""The sinusoid families of the literature, each with its clean curve."""

from collections.abc import Callable
from functools import partial
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from bmaml_ppl.tasks import Tasks

__all__ = ["SinusoidTasks", "sine_offset", "sinusoid", "sinusoid_maml"]


class SinusoidTasks(NamedTuple):
    """Tasks with columns x and y `(T, N)`, and what made them.

    `curve` maps x `(T, N')` to the clean y `(T, N')` of the same tasks. `parameters` holds the truth, each
    `(T,)`; it is kept out of `tasks.constants` so that no model sees it.
    """

    tasks: Tasks
    curve: Callable[[Tensor], Tensor]
    parameters: dict[str, Tensor]


def sinusoid(num_tasks: int, num_observations: int, *, seed: int, noise_factor: float = 0.01) -> SinusoidTasks:
    """Draws Bayesian MAML's tasks: y = A sin(w x - b) + e.

    A ~ U[0.1, 5], w ~ U[0.5, 2], b ~ U[0, 2 pi], x ~ U[-5, 5], e ~ N(0, (noise_factor A)^2). As released in
    jsikyoon/bmaml, data_generator.py. One seed gives the same curves whatever `num_observations`.

    Args:
        num_tasks: T.
        num_observations: N, per task.
        seed: Of a generator of its own; the global one is not touched.
        noise_factor: Noise standard deviation in units of the amplitude.

    Raises:
        ValueError: A size is below 1, or the noise is negative.

    References:
        Yoon et al. (2018), Bayesian Model-Agnostic Meta-Learning, section 5.1.
    """
    ranges = {"amplitude": (0.1, 5.0), "frequency": (0.5, 2.0), "phase": (0.0, 2 * pi)}
    parameters, generator = _draw_parameters(ranges, num_tasks, seed)
    noise = noise_factor * parameters["amplitude"]
    return _observe(parameters, noise, num_observations, generator)


def sinusoid_maml(num_tasks: int, num_observations: int, *, seed: int) -> SinusoidTasks:
    """Draws MAML's tasks: y = A sin(x - b), without noise.

    A ~ U[0.1, 5], b ~ U[0, pi], x ~ U[-5, 5]. As released in cbfinn/maml, data_generator.py. Arguments and
    errors as in `sinusoid`.

    References:
        Finn et al. (2017), Model-Agnostic Meta-Learning, section 5.1.
    """
    parameters, generator = _draw_parameters({"amplitude": (0.1, 5.0), "phase": (0.0, pi)}, num_tasks, seed)
    parameters = {**parameters, "frequency": torch.ones(num_tasks)}
    return _observe(parameters, torch.zeros(num_tasks), num_observations, generator)


def sine_offset(num_tasks: int, num_observations: int, *, seed: int, noise_sd: float = 0.1) -> SinusoidTasks:
    """Draws tasks with three shape parameters and a common noise: y = a sin(b x) + c + e.

    a ~ U[0.1, 5], b ~ U[0.5, 2], c ~ U[-2, 2], x ~ U[-5, 5], e ~ N(0, noise_sd^2). The ranges are this
    library's own. Arguments and errors as in `sinusoid`; `noise_sd` is in units of y.
    """
    ranges = {"amplitude": (0.1, 5.0), "frequency": (0.5, 2.0), "offset": (-2.0, 2.0)}
    parameters, generator = _draw_parameters(ranges, num_tasks, seed)
    return _observe(parameters, torch.full((num_tasks,), noise_sd), num_observations, generator)


def _draw_parameters(
    ranges: dict[str, tuple[float, float]], num_tasks: int, seed: int
) -> tuple[dict[str, Tensor], torch.Generator]:
    if num_tasks < 1:
        raise ValueError(f"num_tasks is {num_tasks}; draw at least 1 task")
    generator = torch.Generator().manual_seed(seed)
    draw = {
        name: low + (high - low) * torch.rand(num_tasks, generator=generator) for name, (low, high) in ranges.items()
    }
    return draw, generator


def _sine(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    a, w = parameters["amplitude"][:, None], parameters["frequency"][:, None]
    b, c = (parameters[name][:, None] if name in parameters else 0.0 for name in ("phase", "offset"))
    return a * torch.sin(w * x - b) + c


def _observe(
    parameters: dict[str, Tensor],
    noise: Tensor,
    num_observations: int,
    generator: torch.Generator,
) -> SinusoidTasks:
    if num_observations < 1:
        raise ValueError(f"num_observations is {num_observations}; draw at least 1 per task")
    if bool((noise < 0).any()):
        raise ValueError(f"noise standard deviations start with {float(noise[0])}; give 0 or more")
    x = 10 * torch.rand(len(noise), num_observations, generator=generator) - 5
    clean = partial(_sine, parameters)
    y = clean(x) + noise[:, None] * torch.randn(x.shape, generator=generator)
    return SinusoidTasks(Tasks({"x": x, "y": y}, outputs=("y",)), clean, parameters)
