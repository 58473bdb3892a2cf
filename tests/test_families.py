"""Families of observations: their parameters read off and put back, and their Fisher information."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bmaml_ppl.density import from_model
from bmaml_ppl.families import Family, information_root, read_family
from bmaml_ppl.handlers import Record
from bmaml_ppl.inference.curvature import exact_hessian, likelihood_rows
from bmaml_ppl.task_density import TaskDensity

F64 = torch.float64
ROWS = 3

Integral = tuple[Tensor, Tensor]
"""Points of a quadrature and their weights under Lebesgue or counting measure."""


@pytest.fixture(autouse=True)
def _float64() -> None:
    # What observed integers become, where no data are real numbers.
    torch.set_default_dtype(F64)


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def _panels(low: float, high: float, step: float = 0.25) -> Integral:
    """Gauss-Legendre quadrature on panels, one of whose edges is 0."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(16))
    edges = torch.arange(low, high, step, dtype=F64)
    return (edges[:, None] + 0.5 * step * (nodes + 1)).flatten(), (0.5 * step * weights).repeat(len(edges))


def _line(loc: float) -> Integral:
    """All of the real line, as far as Cauchy tails go; a kink is allowed at `loc`."""
    t, weight = _panels(-40.0, 40.0)
    return loc + t.sinh(), weight * t.cosh()


def _half_line() -> Integral:
    t, weight = _panels(-60.0, 12.0)
    return t.exp(), weight * t.exp()


def _counts(stop: int) -> Integral:
    return torch.arange(stop, dtype=F64), torch.ones(stop, dtype=F64)


