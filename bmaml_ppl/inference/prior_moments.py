"""The normal distribution that a task's prior is, or is close to, seen from draws of it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from bmaml_ppl.inference.derivatives import FirstOrder, curvature_factor, hessians, safe_fraction, scores
from bmaml_ppl.types import LogDensity

__all__ = ["exact_density", "prior_moments"]

_DENSE_LIMIT = 64


def exact_density(log_density: LogDensity) -> LogDensity:
    """The log density without stop-gradients."""
    return log_density.exact if isinstance(log_density, FirstOrder) else log_density


def prior_moments(log_prior: Callable[[Tensor], Tensor], draws: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviations of a normal prior, from its score and curvature at draws z.

    .. math:: \mu = z + H^{-1} \nabla \log p(z), \quad \sigma = \mathrm{diag}(H)^{-1/2}, \quad H = -\nabla^2 \log p(z)

    For a normal prior every draw gives the same mean, so that neither value nor gradient depends on the draw; sigma
    is the best diagonal approximation's. For others, the mean over draws of both is returned. Above 64 coordinates H
    is taken to be diagonal, as it is for independent latents.

    Args:
        log_prior: Log density, up to a constant.
        draws: (M, D).

    Returns:
        Mean and standard deviation, (D,) each.
    """
    score = scores(log_prior, draws)
    if draws.shape[1] <= _DENSE_LIMIT:
        factor = curvature_factor(-hessians(log_prior, draws))
        move = torch.cholesky_solve(score.unsqueeze(-1), factor).squeeze(-1)
        precision = factor.square().sum(-1)
    else:
        curved = vmap(lambda z: -vjp(grad(log_prior), z)[1](torch.ones_like(z))[0])(draws)
        precision = torch.where(curved > 0, curved, 1.0)
        move = torch.where(curved > 0, score / precision, 0.0)
    loc = draws + move * safe_fraction(log_prior, draws, move, slack=0.0)
    return loc.mean(0), precision.mean(0).rsqrt()
