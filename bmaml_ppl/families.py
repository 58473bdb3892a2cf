"""Observation families: what a model says of its observations, as a function of each row's own parameters.

A Gauss-Newton or Fisher curvature splits a log-likelihood into what the model computes (the parameters of each
observation's distribution) and what the family makes of them. The parameters are read off the distribution in
unconstrained coordinates: (loc, log scale), logits, log rate.
"""

from dataclasses import dataclass
from functools import singledispatch
from math import prod, sqrt
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.bijections import bijection
from bmaml_ppl.handlers import Record, is_factor

__all__ = ["Family", "information_root", "read_family", "unknown_parameter"]

_REDUNDANT = {
    "probs": "logits",
    "gate": "gate_logits",
    "covariance_matrix": "scale_tril",
    "precision_matrix": "scale_tril",
}


@dataclass(frozen=True, eq=False)
class Family:
    """The rows of one observed site, each with the parameters of its distribution.

    Attributes:
        site: Name of the observed site.
        kind: Class of the distribution.
        parameters: Name, constraint and shape of each parameter, in the order of eta's columns.
        fixed: Parameters that are counts, (R, ...) each.
        value: What was observed, (R, ...).
        weight: Weight of each row's log-probability, (R,).
        eta: Unconstrained parameters, (R, P).
    """

    site: str
    kind: type
    parameters: tuple[tuple[str, constraints.Constraint, torch.Size], ...]
    fixed: dict[str, Any]
    value: Tensor
    weight: Tensor
    eta: Tensor

    def rebuild(self, eta: Tensor) -> Any:
        """The distribution of all rows under other parameters, (R, P)."""
        given, at = dict(self.fixed), 0
        for name, constraint, shape in self.parameters:
            transform = bijection(constraint)
            unconstrained = transform.inverse_shape(shape)
            size = prod(unconstrained)
            given[name] = transform(eta[:, at : at + size].reshape(len(eta), *unconstrained))
            at += size
        with pyro.validation_enabled(False):  # also of the distributions that this one makes for itself
            return self.kind(**given, validate_args=False)

    def log_prob(self, eta: Tensor) -> Tensor:
        """Weighted log-probability of each row under other parameters: (R, P) -> (R,)."""
        log_prob = self.rebuild(eta).log_prob(self.value)
        return torch.where(self.weight > 0, self.weight * log_prob, 0.0)

    def information_root(self, eta: Tensor) -> Tensor:
        """S, (R, P, P), with S S^T the weighted Fisher information of each row's parameters.

        Raises:
            ValueError: If the family's is not known.
        """
        if not _has_root(self.kind):
            raise ValueError(
                f"the Fisher information of {self.kind.__name__}, observed at site {self.site!r}, is not known; write "
                'curvature="ggn" or "exact", or register it: information_root.register(MyDistribution)(my_root)'
            )
        root = information_root(self.rebuild(eta))
        return root * self.weight.sqrt()[:, None, None]

    @property
    def unknown_columns(self) -> dict[int, str]:
        """Columns of eta whose information `information_root` does not hold, and the parameter each belongs to."""
        unknown, found, at = unknown_parameter(self.kind), {}, 0
        for name, constraint, shape in self.parameters:
            stop = at + prod(bijection(constraint).inverse_shape(shape))
            found.update({index: name for index in range(at, stop) if name == unknown})
            at = stop
        return found


def read_family(site: str, record: Record, weight: Tensor) -> Family:
    """Reads the parameters of an observed site's rows off its distribution.

    Args:
        site: Its name.
        record: What it did in one run.
        weight: Weight of its log-probabilities, of the site's batch shape: 0 where masked.

    Raises:
        ValueError: If the distribution does not show the parameters it is made of.
    """
    if is_factor(record.fn):
        raise _opaque(site, "a pyro.factor")
    fn, weight = _unwrap(record.fn, weight if record.weight is None else weight * record.weight)
    rows = prod(fn.batch_shape)
    parameters, columns, fixed = _read_parameters(site, fn, rows)
    value = record.value.expand(fn.batch_shape + fn.event_shape).reshape(rows, *fn.event_shape)
    if not value.is_floating_point() and not isinstance(fn, dist.Categorical):
        value = value.to(columns[0])
    eta = torch.cat(columns, -1)
    family = Family(site, type(fn), tuple(parameters), fixed, value, weight.reshape(rows).to(eta), eta)
    try:
        family.rebuild(eta)
    except TypeError as error:
        raise _opaque(site, f"{type(fn).__name__}, which is made of more than its parameters") from error
    return family


