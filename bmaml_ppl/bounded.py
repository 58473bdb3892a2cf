"""Bijections onto intervals and the simplex whose log density is exact in the tails, also in float32.

A value within rounding of its bound says nothing about how far out its coordinate is, and its inverse square
overflows. Everything that matters is therefore computed from the coordinate, in logarithms.
"""

from functools import singledispatch
from math import log, pi, prod
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions import AffineBeta, constraints
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.utils import _sum_rightmost
from torch.nn.functional import logsigmoid, pad

__all__ = ["Interval", "StickBreaking", "log_prob_at"]


class Interval(Transform):
    """Logistic bijection onto an interval; values stay inside it.

    Args:
        low: Lower bound.
        high: Upper bound, broadcastable with `low`.
    """

    domain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, low: Tensor | float, high: Tensor | float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.codomain = constraints.interval(low, high)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Interval) and bool(
            (torch.as_tensor(self.low) == torch.as_tensor(other.low)).all()
            and (torch.as_tensor(self.high) == torch.as_tensor(other.high)).all()
        )

    def _call(self, x: Tensor) -> Tensor:
        low, high = self._bounds(x)
        value = low + (high - low) * torch.sigmoid(x)
        return _keep_inside(value, low, high)

    def _inverse(self, y: Tensor) -> Tensor:
        low, high = self._bounds(y)
        y = _keep_inside(y, low, high)
        return (y - low).log() - (high - y).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log (high - low) + log sigmoid(x) + log sigmoid(-x)."""
        low, high = self._bounds(x)
        return (high - low).log() + logsigmoid(x) + logsigmoid(-x)

    def forward_shape(self, shape: Any) -> torch.Size:
        """Broadcast with the bounds."""
        return torch.broadcast_shapes(shape, *(getattr(bound, "shape", ()) for bound in (self.low, self.high)))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Broadcast with the bounds."""
        return self.forward_shape(shape)

    def _bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (
            b if isinstance(b, Tensor) else torch.full((), b, dtype=like.dtype, device=like.device)
            for b in (self.low, self.high)
        )
        return low, high


def _keep_inside(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Moves values on a bound inside by the smallest step there, whose square root's inverse square is finite."""
    limits = torch.finfo(value.dtype)
    above = low + (low.abs() * limits.eps).clamp_min(limits.tiny**0.5)
    below = torch.where(high.isfinite(), high - (high.abs() * limits.eps / 2).clamp_min(limits.tiny**0.5), high)
    moved = value.detach().maximum(above.detach()).minimum(below.detach())
    # The gradient, also to a learned bound, stays that of the unmoved value.
    return torch.where(moved == value.detach(), value, value + (moved - value).detach())


class StickBreaking(Transform):
    """Stick-breaking bijection from (..., K - 1) onto the simplex (..., K), in logarithms.

    Reference:
        Stan Reference Manual, section "Unit simplex", for the construction and its offsets.
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StickBreaking)

    def log_value(self, x: Tensor) -> Tensor:
        """Log of the value, (..., K)."""
        x = x - self._offset(x).log()
        return pad(logsigmoid(x), [0, 1]) + pad(logsigmoid(-x).cumsum(-1), [1, 0])

    def _call(self, x: Tensor) -> Tensor:
        return self.log_value(x).exp().clamp_min(torch.finfo(x.dtype).tiny ** 0.5)

    def _inverse(self, y: Tensor) -> Tensor:
        rest = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        tiny = torch.finfo(y.dtype).tiny
        x = y[..., :-1].clamp_min(tiny).log() - rest.clamp_min(tiny).log()
        return x + self._offset(x).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-Jacobian of the first K - 1 components, (...)."""
        return (logsigmoid(-(x - self._offset(x).log())) + self.log_value(x)[..., :-1]).sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        """(..., K - 1) -> (..., K)."""
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: Any) -> torch.Size:
        """(..., K) -> (..., K - 1)."""
        return torch.Size([*shape[:-1], shape[-1] - 1])

    @staticmethod
    def _offset(x: Tensor) -> Tensor:
        return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device)


@singledispatch
def log_prob_at(fn: Any, value: Tensor, x: Tensor) -> Tensor:
    """Log density of a distribution at a value that came from unconstrained coordinates.

    The families registered below are computed from the coordinates, and so are exact where the value has
    rounded to the end of its support; others are their own `log_prob`.

    Args:
        fn: A Pyro distribution.
        value: On its support, of its full shape.
        x: Its coordinates under `bijection(fn.support)`.

    Returns:
        Log density of the batch shape, without a log-Jacobian.
    """
    return fn.log_prob(value)


@log_prob_at.register
def _(fn: td.Independent, value: Tensor, x: Tensor) -> Tensor:
    base, num = fn.base_dist, fn.reinterpreted_batch_ndims
    if type(base).log_prob is td.Normal.log_prob and _has_one_scale(base, num):
        return _round_normal(base, value, num)
    total: Tensor = _sum_rightmost(log_prob_at(base, value, x), num)
    return total


@log_prob_at.register
def _(fn: td.Beta, value: Tensor, x: Tensor) -> Tensor:
    logs = torch.stack([logsigmoid(x), logsigmoid(-x)], -1)
    return _dirichlet(fn._dirichlet.concentration, logs)


@log_prob_at.register
def _(fn: AffineBeta, value: Tensor, x: Tensor) -> Tensor:
    unit: Tensor = log_prob_at(fn.base_dist, value, x)
    return unit - fn.scale.log()


@log_prob_at.register
def _(fn: td.Dirichlet, value: Tensor, x: Tensor) -> Tensor:
    return _dirichlet(fn.concentration, StickBreaking().log_value(x))


@log_prob_at.register
def _(fn: td.Gamma, value: Tensor, x: Tensor) -> Tensor:
    constant = fn.concentration * fn.rate.log() - fn.concentration.lgamma()
    return constant + (fn.concentration - 1) * x - fn.rate * value


@log_prob_at.register
def _(fn: td.LogNormal, value: Tensor, x: Tensor) -> Tensor:
    return fn.base_dist.log_prob(x) - x


def _has_one_scale(fn: td.Normal, num: int) -> bool:
    """Whether the last dimensions, of which there are some, share one standard deviation."""
    return num > 0 and fn.scale.numel() > 0 and all(fn.scale.stride(-i - 1) == 0 for i in range(num))


def _round_normal(fn: td.Normal, value: Tensor, num: int) -> Tensor:
    """Log density where the last dimensions share one standard deviation: a function of the distance to the mean."""
    squared = (value - fn.loc).square().flatten(-num).sum(-1)
    scale = fn.scale.flatten(-num)[..., 0]
    size = prod(fn.batch_shape[-num:])
    return -0.5 * squared / scale.square() - size * (scale.log() + 0.5 * log(2 * pi))


def _dirichlet(concentration: Tensor, logs: Tensor) -> Tensor:
    normaliser = concentration.lgamma().sum(-1) - concentration.sum(-1).lgamma()
    return ((concentration - 1) * logs).sum(-1) - normaliser