def _plane(loc: Tensor, factor: Tensor) -> Integral:
    """Gauss-Hermite quadrature of two dimensions, exact for polynomials times the normal density."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite.hermgauss(12))
    noise = torch.cartesian_prod(nodes, nodes) * 2**0.5
    y = loc + noise @ factor.mT
    density = dist.MultivariateNormal(loc, scale_tril=factor).log_prob(y).exp()
    return y, torch.cartesian_prod(weights, weights).prod(-1) / torch.pi / density


LOC, FACTOR = _t(0.3, -0.2), torch.tensor([[0.7, 0.0], [0.4, 1.3]], dtype=F64)
SHARES = _t(0.2, 0.5, 0.3)
COUNTS = torch.tensor([c for c in product(range(5), repeat=3) if sum(c) == 4], dtype=F64)

KNOWN: dict[str, tuple[Callable[[], Any], Callable[[], Integral]]] = {
    "Normal": (lambda: dist.Normal(_t(0.4), _t(0.7)), lambda: _line(0.4)),
    "LogNormal": (lambda: dist.LogNormal(_t(0.4), _t(0.7)), _half_line),
    "Laplace": (lambda: dist.Laplace(_t(0.4), _t(0.7)), lambda: _line(0.4)),
    "Cauchy": (lambda: dist.Cauchy(_t(0.4), _t(0.7)), lambda: _line(0.4)),
    "StudentT": (lambda: dist.StudentT(_t(3.5), _t(0.4), _t(0.7)), lambda: _line(0.4)),
    "StudentT, many degrees of freedom": (lambda: dist.StudentT(_t(60.0), _t(0.4), _t(0.7)), lambda: _line(0.4)),
    "Bernoulli, probs": (lambda: dist.Bernoulli(_t(0.3)), lambda: _counts(2)),
    "Bernoulli, logits": (lambda: dist.Bernoulli(logits=_t(-1.3)), lambda: _counts(2)),
    "Binomial": (lambda: dist.Binomial(7, _t(0.3)), lambda: _counts(8)),
    "Binomial, a count each": (lambda: dist.Binomial(_t(7.0), logits=_t(0.3)), lambda: _counts(8)),
    "Categorical": (lambda: dist.Categorical(SHARES[None]), lambda: _counts(3)),
    "OneHotCategorical": (lambda: dist.OneHotCategorical(SHARES[None]), lambda: (torch.eye(3).to(F64), torch.ones(3))),
    "Multinomial": (lambda: dist.Multinomial(4, SHARES[None]), lambda: (COUNTS, torch.ones(len(COUNTS)))),
    "Poisson": (lambda: dist.Poisson(_t(2.5)), lambda: _counts(60)),
    "Exponential": (lambda: dist.Exponential(_t(2.5)), _half_line),
    "HalfNormal": (lambda: dist.HalfNormal(_t(2.5)), _half_line),
    "Gamma": (lambda: dist.Gamma(_t(2.5), _t(1.7)), _half_line),
    "Gamma below one": (lambda: dist.Gamma(_t(0.6), _t(1.7)), _half_line),
    "NegativeBinomial, probs": (lambda: dist.NegativeBinomial(_t(2.5), _t(0.4)), lambda: _counts(120)),
    "NegativeBinomial, logits": (lambda: dist.NegativeBinomial(_t(2.5), logits=_t(0.2)), lambda: _counts(150)),
    "MultivariateNormal": (
        lambda: dist.MultivariateNormal(LOC[None], scale_tril=FACTOR),
        lambda: _plane(LOC, FACTOR),
    ),
    "MultivariateNormal, covariance": (
        lambda: dist.MultivariateNormal(LOC[None], covariance_matrix=FACTOR @ FACTOR.mT),
        lambda: _plane(LOC, FACTOR),
    ),
}
"""Every family with an information root, of one row, and how to integrate over what it may observe."""


def _read(fn: Any, value: Tensor, weight: float = 1.0) -> Family:
    record = Record(fn, value, True, None, ())
    return read_family("obs", record, torch.full(fn.batch_shape, weight, dtype=F64))


def _expected_outer_score(fn: Any, integral: Integral) -> Tensor:
    """E[s s^T] for the score s in unconstrained parameters: the Fisher information."""
    values, weights = integral
    many = _read(fn.expand([len(values)]), values.long() if isinstance(fn, dist.Categorical) else values)
    log_prob = many.log_prob(many.eta)
    score = grad(lambda eta: many.log_prob(eta).sum())(many.eta)
    mass = weights.to(F64) * log_prob.exp()
    torch.testing.assert_close(mass.sum(), torch.ones((), dtype=F64), rtol=0, atol=1e-9)
    return torch.einsum("r,rp,rq->pq", mass, score, score)


@pytest.mark.parametrize("name", KNOWN)
def test_information_root_is_the_expected_curvature(name: str) -> None:
    make, integral = KNOWN[name]
    fn = make()
    wanted = _expected_outer_score(fn, integral())
    family = _read(fn, torch.zeros(fn.batch_shape + fn.event_shape, dtype=F64), weight=2.5)
    root = family.information_root(family.eta)[0]
    unknown = list(family.unknown_columns)
    wanted[unknown], wanted[:, unknown] = 0.0, 0.0
    torch.testing.assert_close(root @ root.mT, 2.5 * wanted, rtol=1e-8, atol=1e-9)


def test_every_known_family_is_tested() -> None:
    tested = {information_root.dispatch(type(make())) for make, _ in KNOWN.values()}
    assert tested == {root for kind, root in information_root.registry.items() if kind is not object}


def test_unknown_columns_belong_to_the_parameter() -> None:
    counts = _read(dist.NegativeBinomial(_t(2.5), _t(0.4)), _t(3.0))
    assert counts.unknown_columns == {0: "total_count"}
    vectors = _read(dist.MultivariateNormal(LOC[None], scale_tril=FACTOR), LOC[None])
    assert vectors.unknown_columns == dict.fromkeys((2, 3, 4), "scale_tril")
    assert _read(dist.Normal(_t(0.0), _t(1.0)), _t(0.0)).unknown_columns == {}


def test_many_degrees_of_freedom_leave_the_scale_its_information() -> None:
    # In single precision nothing is left of the information about df = 1e5; that about the scale stands.
    fn = dist.StudentT(torch.tensor([1e5]), torch.tensor([0.0]), torch.tensor([2.0]))
    root = information_root(fn)[0]
    torch.testing.assert_close((root @ root.mT)[1:, 1:], torch.diag(torch.tensor([0.25, 2.0])), rtol=1e-4, atol=1e-6)
    assert (root @ root.mT)[0, 0] < 1e-2


FAMILIES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "Normal": (lambda a: dist.Normal(a, (0.2 * a).exp()), _t(0.3, -1.0, 2.0)),
    "LogNormal": (lambda a: dist.LogNormal(a, 0.7), _t(0.3, 1.0, 2.0)),
    "Laplace": (lambda a: dist.Laplace(a, (0.2 * a).exp()), _t(0.3, -1.0, 2.0)),
    "Cauchy": (lambda a: dist.Cauchy(a, 0.7), _t(0.3, -1.0, 2.0)),
    "StudentT": (lambda a: dist.StudentT((1 + a).exp(), a, 0.7), _t(0.3, -1.0, 2.0)),
    "Bernoulli": (lambda a: dist.Bernoulli(logits=a), _t(0, 1, 1)),
    "Bernoulli of integers": (lambda a: dist.Bernoulli(a.sigmoid()), torch.tensor([0, 1, 1])),
    "Binomial": (lambda a: dist.Binomial(5, logits=a), _t(0, 5, 2)),
    "Categorical": (lambda a: dist.Categorical(logits=a * _t(0, 1, 2)), torch.tensor([0, 2, 1])),
    "OneHotCategorical": (lambda a: dist.OneHotCategorical(logits=a * _t(0, 1, 2)), torch.eye(3, dtype=F64)),
    "Poisson": (lambda a: dist.Poisson(a.exp()), _t(0, 5, 2)),
    "Poisson of integers": (lambda a: dist.Poisson(a.exp()), torch.tensor([0, 5, 2])),
    "Exponential": (lambda a: dist.Exponential(a.exp()), _t(0.3, 1.0, 2.0)),
    "HalfNormal": (lambda a: dist.HalfNormal(a.exp()), _t(0.3, 1.0, 2.0)),
    "Gamma": (lambda a: dist.Gamma((0.3 * a).exp(), a.exp()), _t(0.3, 1.0, 2.0)),
    "NegativeBinomial": (lambda a: dist.NegativeBinomial(2.5, logits=a), _t(0, 5, 2)),
    "MultivariateNormal": (lambda a: dist.MultivariateNormal(a * LOC, scale_tril=FACTOR), torch.eye(3, 2, dtype=F64)),
    "BetaBinomial": (lambda a: dist.BetaBinomial(a.exp(), (2 * a).exp(), 5), _t(0, 5, 2)),
    "ZeroInflatedPoisson": (lambda a: dist.ZeroInflatedPoisson(a.exp(), gate=a.sigmoid()), _t(0, 5, 2)),
    "ZeroInflatedPoisson, logits": (lambda a: dist.ZeroInflatedPoisson(a.exp(), gate_logits=a), _t(0, 5, 2)),
    "ZeroInflatedNegativeBinomial": (
        lambda a: dist.ZeroInflatedNegativeBinomial(a.exp(), logits=a, gate=a.sigmoid()),
        _t(0, 5, 2),
    ),
    "GammaPoisson": (lambda a: dist.GammaPoisson(a.exp(), _t(1.5)), _t(0, 5, 2)),
    "Geometric": (lambda a: dist.Geometric(logits=a), _t(0, 5, 2)),
    "Beta": (lambda a: dist.Beta(a.exp(), (2 * a).exp()), _t(0.3, 0.5, 0.9)),
    "Dirichlet": (lambda a: dist.Dirichlet((a * _t(0, 1, 2)).exp()), SHARES.expand(3, 3)),
    "DirichletMultinomial": (lambda a: dist.DirichletMultinomial((a * _t(0, 1, 2)).exp(), 4), COUNTS[[0, 4, 9]]),
    "Chi2": (lambda a: dist.Chi2(a.exp()), _t(0.3, 1.0, 2.0)),
    "InverseGamma": (lambda a: dist.InverseGamma(a.exp(), 2.0), _t(0.3, 1.0, 2.0)),
    "Weibull": (lambda a: dist.Weibull(a.exp(), 1.5), _t(0.3, 1.0, 2.0)),
    "VonMises": (lambda a: dist.VonMises(a, 2.0), _t(0.3, 1.0, -2.0)),
    "Gumbel": (lambda a: dist.Gumbel(a, 2.0), _t(0.3, 1.0, -2.0)),
    "Logistic": (lambda a: dist.Logistic(a, 2.0), _t(0.3, 1.0, -2.0)),
    "MultivariateStudentT": (lambda a: dist.MultivariateStudentT(4.0, a * LOC, FACTOR), torch.eye(3, 2, dtype=F64)),
    "LowRankMultivariateNormal": (
        lambda a: dist.LowRankMultivariateNormal(a * LOC, FACTOR[:, :1], LOC.exp()),
        torch.eye(3, 2, dtype=F64),
    ),
}
"""What three rows may observe, as a function of a latent number, with what they observed."""


def _task(make: Callable[[Tensor], Any], y: Tensor, mask: Tensor | None = None) -> TaskDensity:
    def model(y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(_t(0.2).squeeze(), 1.0))
        with pyro.plate("data", ROWS):
            pyro.sample("obs", make(a), obs=y)

    density = from_model(model, {"y": y})
    return TaskDensity(density, density.prior, {"y": y}, mask)


Z = _t(0.4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_family_rebuilt_has_the_same_log_prob(name: str, masked: bool) -> None:
    mask = torch.tensor([True, True, False]) if masked else None
    task = _task(*FAMILIES[name], mask)
    family = task.observations(Z)["obs"]
    wanted = task.density.log_likelihood(Z, task.prior, task.data, mask)["obs"]
    torch.testing.assert_close(family.log_prob(family.eta), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_a_function_of_its_parameters(name: str) -> None:
    # The slope along the latent is the chain rule's through eta: nothing else of the distribution depends on it.
    task = _task(*FAMILIES[name])
    family = task.observations(Z)["obs"]
    slope = jacrev(lambda z: task.observations(z)["obs"].eta)(Z)
    score = grad(lambda eta: family.log_prob(eta).sum())(family.eta)
    wanted = grad(task.log_likelihood)(Z)
    torch.testing.assert_close(torch.einsum("rp,rpd->d", score, slope), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_ggn_and_empirical_fisher_rows(name: str) -> None:
    task = _task(*FAMILIES[name])
    score_rows, _ = likelihood_rows(task, Z, "empirical_fisher")
    assert score_rows.shape == (ROWS, 1)
    torch.testing.assert_close(score_rows.sum(0), grad(task.log_likelihood)(Z), rtol=1e-9, atol=1e-9)
    rows, raised = likelihood_rows(task, Z, "ggn")
    assert torch.isfinite(rows).all()
    together = vmap(lambda z: likelihood_rows(task, z, "ggn")[0])(torch.stack([Z, Z + 1]))
    torch.testing.assert_close(together[0], rows)
    if name in LINEAR:
        assert raised == 0
        torch.testing.assert_close(rows.mT @ rows, exact_hessian(task.log_likelihood, Z), rtol=1e-9, atol=1e-9)


LINEAR = {
    "LogNormal",
    "Bernoulli",
    "Bernoulli of integers",
    "Binomial",
    "Categorical",
    "OneHotCategorical",
    "Poisson",
    "Exponential",
    "HalfNormal",
    "NegativeBinomial",
    "MultivariateNormal",
}
"""Families whose log-probability is concave in eta, and eta linear in the latent above."""


def test_independent_expanded_masked_and_scaled_sites_are_read_row_by_row() -> None:
    y = torch.randn(2, 3, 4, dtype=F64)
    mask = torch.tensor([True, False, True, True])
    rows: Any = torch.tensor([True, False])

    def model(y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
        fn = dist.Normal(a[:, None], 1.5).expand([2, 3, 4]).mask(mask).to_event(2)
        with pyro.plate("data", 2), pyro.poutine.scale(scale=2.5), pyro.poutine.mask(mask=rows):
            pyro.sample("obs", fn, obs=y)

    density = from_model(model, {"y": y})
    z = _t(0.1, -0.4, 1.2)
    for real in (None, torch.tensor([True, False])):
        task = TaskDensity(density, density.prior, {"y": y}, real)
        family = task.observations(z)["obs"]
        assert family.eta.shape == (24, 2)
        torch.testing.assert_close(family.log_prob(family.eta).sum(), task.log_likelihood(z), rtol=1e-12, atol=1e-12)
        found, _ = likelihood_rows(task, z, "fisher")
        torch.testing.assert_close(found.mT @ found, exact_hessian(task.log_likelihood, z), rtol=1e-12, atol=1e-12)


def test_two_sites_in_nested_plates_are_both_read() -> None:
    y, n = torch.randn(3, 2, dtype=F64), torch.tensor([[1, 0], [4, 2], [0, 0]])

    def model(y: Tensor | None = None, n: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("columns", 2, dim=-1), pyro.plate("data", 3, dim=-2):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)
            pyro.sample("n", dist.Poisson(a.exp()), obs=n)

    density = from_model(model, {"y": y, "n": n})
    task = TaskDensity(density, density.prior, {"y": y, "n": n}, torch.tensor([True, True, False]))
    sites = task.observations(Z)
    assert {name: site.weight.tolist() for name, site in sites.items()} == dict.fromkeys(("y", "n"), [1, 1, 1, 1, 0, 0])
    total = torch.stack([site.log_prob(site.eta).sum() for site in sites.values()]).sum()
    torch.testing.assert_close(total, task.log_likelihood(Z), rtol=1e-12, atol=1e-12)


def _outlier(a: Tensor) -> Any:
    parts = dist.Normal(torch.stack([a, -a], -1), 1.0)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2, dtype=F64)), parts)


@pytest.mark.parametrize(
    ("make", "y", "what"),
    [
        (_outlier, _t(0.1, 0.2, 0.3), "MixtureSameFamily, which shows no parameters"),
        (lambda a: dist.Uniform(-1 - a.exp(), 5.0), _t(0.1, 0.2, 0.3), "Uniform, whose 'low' depends"),
        (
            lambda a: dist.ZeroInflatedDistribution(dist.Poisson(a.exp()), gate=a.sigmoid()),
            _t(0, 1, 2),
            "ZeroInflatedDistribution, which is made of more",
        ),
        (lambda a: dist.FoldedDistribution(dist.Normal(a, 1.0)), _t(0.1, 0.2, 0.3), "FoldedDistribution"),
    ],
)
def test_a_distribution_without_readable_parameters_is_named(
    make: Callable[[Tensor], Any], y: Tensor, what: str
) -> None:
    with pytest.raises(ValueError, match=rf"'obs' is {what}.*write curvature=\"exact\""):
        _task(make, y).observations(Z)


def test_a_factor_is_named() -> None:
    def model(y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(_t(0.2).squeeze(), 1.0))
        pyro.factor("penalty", -(a**4))
        with pyro.plate("data", ROWS):
            pyro.sample("obs", dist.Normal(a, 1.0), obs=y)

    y = _t(0.1, 0.2, 0.3)
    density = from_model(model, {"y": y})
    with pytest.raises(ValueError, match=r"'penalty' is a pyro.factor.*write curvature=\"exact\""):
        TaskDensity(density, density.prior, {"y": y}).observations(Z)


@pytest.mark.parametrize("name", ["Chi2", "Beta", "Weibull"])
def test_a_family_without_a_root_is_named(name: str) -> None:
    # Chi2 is a Gamma, of another parameter.
    with pytest.raises(ValueError, match=rf"information of {name}, observed at site 'obs', is not known"):
        likelihood_rows(_task(*FAMILIES[name]), Z, "fisher")


def test_a_root_is_not_inherited_by_other_parameters() -> None:
    # An OrderedLogistic is a Categorical of as many columns.
    family = _read(dist.OrderedLogistic(_t(0.3), _t(-1.0, 0.5)), torch.tensor([2]))
    assert family.eta.shape == (1, 3)
    with pytest.raises(ValueError, match="OrderedLogistic"):
        family.information_root(family.eta)


def test_missing_values_of_a_subclass_are_not_counted_as_known() -> None:
    fn = dist.NanMaskedNormal(_t(0.0, 0.0), _t(1.0, 1.0))
    family = _read(fn, _t(float("nan"), 1.0))
    assert family.log_prob(family.eta)[0] == 0
    with pytest.raises(ValueError, match="NanMaskedNormal"):
        family.information_root(family.eta)


def test_a_rebuilt_family_can_be_recorded() -> None:
    # A StudentT makes a Chi2 for itself, which looked at its values to validate them.
    family = _read(dist.StudentT(_t(4.0, 4.0), _t(0.0, 1.0), _t(1.0, 2.0)), _t(0.3, 0.4))
    graph = make_fx(lambda eta: family.log_prob(eta))(family.eta)
    torch.testing.assert_close(graph(family.eta + 0.1), family.log_prob(family.eta + 0.1))