def _read_parameters(site: str, fn: Any, rows: int) -> tuple[list[Any], list[Tensor], dict[str, Any]]:
    """Name, constraint and shape of each parameter, its unconstrained values (rows, .), and the counts."""
    parameters, columns = [], []
    fixed: dict[str, Any] = {"total_count": fn.total_count} if isinstance(fn, dist.Multinomial) else {}
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        if _REDUNDANT.get(name) in fn.arg_constraints:
            continue
        bounds = [bound for bound in vars(constraint).values() if isinstance(bound, Tensor)]
        if bounds or constraints.is_dependent(constraint):
            raise _opaque(site, f"{type(fn).__name__}, whose {name!r} depends on its other parameters")
        value = torch.as_tensor(getattr(fn, name))
        event = value.shape[value.dim() - constraint.event_dim :]
        value = value.expand(fn.batch_shape + event).reshape(rows, *event)
        if constraint.is_discrete:
            fixed[name] = value
            continue
        parameters.append((name, constraint, event))
        columns.append(bijection(constraint).inv(value).reshape(rows, -1))
    if not columns:
        raise _opaque(site, f"{type(fn).__name__}, which shows no parameters")
    return parameters, columns, fixed


def _unwrap(fn: Any, weight: Tensor) -> tuple[Any, Tensor]:
    """The family itself, each of its batch elements a row, and the rows' weights."""
    if isinstance(fn, td.Independent):
        inner = fn.base_dist.batch_shape
        weight = weight.reshape(weight.shape + (1,) * (len(inner) - weight.dim())).expand(inner)
        return _unwrap(fn.base_dist, weight)
    if isinstance(fn, dist.MaskedDistribution):
        mask = torch.as_tensor(fn._mask).expand(fn.batch_shape)
        return _unwrap(fn.base_dist.expand(fn.batch_shape), weight * mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return _unwrap(fn.base_dist.expand(fn.batch_shape), weight)
    return fn, weight


def _opaque(site: str, what: str) -> ValueError:
    return ValueError(
        f"observed site {site!r} is {what}, so that its likelihood has no Gauss-Newton or Fisher curvature; write "
        'curvature="exact"'
    )


@singledispatch
def information_root(fn: Any) -> Tensor:
    """S with S S^T the Fisher information of a distribution in its unconstrained parameters, (R, P, P).

    Columns are in the order of the distribution's `arg_constraints`, as `read_family` reads them. Register another
    family in the same way.

    Args:
        fn: A distribution of R rows.

    Reference:
        Martens (2020), New Insights and Perspectives on the Natural Gradient Method, sections 6 and 9.
    """
    raise NotImplementedError(type(fn).__name__)


def _diagonal(*entries: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack(entries, -1))


def _normal(fn: Any) -> Tensor:
    return _diagonal(1 / fn.scale, torch.full_like(fn.scale, sqrt(2)))


information_root.register(td.Normal, _normal)
information_root.register(td.LogNormal, _normal)


@information_root.register
def _(fn: td.Laplace) -> Tensor:
    return _diagonal(1 / fn.scale, torch.ones_like(fn.scale))


@information_root.register
def _(fn: td.Cauchy) -> Tensor:
    return _diagonal(sqrt(0.5) / fn.scale, torch.full_like(fn.scale, sqrt(0.5)))


@information_root.register
def _(fn: td.StudentT) -> Tensor:
    """Lange, Little and Taylor (1989), Robust Statistical Modeling Using the t Distribution, appendix B."""
    df, zero = fn.df, torch.zeros_like(fn.scale)
    of_df = 0.25 * (torch.polygamma(1, df / 2) - torch.polygamma(1, (df + 1) / 2))
    of_df = (of_df - (df + 5) / (2 * df * (df + 1) * (df + 3))) * df**2
    of_both = -2 * df / ((df + 1) * (df + 3))
    of_scale = 2 * df / (df + 3)
    # The scale's column first: what is known of many degrees of freedom is smaller than its rounding error.
    last = of_scale.sqrt()
    cross = of_both / last
    rest = (of_df - cross**2).clamp_min(torch.finfo(df.dtype).tiny).sqrt()
    rows = (
        torch.stack([rest, zero, cross], -1),
        torch.stack([zero, ((df + 1) / (df + 3)).sqrt() / fn.scale, zero], -1),
        torch.stack([zero, zero, last], -1),
    )
    return torch.stack(rows, -2)


@information_root.register
def _(fn: td.Bernoulli) -> Tensor:
    return (fn.probs * (1 - fn.probs)).sqrt()[:, None, None]


@information_root.register
def _(fn: td.Binomial) -> Tensor:
    return (fn.total_count * fn.probs * (1 - fn.probs)).sqrt()[:, None, None]


def _categorical(fn: Any) -> Tensor:
    root = fn.probs.sqrt()
    return torch.diag_embed(root) - fn.probs.unsqueeze(-1) * root.unsqueeze(-2)


information_root.register(td.Categorical, _categorical)
information_root.register(td.OneHotCategorical, _categorical)


@information_root.register
def _(fn: td.Multinomial) -> Tensor:
    return _categorical(fn) * sqrt(fn.total_count)


@information_root.register
def _(fn: td.Poisson) -> Tensor:
    return fn.rate.sqrt()[:, None, None]


@information_root.register
def _(fn: td.Exponential) -> Tensor:
    return torch.ones_like(fn.rate)[:, None, None]


@information_root.register
def _(fn: td.HalfNormal) -> Tensor:
    return torch.full_like(fn.scale, sqrt(2))[:, None, None]


@information_root.register
def _(fn: td.Gamma) -> Tensor:
    shape = fn.concentration
    first = (shape**2 * torch.polygamma(1, shape)).sqrt()
    cross = -shape / first
    rest = (shape - cross**2).clamp_min(torch.finfo(shape.dtype).tiny).sqrt()
    zero = torch.zeros_like(shape)
    return torch.stack([torch.stack([first, zero], -1), torch.stack([cross, rest], -1)], -2)


@information_root.register
def _(fn: td.NegativeBinomial) -> Tensor:
    # Of the logits; that of the count has no closed form, and `unknown_columns` refuses one that is latent.
    return _diagonal(torch.zeros_like(fn.probs), (fn.total_count * fn.probs).sqrt())


@information_root.register
def _(fn: td.MultivariateNormal) -> Tensor:
    factor = fn.scale_tril
    dim = factor.shape[-1]
    eye = torch.eye(dim, dtype=factor.dtype, device=factor.device).expand(factor.shape)
    root = torch.linalg.solve_triangular(factor.mT, eye, upper=True)
    rest = dim * (dim + 1) // 2
    return torch.nn.functional.pad(root, (0, rest, 0, rest))


_PARTIAL: dict[type, str] = {td.NegativeBinomial: "total_count", td.MultivariateNormal: "scale_tril"}


def unknown_parameter(kind: type) -> str | None:
    """The parameter of a family for which `information_root` holds zeros, if any."""
    return next((name for family, name in _PARTIAL.items() if issubclass(kind, family)), None)


def _has_root(kind: type) -> bool:
    """Whether a root is registered for a family itself: one of a parent is for other parameters or another density."""
    known = next(parent for parent in kind.__mro__ if parent in information_root.registry)
    return known is not object and known.__name__ == kind.__name__
