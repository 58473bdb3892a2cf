"""Growth curves: polynomials in time whose coefficients vary from subject to subject."""

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.types import Model

__all__ = ["growth_curve"]


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
