"""The normal distribution that a task's prior is, or is close to, seen from draws of it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.inference.curvature import arrow_prior, dual, few_coordinates
from bmaml_ppl.inference.derivatives import curvature_factor, hessians, safe_fraction, scores
from bmaml_ppl.types import SiteLayout

__all__ = ["prior_moments"]

_DENSE_LIMIT = 64


def prior_moments(
    log_prior: Callable[[Tensor], Tensor], draws: Tensor, sites: Mapping[str, SiteLayout] | None = None
) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviations of a normal prior, from its score and curvature at draws z.

    .. math:: \mu = z + H^{-1} \nabla \log p(z), \quad \sigma = \mathrm{diag}(H)^{-1/2}, \quad H = -\nabla^2 \log p(z)

    For a normal prior every draw gives the same mean, so that neither value nor gradient depends on the draw; sigma
    is the best diagonal approximation's. For others, the mean over draws of both is returned. Above 64 coordinates H
    is taken to be diagonal but for those of the small sites, on which all may depend.

    Args:
        log_prior: Log density, up to a constant.
        draws: (M, D).
        sites: Layout of z; None is one site.

    Returns:
        Mean and standard deviation, (D,) each.
    """
    score = scores(log_prior, draws)
    if draws.shape[1] <= _DENSE_LIMIT:
        factor = curvature_factor(-hessians(log_prior, draws))
        move = torch.cholesky_solve(score.unsqueeze(-1), factor).squeeze(-1)
        precision = factor.square().sum(-1)
    else:
        precision, move = vmap(lambda z, slope: _solve_arrow(log_prior, z, slope, few_coordinates(sites)))(draws, score)
    loc = draws + move * safe_fraction(log_prior, draws, move, slack=0.0)
    return loc.mean(0), precision.mean(0).rsqrt()


def _solve_arrow(
    log_prior: Callable[[Tensor], Tensor], z: Tensor, score: Tensor, few: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Diagonal of a prior's negative Hessian made positive definite, and its inverse times the score: (D,) each."""
    prior = arrow_prior(log_prior, z, few)
    along = torch.where(prior.diagonal > 0, prior.diagonal, 1.0)
    solved = dual(prior._replace(diagonal=along), z.new_zeros(0, len(z))).precision.solve(score)
    small = prior.select @ prior.small.diagonal().abs().clamp_min(1e-6) if len(few) else torch.zeros_like(z)
    return torch.where(prior.select.sum(1) > 0, small, along), solved
