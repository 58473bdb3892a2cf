"""Latent sites of every kind for the tests of densities and draws: distribution -> value of its full shape."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions import transforms as T
from torch import Tensor

from bmaml_ppl.bijections import bijection

__all__ = ["LATENTS", "MATRIX_SUPPORTS", "SAMPLED"]


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _normal(*shape: int) -> Any:
    return dist.Normal(torch.zeros(*shape, dtype=torch.float64), 1.0).to_event(len(shape))


def _covariance(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64) + 0.3


SAMPLED: dict[str, Callable[[], Any]] = {
    "Normal": lambda: dist.Normal(_number(0.3), 1.2),
    "AffineBeta": lambda: dist.AffineBeta(_number(2.0), 3.0, -1.0, 4.0),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(_number(0.2), 1.0, 0.5),
    "Beta": lambda: dist.Beta(_number(2.0), 3.0),
    "Beta below one": lambda: dist.Beta(_number(0.6), 0.7),
    "Cauchy": lambda: dist.Cauchy(_number(0.2), 1.5),
    "Chi2": lambda: dist.Chi2(_number(3.0)),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(_number(0.3)),
    "Dirichlet": lambda: dist.Dirichlet(_ones(3).cumsum(0)),
    "Exponential": lambda: dist.Exponential(_number(2.0)),
    "FisherSnedecor": lambda: dist.FisherSnedecor(_number(3.0), 5.0),
    "FoldedDistribution": lambda: dist.FoldedDistribution(dist.Normal(_number(0.4), 1.0)),
    "Gamma": lambda: dist.Gamma(_number(2.0), 3.0),
    "Gamma below one": lambda: dist.Gamma(_number(0.4), 1.0),
    "Gumbel": lambda: dist.Gumbel(_number(0.0), 1.5),
    "HalfCauchy": lambda: dist.HalfCauchy(_number(1.0)),
    "HalfNormal": lambda: dist.HalfNormal(_number(2.0)),
    "InverseGamma": lambda: dist.InverseGamma(_number(3.0), 2.0),
    "Kumaraswamy": lambda: dist.Kumaraswamy(_number(2.0), 3.0),
    "LKJ": lambda: dist.LKJ(3, _number(2.0)),
    "LKJCholesky": lambda: dist.LKJCholesky(3, _number(2.0)),
    "Laplace": lambda: dist.Laplace(_number(0.5), 1.0),
    "LogNormal": lambda: dist.LogNormal(_number(0.2), 0.7),
    "LogUniform": lambda: dist.TransformedDistribution(dist.Uniform(_number(0.0), 1.0), [T.ExpTransform()]),
    "Logistic": lambda: dist.Logistic(_number(0.2), 1.0),
    "LogisticNormal": lambda: dist.TransformedDistribution(_normal(2), T.StickBreakingTransform()),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(_ones(3), _ones(3, 1), _ones(3)),
    "MaskedMixture": lambda: dist.MaskedMixture(
        torch.tensor(True), dist.Normal(_number(0.0), 1.0), dist.Normal(_number(1.0), 1.0)
    ),
    "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(
        torch.stack([-_ones(3), _ones(3)]), _ones(2, 3), _ones(2).cumsum(0)
    ),
    "MixtureSameFamily": lambda: dist.MixtureSameFamily(
        dist.Categorical(_ones(2).cumsum(0)), dist.Normal(torch.stack([_number(-1.0), _number(2.0)]), 1.0)
    ),
    "MultivariateNormal": lambda: dist.MultivariateNormal(_ones(3), _covariance(3)),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(
        _number(4.0), _ones(3), torch.linalg.cholesky(_covariance(3))
    ),
    "Pareto": lambda: dist.Pareto(_number(1.0), 3.0),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(_number(0.5), logits=_number(0.3)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(_number(0.5), logits=_ones(3)),
    "SkewLogistic": lambda: dist.SkewLogistic(_number(0.0), 1.0, 2.0),
    "SoftAsymmetricLaplace": lambda: dist.SoftAsymmetricLaplace(_number(0.0), 1.0, 0.5),
    "SoftLaplace": lambda: dist.SoftLaplace(_number(0.0), 1.0),
    "StudentT": lambda: dist.StudentT(_number(4.0), 0.5, 1.5),
    "Uniform": lambda: dist.Uniform(_number(-1.0), 2.0),
    "VonMises": lambda: dist.VonMises(_number(0.5), 2.0),
    "VonMises narrow": lambda: dist.VonMises(_number(3.0), 2000.0),
    "Weibull": lambda: dist.Weibull(_number(1.0), 2.0),
    "Wishart": lambda: dist.Wishart(_number(5.0), covariance_matrix=_covariance(3)),
    "lower Cholesky": lambda: dist.TransformedDistribution(_normal(6), bijection(constraints.lower_cholesky)),
    "ordered": lambda: dist.TransformedDistribution(_normal(3), T.OrderedTransform()),
    "vector-valued, in a plate's shape": lambda: dist.Gamma(_ones(2, 3), 2.0).to_event(2),
    "simplexes": lambda: dist.Dirichlet(_ones(2, 3)).to_event(1),
    "Cholesky factors": lambda: dist.LKJCholesky(3, _ones(2)).to_event(1),
}
"""Latent sites that can be drawn from; a thunk, so that each test makes its own under its own settings."""

MATRIX_SUPPORTS: dict[str, tuple[Any, int]] = {
    "lower_cholesky": (constraints.lower_cholesky, 2),
    "softplus_lower_cholesky": (constraints.softplus_lower_cholesky, 2),
    "unit_lower_cholesky": (constraints.unit_lower_cholesky, 2),
    "positive_definite": (constraints.positive_definite, 2),
    "corr_cholesky": (constraints.corr_cholesky, 2),
    "corr_matrix": (constraints.corr_matrix, 2),
}
"""Supports of 3 x 3 matrices, and their event dimensions."""

_VECTORS: dict[str, tuple[Any, int]] = {
    "ordered_vector": (constraints.ordered_vector, 1),
    "positive_ordered_vector": (constraints.positive_ordered_vector, 1),
    "simplex": (constraints.simplex, 1),
    "softplus_positive": (constraints.softplus_positive, 0),
    "unit_interval": (constraints.unit_interval, 0),
    "interval": (constraints.interval(-1.0, 2.0), 0),
    "half_open_interval": (constraints.half_open_interval(-1.0, 2.0), 0),
    "greater_than": (constraints.greater_than(2.0), 0),
    "greater_than_eq": (constraints.greater_than_eq(2.0), 0),
    "less_than": (constraints.less_than(2.0), 0),
    "nonnegative": (constraints.nonnegative, 0),
    "real_vector": (constraints.real_vector, 1),
}


def _improper(support: Any, event_dim: int) -> Callable[[], Any]:
    return lambda: dist.ImproperUniform(support, (2,), (3,) * event_dim).to_event(1)


LATENTS: dict[str, Callable[[], Any]] = SAMPLED | {
    f"ImproperUniform on {name}": _improper(*support) for name, support in (MATRIX_SUPPORTS | _VECTORS).items()
}
"""All latent sites: those above, and an improper one on each constraint."""
