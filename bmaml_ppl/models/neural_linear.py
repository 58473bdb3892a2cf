"""Neural linear regression: features that all tasks share, and a Bayesian last layer of each task's own."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from bmaml_ppl.models.inputs import as_columns, check_output
from bmaml_ppl.types import Model

__all__ = ["Activation", "check_features", "make_features", "neural_linear"]

Activation = Callable[[Tensor], Tensor]

_GAIN = 5 / 3


def neural_linear(
    network: Sequence[int] | nn.Module,
    *,
    covariance: Literal["full", "diagonal"] = "full",
    activation: Activation = torch.tanh,
    initial_scale: float = 1.0,
    initial_noise: float = 0.3,
    seed: int = 0,
) -> Model:
    r"""A task's Bayesian linear regression on features of a network that all tasks share and meta-learning fits.

    .. math:: c \sim N(\mu, L L^T), \quad y_i \sim N\bigl(c_0 + h(x_i)^T c_{1:}, \sigma^2\bigr)

    The posterior of c is exactly Gaussian, so that a Laplace approximation is exact, and so is its evidence.
    The returned model is `model(x, y=None)` with x (N,) or (N, d_in) and y (N,), best standardised. Latent
    site: `coef`, (H + 1,), the intercept first. Meta-learned: all weights of the network, registered as
    "features"; `mean`; `scale_tril` L, lower triangular, or `scale`, its diagonal; `noise` sigma, in units of y.

    Args:
        network: Layer sizes of a perceptron, such as (1, 40, 40, 32), whose last is the number H of features;
            or a module from x, as it is, to features (N, H), whose own weights are the start.
        covariance: "full" learns correlations between coefficients, "diagonal" leaves them independent.
        activation: After each layer of a perceptron, the last one too; unused for a module. A smooth one gives
            smooth functions of x.
        initial_scale: First standard deviation of c, in units of y, times sqrt(H): that of the task's function
            where features are around 1.
        initial_noise: First value of sigma.
        seed: Of the first weights for layer sizes, N(0, (5/3)^2 / d_in) and N(0, 1) for biases, from a
            generator of their own.

    Raises:
        ValueError: If an option is unknown or not positive, sizes are too few or below 1, the network's output
            is not (N, H), or y is not (N,).

    References:
        Snoek et al. (2015), Scalable Bayesian Optimization Using Deep Neural Networks, section 3; Harrison,
        Sharma and Pavone (2018), Meta-Learning Priors for Efficient Online Bayesian Regression, equations 6 to
        8; Ober and Rasmussen (2019), Benchmarking the Neural Linear Model for Regression.
    """
    _check_options(covariance, initial_scale=initial_scale, initial_noise=initial_noise)
    features = make_features(network, activation, seed)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        hidden = pyro.module("features", features)(x)
        check_features(hidden, x)
        coef = pyro.sample("coef", _coefficients(hidden, covariance, initial_scale))
        noise = pyro.param("noise", lambda: hidden.new_tensor(initial_noise), constraint=constraints.positive)
        mean = coef[0] + hidden @ coef[1:]
        check_output(mean, y)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, noise), obs=y)

    return model


def _check_options(covariance: str, **positive: float) -> None:
    if covariance not in ("full", "diagonal"):
        raise ValueError(f'covariance={covariance!r} is not known; choose "full" or "diagonal"')
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be positive, in units of y")


def make_features(network: Sequence[int] | nn.Module, activation: Activation, seed: int) -> nn.Module:
    """The module itself, or a perceptron of these sizes."""
    return network if isinstance(network, nn.Module) else _Perceptron(network, activation, seed)


def check_features(hidden: Tensor, x: Tensor) -> None:
    """Refuses features that are not (N, H)."""
    if hidden.ndim != 2 or len(hidden) != len(x):
        raise ValueError(f"the network's output has shape {tuple(hidden.shape)}; give features ({len(x)}, H)")


class _Perceptron(nn.Module):
    """Affine layers with an activation after each, the last one too."""

    def __init__(self, sizes: Sequence[int], activation: Activation, seed: int) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"network={sizes!r} needs at least two sizes of at least 1, for example (1, 40, 40, 32)")
        generator = torch.Generator().manual_seed(seed)
        weights, biases = [], []
        for d_in, d_out in pairwise(sizes):
            weights.append(_GAIN / sqrt(d_in) * torch.randn(d_out, d_in, generator=generator))
            biases.append(torch.randn(d_out, generator=generator))
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        self.d_in, self.activation = sizes[0], activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = as_columns(x, self.d_in)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            # At the first run these are the module's own, which need not have the data's dtype or device.
            hidden = self.activation(functional.linear(hidden, weight.to(hidden), bias.to(hidden)))
        return hidden


def _coefficients(hidden: Tensor, covariance: str, initial_scale: float) -> Any:
    num_features = hidden.shape[1]
    mean = pyro.param("mean", lambda: hidden.new_zeros(num_features + 1))
    sd = initial_scale / sqrt(num_features)
    if covariance == "diagonal":
        start = hidden.new_full((num_features + 1,), sd)
        return dist.Normal(mean, pyro.param("scale", start, constraint=constraints.positive)).to_event(1)
    start = sd * torch.eye(num_features + 1, dtype=hidden.dtype, device=hidden.device)
    scale_tril = pyro.param("scale_tril", start, constraint=constraints.lower_cholesky)
    return dist.MultivariateNormal(mean, scale_tril=scale_tril)
