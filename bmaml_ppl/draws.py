"""Draws from a distribution that work under `torch.func` transforms."""

from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor

__all__ = ["reparameterised"]


@singledispatch
def reparameterised(fn: Any) -> Tensor:
    """Draws once from a distribution, with a gradient to its parameters where it has one.

    Several of torch's own samplers fill a tensor in place or go through an autograd function, which
    `torch.func.vmap` refuses. Here a draw is the inverse CDF of a uniform where the distribution has one,
    and a textbook construction for the families registered below. Register another in the same way:
    `reparameterised.register(MyDistribution)(my_draw)`.

    Args:
        fn: A Pyro distribution.

    Returns:
        A value of the distribution's full shape.
    """
    try:
        parameter = fn.icdf(torch.tensor(0.5))
    except NotImplementedError:
        return fn.rsample() if fn.has_rsample else fn.sample()
    tiny = torch.finfo(parameter.dtype).tiny
    uniform = torch.rand(_shape(fn), dtype=parameter.dtype, device=parameter.device)
    return fn.icdf(uniform.clamp(tiny, 1 - torch.finfo(parameter.dtype).eps))


def _shape(fn: Any) -> torch.Size:
    return fn.batch_shape + fn.event_shape


def _normal_like(like: Tensor, shape: torch.Size) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)


@reparameterised.register
def _(fn: td.Normal) -> Tensor:
    return fn.loc + fn.scale * _normal_like(fn.loc, _shape(fn))


@reparameterised.register
def _(fn: td.MultivariateNormal) -> Tensor:
    noise = _normal_like(fn.loc, _shape(fn))
    return fn.loc + (fn._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)


@reparameterised.register
def _(fn: td.LowRankMultivariateNormal) -> Tensor:
    factor = fn._unbroadcasted_cov_factor
    weights = _normal_like(fn.loc, _shape(fn)[:-1] + factor.shape[-1:])
    scale = fn._unbroadcasted_cov_diag.sqrt()
    return fn.loc + (factor @ weights.unsqueeze(-1)).squeeze(-1) + scale * _normal_like(fn.loc, _shape(fn))


@reparameterised.register
def _(fn: td.StudentT) -> Tensor:
    chi2 = 2 * _standard_gamma((fn.df / 2).expand(_shape(fn)))
    return fn.loc + fn.scale * _normal_like(fn.loc, _shape(fn)) * torch.rsqrt(chi2 / fn.df)


@reparameterised.register
def _(fn: td.Independent) -> Tensor:
    return reparameterised(fn.base_dist)


@reparameterised.register
def _(fn: dist.MaskedDistribution) -> Tensor:
    return reparameterised(fn.base_dist)


@reparameterised.register
def _(fn: dist.ExpandedDistribution) -> Tensor:
    return reparameterised(fn.base_dist.expand(fn.batch_shape))


@reparameterised.register
def _(fn: td.TransformedDistribution) -> Tensor:
    value = reparameterised(fn.base_dist)
    for transform in fn.transforms:
        value = transform(value)
    return value


@reparameterised.register
def _(fn: td.Gamma) -> Tensor:
    return _standard_gamma(fn.concentration) / fn.rate


@reparameterised.register
def _(fn: td.Dirichlet) -> Tensor:
    return _normalised_gammas(fn.concentration)


@reparameterised.register
def _(fn: td.Beta) -> Tensor:
    pair = torch.stack([fn.concentration1, fn.concentration0], dim=-1)
    return _normalised_gammas(pair)[..., 0]


@reparameterised.register
def _(fn: td.LKJCholesky) -> Tensor:
    radius = reparameterised(fn._beta).unsqueeze(-1)
    direction = _normal_like(radius, _shape(fn)).tril(-1)
    norm = direction.square().sum(-1, keepdim=True).clamp_min(torch.finfo(radius.dtype).tiny)
    rows = (radius.sqrt() * direction * torch.rsqrt(norm)).tril(-1)
    diagonal = (1 - rows.square().sum(-1)).clamp_min(torch.finfo(radius.dtype).eps).sqrt()
    return rows + torch.diag_embed(diagonal)


@reparameterised.register
def _(fn: dist.ProjectedNormal) -> Tensor:
    value = fn.concentration + _normal_like(fn.concentration, _shape(fn))
    return value / value.norm(dim=-1, keepdim=True)


@reparameterised.register
def _(fn: td.VonMises) -> Tensor:
    angles = torch.linspace(-torch.pi, torch.pi, 1025, dtype=fn.loc.dtype, device=fn.loc.device)
    density = torch.exp(fn.concentration.unsqueeze(-1) * (angles.cos() - 1))
    cdf = density.cumsum(-1) / density.sum(-1, keepdim=True)
    uniform = torch.rand(_shape(fn), dtype=angles.dtype, device=angles.device).unsqueeze(-1)
    return torch.remainder(angles[(cdf < uniform).sum(-1)] + fn.loc + torch.pi, 2 * torch.pi) - torch.pi


def _standard_gamma(concentration: Tensor, num_proposals: int = 8) -> Tensor:
    """Gamma(concentration, 1) by Marsaglia and Tsang (2000), with a fixed number of proposals: more than
    95 % of them are accepted, so that none of eight is once in 10^11. The gradient is that of the accepted
    proposal."""
    boosted = torch.where(concentration < 1, concentration + 1, concentration)
    d = (boosted - 1 / 3).unsqueeze(-1)
    shape = (*concentration.shape, num_proposals)
    normal = _normal_like(concentration, torch.Size(shape))
    uniform = torch.rand(shape, dtype=normal.dtype, device=normal.device).clamp_min(1e-30)
    v = (1 + normal / (3 * d.sqrt())) ** 3
    log_v = v.clamp_min(1e-30).log()
    accepted = (v > 0) & (uniform.log() < 0.5 * normal**2 + d - d * v + d * log_v)
    first = torch.where(accepted, torch.arange(num_proposals, device=v.device), num_proposals).argmin(-1, keepdim=True)
    value = (d * v.clamp_min(1e-30)).gather(-1, first).squeeze(-1)
    shrink = torch.rand(concentration.shape, dtype=normal.dtype, device=normal.device).clamp_min(1e-30)
    return torch.where(concentration < 1, value * shrink ** (1 / concentration), value)


def _normalised_gammas(concentration: Tensor) -> Tensor:
    limits = torch.finfo(concentration.dtype)
    gammas = _standard_gamma(concentration).clamp_min(limits.tiny)
    return (gammas / gammas.sum(-1, keepdim=True)).clamp(limits.eps, 1 - limits.eps)
