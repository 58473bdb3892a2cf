"""Growth curves: polynomials in time that vary from subject to subject, and smooth departures from them."""

from math import pi
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.models.inputs import as_floating
from bmaml_ppl.types import Model

__all__ = ["growth_curve", "smooth_growth"]


def growth_curve(degree: int = 2, *, covariance: Literal["full", "diagonal"] = "full") -> Model:
    r"""A subject's polynomial growth curve with correlated coefficients (a random-coefficients model).

    .. math:: c \sim N(\mu, L L^T), \quad y_i \sim N\Bigl(\sum_k c_k t_i^k, \sigma^2\Bigr)

    The returned model is `model(time, value=None)`, both (N,), best standardised: powers of raw times differ
    by orders of magnitude. Latent site: `coef`, (degree + 1,). Meta-learned: `mean` of coefficients, in units of
    value / time^k; `scale_tril` L, lower triangular, or `scale`, its diagonal; `noise` sigma, in units of value.

    Args:
        degree: Of the polynomial; 0 is a random intercept, 1 a random slope as well.
        covariance: "full" learns correlations between coefficients, "diagonal" leaves them independent.

    Raises:
        ValueError: If the degree is negative or the covariance unknown.

    Reference:
        Laird and Ware (1982), Random-Effects Models for Longitudinal Data, section 2.
    """
    if degree < 0:
        raise ValueError(f"degree={degree} is negative; 0 is a constant, 1 a line, 2 a parabola")
    if covariance not in ("full", "diagonal"):
        raise ValueError(f'covariance={covariance!r} is not known; choose "full" or "diagonal"')

    def model(time: Tensor, value: Tensor | None = None) -> None:
        time = as_floating(time)
        coef = pyro.sample("coef", _coefficients(time, degree + 1, covariance))
        noise = pyro.param("noise", lambda: time.new_tensor(0.5), constraint=constraints.positive)
        curve = torch.stack([time**k for k in range(degree + 1)], -1) @ coef
        with pyro.plate("data", len(time)):
            pyro.sample("obs", dist.Normal(curve, noise), obs=value)

    return model


def _coefficients(like: Tensor, size: int, covariance: str) -> Any:
    mean = pyro.param("mean", lambda: like.new_zeros(size))
    if covariance == "diagonal":
        scale = pyro.param("scale", lambda: like.new_ones(size), constraint=constraints.positive)
        return dist.Normal(mean, scale).to_event(1)
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    scale_tril = pyro.param("scale_tril", lambda: eye, constraint=constraints.lower_cholesky)
    return dist.MultivariateNormal(mean, scale_tril=scale_tril)


