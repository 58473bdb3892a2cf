"""A sinusoid as a probabilistic program: a curve of a known form, whose numbers have meta-learned priors."""

from math import pi

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.checks import check_positive
from bmaml_ppl.models.inputs import as_floating
from bmaml_ppl.types import Model

__all__ = ["sinusoid_program"]


def sinusoid_program(
    *, largest_amplitude: float = 6.0, highest_frequency: float = 3.0, initial_noise: float = 0.03
) -> Model:
    r"""A sinusoid with noise in proportion to its amplitude.

    .. math:: y_i \sim N(A \sin(w x_i - b), (\rho A)^2), \quad A / A_{max}, \; w / w_{max}, \; b / 2 \pi \sim Beta

    The returned model is `model(x, y=None)` with x and y (N,) in plate "data", in the user's units. Latent sites:
    `amplitude` A, `frequency` w and `phase` b, each on an interval from 0. Meta-learned: both concentrations of each
    Beta, uniform at the start, as `amplitude_shape` and so on, (2,) each, and `noise_ratio` rho.

    Five points may agree with sinusoids of several frequencies: the posterior then has as many narrow modes, which
    `smc()` finds.

    Args:
        largest_amplitude: End of the amplitudes' interval, in units of y.
        highest_frequency: End of the frequencies' interval, in radians a unit of x.
        initial_noise: First value of rho.

    Raises:
        ValueError: If an argument is not positive.

    Reference:
        Yoon et al. (2018), Bayesian Model-Agnostic Meta-Learning, section 5.1, and its released code, for the family.
    """
    check_positive(
        largest_amplitude=largest_amplitude, highest_frequency=highest_frequency, initial_noise=initial_noise
    )
    intervals = {"amplitude": largest_amplitude, "frequency": highest_frequency, "phase": 2 * pi}
    # Made once: a recording cannot tell that tensors which each run makes anew are the same.
    zero, ends = torch.zeros(()), {name: torch.tensor(end, dtype=torch.float64) for name, end in intervals.items()}

    def model(x: Tensor, y: Tensor | None = None) -> None:
        x = as_floating(x)

        def draw(name: str) -> Tensor:
            shape = pyro.param(f"{name}_shape", lambda: x.new_ones(2), constraint=constraints.positive)
            value: Tensor = pyro.sample(name, dist.AffineBeta(shape[0], shape[1], zero.to(x), ends[name].to(x)))
            return value

        amplitude, frequency, phase = draw("amplitude"), draw("frequency"), draw("phase")
        ratio = pyro.param("noise_ratio", lambda: x.new_tensor(initial_noise), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(amplitude * torch.sin(frequency * x - phase), ratio * amplitude), obs=y)

    return model