def smooth_growth(
    degree: int = 2, *, num_functions: int = 8, boundary: float = 2.2, heavy_tails: bool = False
) -> Model:
    r"""A subject's polynomial growth curve and a smooth departure from it, both larger or smaller as time goes on.

    .. math::
        c \sim N(\mu, L L^T), \quad w \sim N(0, I), \quad
        y_i \sim N\Bigl(\sum_k c_k t_i^k + a e^{g t_i} \sum_j s_j \phi_j(t_i) w_j,
        \; \sigma^2 e^{2 h t_i}\Bigr)

    What a polynomial misses lasts: an animal above its curve this week is above it in the next. The sum over j
    approximates a Gaussian process of standard deviation a and squared exponential kernel of length l, by the
    sines :math:`\phi_j(t) = B^{-1/2} \sin(\pi j (t + B) / 2B)` on [-B, B] with weights
    :math:`s_j^2 = \sqrt{2 \pi} l e^{-(\pi j l / 2B)^2 / 2}`. Given the meta-parameters all is linear and, without
    heavy tails, normal, so that `laplace` is exact.

    The returned model is `model(time, value=None)`, both (N,), best standardised. Latent sites: `standard`,
    (degree + 1,), with c = mu + L z, and `weights` a w, (num_functions,), in units of value; deterministic site
    `coef`, c. Meta-learned: `mean` and `scale_tril` of the coefficients,
    `departure` a and `noise` sigma, in units of value, at time 0; `departure_growth` g and `noise_growth` h, per
    unit of time; `length` l, in units of time.

    Args:
        degree: Of the polynomial; 0 is a random intercept, 1 a random slope as well.
        num_functions: Sines; shorter lengths need more.
        boundary: B, in units of time, a good part beyond the latest time and before the earliest: departures
            vanish there.
        heavy_tails: Whether noise is Student's t of scale sigma, with meta-learned `freedom` above 2, degrees of
            freedom; else it is normal.

    Raises:
        ValueError: If the degree is negative, there are no sines, or the boundary is not positive.

    References:
        Riutort-Mayol et al. (2023), Practical Hilbert space approximate Bayesian Gaussian processes for
        probabilistic programming, equations 6 to 9; Diggle (1988), An approach to the analysis of repeated
        measurements, for departures that last.
    """
    if degree < 0:
        raise ValueError(f"degree={degree} is negative; 0 is a constant, 1 a line, 2 a parabola")
    if num_functions < 1 or boundary <= 0:
        raise ValueError(f"num_functions={num_functions}, boundary={boundary}; give at least 1, and more than 0")

    def model(time: Tensor, value: Tensor | None = None) -> None:
        time = as_floating(time)
        # Coefficients in units of their own spread: a spread learned to be near zero would stall Newton's steps.
        standard = pyro.sample("standard", dist.Normal(time.new_zeros(degree + 1), 1.0).to_event(1))
        coef = pyro.deterministic("coef", _place(standard), event_dim=1)
        size = pyro.param("departure", lambda: time.new_tensor(0.2), constraint=constraints.positive)
        weights = pyro.sample("weights", dist.Normal(time.new_zeros(num_functions), size).to_event(1))
        polynomial = torch.stack([time**k for k in range(degree + 1)], -1) @ coef
        departure = _growth("departure", time) * (_smooth_basis(time, num_functions, boundary) @ weights)
        noise = pyro.param("noise", lambda: time.new_tensor(0.2), constraint=constraints.positive)
        location, scale = polynomial + departure, noise * _growth("noise", time)
        with pyro.plate("data", len(time)):
            pyro.sample("obs", _observation(location, scale, heavy_tails), obs=value)

    return model


def _observation(location: Tensor, scale: Tensor, heavy_tails: bool) -> Any:
    if not heavy_tails:
        return dist.Normal(location, scale)
    freedom = pyro.param("freedom", lambda: location.new_tensor(5.0), constraint=constraints.greater_than(2.0))
    return dist.StudentT(freedom, location, scale)


def _place(standard: Tensor) -> Tensor:
    """Standard normal coordinates as correlated coefficients, mean + L z; L starts smaller for higher powers."""
    start = 0.5 * 0.3 ** torch.arange(len(standard), dtype=standard.dtype, device=standard.device)
    mean = pyro.param("mean", lambda: standard.new_zeros(len(standard)))
    return mean + pyro.param("scale_tril", lambda: start.diag(), constraint=constraints.lower_cholesky) @ standard


def _growth(name: str, time: Tensor) -> Tensor:
    """The factor, (N,), by which a standard deviation has grown since time 0, at a meta-learned rate."""
    return torch.exp(pyro.param(f"{name}_growth", lambda: time.new_zeros(())) * time)


def _smooth_basis(time: Tensor, size: int, boundary: float) -> Tensor:
    """Sines with the amplitudes that a squared exponential kernel of meta-learned length gives them, (N, size)."""
    length = pyro.param("length", lambda: time.new_tensor(0.7), constraint=constraints.positive)
    frequency = pi / (2 * boundary) * torch.arange(1, size + 1, dtype=time.dtype, device=time.device)
    amplitude = (2 * pi) ** 0.25 * length.sqrt() * torch.exp(-((length * frequency) ** 2) / 4)
    return amplitude * torch.sin(frequency * (time.unsqueeze(-1) + boundary)) / boundary**0.5
