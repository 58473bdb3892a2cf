"""Curvatures against naive loops, automatic differentiation, and each other."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from bmaml_ppl.density import from_model
from bmaml_ppl.inference import curvature as module
from bmaml_ppl.inference.curvature import (
    Arrow,
    Curvature,
    Form,
    Measured,
    arrow_prior,
    diagonal,
    dual,
    exact_hessian,
    kronecker,
    likelihood_rows,
    measure_curvature,
    prior_hessian,
    repair_dense,
)
from bmaml_ppl.inference.curvature_checks import check_curvature
from bmaml_ppl.inference.derivatives import equilibrate
from bmaml_ppl.inference.precision import Diagonal, Dual, Kronecker
from bmaml_ppl.models import hierarchical_regression
from bmaml_ppl.task_density import TaskDensity
from bmaml_ppl.types import Model

F64 = torch.float64


def _bind(model: Model, data: dict[str, Tensor], mask: Tensor | None = None) -> TaskDensity:
    density = from_model(model, data)
    prior = {name: value.to(F64) for name, value in density.prior.items()}
    return TaskDensity(density, prior, data, mask)


def _matrix(measured: Measured) -> Tensor:
    """The precision as a matrix, by products with unit vectors."""
    return vmap(measured.precision.multiply)(torch.eye(_dim(measured.precision), dtype=F64)).mT


def _dim(precision: Any) -> int:
    return precision.rows.shape[-1] if isinstance(precision, Dual) else precision.noise_dim


def _assert_is_matrix(measured: Measured, matrix: Tensor) -> None:
    """Multiply, solve, log det and the covariance of draws, each to 1e-8."""
    precision, v = measured.precision, torch.randn(len(matrix), dtype=F64)
    colour = jacrev(precision.colour)(torch.zeros(precision.noise_dim, dtype=F64))
    for got, wanted in (
        (_matrix(measured), matrix),
        (precision.multiply(v), matrix @ v),
        (precision.solve(v), torch.linalg.solve(matrix, v)),
        (precision.log_det(), torch.linalg.slogdet(matrix).logabsdet),
        (colour @ colour.mT, torch.linalg.inv(matrix)),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def _regression(family: Callable[[Tensor], Any]) -> Model:
    """Three coefficients of a linear predictor, seen through a family."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        coef = pyro.sample("coef", dist.Normal(torch.zeros(3, dtype=F64), 1.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", family(x @ coef), obs=y)

    return model


def _inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


CLASSES = torch.tensor([0.0, 1.0, -0.5], dtype=F64)
CANONICAL: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "Normal": (lambda f: dist.Normal(f, 0.7), torch.linspace(-1, 1, 6, dtype=F64)),
    "Bernoulli": (lambda f: dist.Bernoulli(logits=f), torch.tensor([0.0, 1, 1, 0, 1, 0], dtype=F64)),
    "Binomial": (lambda f: dist.Binomial(4, logits=f), torch.tensor([0.0, 1, 4, 2, 1, 3], dtype=F64)),
    "Categorical": (lambda f: dist.Categorical(logits=f[:, None] * CLASSES), torch.tensor([0, 1, 2, 2, 1, 0])),
    "Poisson": (lambda f: dist.Poisson(f.exp()), torch.tensor([0.0, 1, 4, 2, 1, 3], dtype=F64)),
    "MultivariateNormal": (
        lambda f: dist.MultivariateNormal(f[:, None] * CLASSES, torch.eye(3, dtype=F64) + 0.2),
        torch.linspace(-1, 1, 18, dtype=F64).reshape(6, 3),
    ),
}
Z3 = torch.tensor([0.3, -0.6, 0.2], dtype=F64)


@pytest.mark.parametrize("name", CANONICAL)
@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_canonical_linear_models_have_their_hessian(name: str, kind: Curvature) -> None:
    family, y = CANONICAL[name]
    task = _bind(_regression(family), {"x": _inputs(6, 3), "y": y})
    measured = measure_curvature(task, Z3, kind)
    assert measured.repair == 0
    _assert_is_matrix(measured, exact_hessian(task, Z3))


def bent(x: Tensor, y: Tensor | None = None, n: Tensor | None = None) -> None:
    """A curved mean with a latent noise, and counts whose log rate is not linear in the latents."""
    sd = pyro.param("sd", torch.tensor(0.8, dtype=F64), constraint=dist.constraints.positive)
    noise = pyro.sample("noise", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    w = pyro.sample("w", dist.Normal(torch.full((5,), 0.1, dtype=F64), sd * noise).to_event(1))
    mean = torch.tanh(x * w[0] + w[1]) * w[2] + w[3]
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, noise), obs=y)
        pyro.sample("n", dist.Poisson((mean * w[4]).exp()), obs=n)


BENT = {
    "x": torch.tensor([-1.0, 0.2, 0.9, 1.5], dtype=F64),
    "y": torch.tensor([-0.8, 0.3, 0.6, 1.4], dtype=F64),
    "n": torch.tensor([0.0, 1.0, 1.0, 3.0], dtype=F64),
}
Z6 = torch.tensor([0.1, 0.7, -0.2, 0.4, 0.3, 0.5], dtype=F64)


def _eta(z: Tensor, i: int) -> Tensor:
    """Mean, log noise and log rate of one observation of `bent`."""
    mean = torch.tanh(BENT["x"][i] * z[1] + z[2]) * z[3] + z[4]
    return torch.stack([mean, z[0], mean * z[5]])


def _log_prob(eta: Tensor, i: int) -> Tensor:
    of_y = dist.Normal(eta[0], eta[1].exp()).log_prob(BENT["y"][i])
    return of_y + dist.Poisson(eta[2].exp()).log_prob(BENT["n"][i])


def _autograd_hessian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    result: Tensor = torch.autograd.functional.hessian(function, at)
    return result


def test_exact_is_the_hessian() -> None:
    task = _bind(bent, BENT)

    def log_prior(z: Tensor) -> Tensor:
        noise = z[0].exp()
        weights = dist.Normal(0.1, 0.8 * noise).log_prob(z[1:]).sum()
        return weights + dist.LogNormal(torch.zeros((), dtype=F64), 0.5).log_prob(noise) + z[0]

    def log_joint(z: Tensor) -> Tensor:
        return log_prior(z) + torch.stack([_log_prob(_eta(z, i), i) for i in range(4)]).sum()

    torch.testing.assert_close(exact_hessian(task, Z6), -_autograd_hessian(log_joint, Z6))
    torch.testing.assert_close(prior_hessian(task, Z6), -_autograd_hessian(log_prior, Z6))


def _naive(kind: str) -> Tensor:
    total = torch.zeros(6, 6, dtype=F64)
    for i in range(4):
        slope = torch.autograd.functional.jacobian(lambda z: _eta(z, i), Z6)  # noqa: B023
        eta = _eta(Z6, i)
        if kind == "empirical_fisher":
            of_y = jacrev(lambda eta: dist.Normal(eta[0], eta[1].exp()).log_prob(BENT["y"][i]))(eta) @ slope  # noqa: B023
            of_n = jacrev(lambda eta: dist.Poisson(eta[2].exp()).log_prob(BENT["n"][i]))(eta) @ slope  # noqa: B023
            total += of_y.outer(of_y) + of_n.outer(of_n)
            continue
        block = torch.diag(torch.stack([torch.exp(-2 * eta[1]), 2 * torch.ones((), dtype=F64), eta[2].exp()]))
        if kind == "ggn":
            block = -_autograd_hessian(lambda eta: _log_prob(eta, i), eta)  # noqa: B023
            lowest = torch.linalg.eigvalsh(block[:2, :2])[0]
            assert lowest < 0  # a normal with a latent scale always has one
            block[:2, :2] -= 2 * lowest * torch.eye(2, dtype=F64)
        total += slope.mT @ block @ slope
    return total


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical_fisher"])
def test_rows_are_a_loop_over_observations(kind: Literal["ggn", "fisher", "empirical_fisher"]) -> None:
    task = _bind(bent, BENT)
    rows, raised = likelihood_rows(task, Z6, kind)
    torch.testing.assert_close(rows.mT @ rows, _naive(kind), rtol=1e-9, atol=1e-9)
    assert bool(raised > 0) == (kind == "ggn")
    measured = measure_curvature(task, Z6, kind)
    wanted = prior_hessian(task, Z6) + _naive(kind)
    assert torch.linalg.eigvalsh(wanted)[0] > 0
    _assert_is_matrix(measured, wanted)
    torch.testing.assert_close(measured.repair, raised, atol=1e-9, rtol=0)


def test_a_parameter_that_is_no_latent_does_not_blur_the_others() -> None:
    # Degrees of freedom and scale are latent, and the location between them is not.
    def model(y: Tensor | None = None) -> None:
        v = pyro.sample("v", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.StudentT((1 + v[0]).exp(), torch.zeros((), dtype=F64), v[1].exp()), obs=y)

    y = torch.tensor([0.4, -1.1, 0.9], dtype=F64)
    task, z = _bind(model, {"y": y}), torch.tensor([0.1, -0.3], dtype=F64)

    def log_prob(z: Tensor, i: int) -> Tensor:
        return dist.StudentT((1 + z[0]).exp(), 0.0, z[1].exp()).log_prob(y[i])

    wanted, excess = torch.zeros(2, 2, dtype=F64), torch.zeros((), dtype=F64)
    for i in range(3):
        block = -_autograd_hessian(lambda z: log_prob(z, i), z)  # noqa: B023
        lowest = torch.linalg.eigvalsh(block)[0]
        wanted += block + torch.relu(-2 * lowest) * torch.eye(2, dtype=F64)
        excess = torch.maximum(excess, -lowest / block.abs().amax())
    rows, raised = likelihood_rows(task, z, "ggn")
    torch.testing.assert_close(rows.mT @ rows, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(raised, excess.relu())


def _network(precisions: Literal["latent", "learned"]) -> tuple[TaskDensity, Tensor]:
    """A task of a small network with more coordinates than the dense form is for, at a point of positive curvature."""
    model = hierarchical_regression((1, 10, 10, 1), precisions=precisions, center="learned", activation=torch.tanh)
    x = torch.linspace(-1, 1, 5, dtype=F64)
    task = _bind(model, {"x": x, "y": torch.sin(3 * x)})
    generator = torch.Generator().manual_seed(0)
    z = task.prior["theta"] + 0.1 * torch.randn(141, dtype=F64, generator=generator)
    return task, torch.cat([torch.tensor([1.0, -0.3], dtype=F64), z]) if precisions == "latent" else z


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("precisions", ["latent", "learned"])
def test_the_dual_form_is_the_dense_one(kind: Curvature, precisions: Literal["latent", "learned"]) -> None:
    task, z = _network(precisions)
    sites = task.density.sites
    dense = measure_curvature(task, z, kind, "dense", sites)
    measured = measure_curvature(task, z, kind, "dual", sites)
    assert isinstance(measured.precision, Dual)
    assert measured.precision.select.shape[1] == (2 if precisions == "latent" else 0)
    assert dense.repair == measured.repair
    assert dense.flat == -1
    assert measured.flat == -1
    rows, _ = likelihood_rows(task, z, kind)  # type: ignore[arg-type]
    matrix = prior_hessian(task, z) + rows.mT @ rows
    assert torch.linalg.eigvalsh(matrix)[0] > 0
    _assert_is_matrix(dense, matrix)
    _assert_is_matrix(measured, matrix)


def test_auto_is_exact_for_few_and_dual_for_many_coordinates() -> None:
    task, z = _network("learned")
    assert isinstance(measure_curvature(task, z, "auto", sites=task.density.sites).precision, Dual)
    few = _bind(bent, BENT)
    _assert_is_matrix(measure_curvature(few, Z6, "auto"), exact_hessian(few, Z6))


def test_diagonal_is_the_fishers() -> None:
    task, z = _network("latent")
    rows, _ = likelihood_rows(task, z, "fisher")
    wanted = (prior_hessian(task, z) + rows.mT @ rows).diagonal()
    _assert_is_matrix(measure_curvature(task, z, "diagonal", sites=task.density.sites), torch.diag(wanted))


def test_arrow_holds_the_whole_prior() -> None:
    task, z = _network("latent")
    prior = arrow_prior(task.log_prior, z, [0, 1])
    matrix = torch.diag(prior.diagonal) + prior.couple @ prior.select.mT + prior.select @ prior.couple.mT
    torch.testing.assert_close(matrix + prior.select @ prior.small @ prior.select.mT, prior_hessian(task, z))


def _layer(out: int, num: int) -> tuple[TaskDensity, Tensor]:
    """One linear layer with weights (out, 4) and a bias (out,), all in one site, of `num` observations."""
    size = 4 * out + out

    def model(x: Tensor, y: Tensor | None = None) -> None:
        flat: Any = {"shapes": [(out, 4), (out,)]}
        w = pyro.sample("w", dist.Normal(torch.zeros(size, dtype=F64), 2.0).to_event(1), infer=flat)
        with pyro.plate("data", num):
            mean = x @ w[: 4 * out].reshape(out, 4).mT + w[4 * out :]
            pyro.sample("obs", dist.Normal(mean, 0.5).to_event(1), obs=y)

    task = _bind(model, {"x": _inputs(num, 4), "y": _inputs(num, out)})
    return task, torch.linspace(-1, 1, size, dtype=F64)


def test_kronecker_is_exact_for_one_observation_of_a_linear_layer() -> None:
    task, z = _layer(3, 1)
    rows, _ = likelihood_rows(task, z, "fisher")
    # Damping by a prior would add cross terms: almost none is left of it.
    nothing = Arrow(torch.full((15,), 1e-24, dtype=F64), *arrow_prior(task.log_prior, z, [])[1:])
    measured = kronecker(nothing, rows, [(3, 4), (3, 1)])
    whole = rows.mT @ rows
    wanted = torch.block_diag(whole[:12, :12], whole[12:, 12:])
    torch.testing.assert_close(_matrix(measured), wanted, rtol=1e-8, atol=1e-8)
    assert whole[:12, 12:].abs().amax() > 0.1


@pytest.mark.parametrize("num", [1, 5])
def test_kronecker_damps_its_factors_by_the_prior(num: int) -> None:
    task, z = _layer(3, num)
    measured = measure_curvature(task, z, "kronecker", sites=task.density.sites)
    assert isinstance(measured.precision, Kronecker)
    rows, _ = likelihood_rows(task, z, "fisher")
    blocks = rows[:, :12].reshape(-1, 3, 4)
    total = blocks.square().sum().sqrt()
    first, second = (blocks @ blocks.mT).sum(0) / total, (blocks.mT @ blocks).sum(0) / total
    balance = (first.trace() / 3 / (second.trace() / 4)).sqrt()
    left = first + balance * 0.5 * torch.eye(3, dtype=F64)
    right = second + 0.5 / balance * torch.eye(4, dtype=F64)
    bias = rows[:, 12:].mT @ rows[:, 12:] + 0.25 * torch.eye(3, dtype=F64)
    _assert_is_matrix(measured, torch.block_diag(torch.kron(left, right), bias))


def test_kronecker_of_no_observations_is_the_prior() -> None:
    task, z = _layer(3, 2)
    task = TaskDensity(task.density, task.prior, task.data, torch.tensor([False, False]))
    _assert_is_matrix(measure_curvature(task, z, "kronecker", sites=task.density.sites), 0.25 * torch.eye(15).to(F64))


class Flat(NamedTuple):
    """A site without shapes."""

    start: int
    stop: int
    shapes: tuple[tuple[int, ...], ...] | None = None


def test_kronecker_refuses_a_long_vector() -> None:
    with pytest.raises(ValueError, match=r"vector of 600 at site 'w'.*infer=\{\"shapes\""):
        module.matrix_shapes({"w": Flat(0, 600)}, 600)
    found = module.matrix_shapes({"a": Flat(0, 40), "w": Flat(40, 100, ((4, 5, 2), (20,)))}, 100)
    assert found == [(40, 1), (4, 10), (20, 1)]


def test_an_indefinite_hessian_takes_absolute_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=generator)).Q
    values = torch.tensor([-0.4, 0.7, 2.0], dtype=F64)
    # In coordinates of equal curvature: scaled so that each row's largest entry is 1.
    scale = equilibrate(rotation @ torch.diag(values) @ rotation.mT)
    hessian = scale[:, None] * (rotation @ torch.diag(values) @ rotation.mT) * scale
    again = equilibrate(hessian)
    scaled = again[:, None] * hessian * again
    lowest, vectors = torch.linalg.eigh(scaled)
    assert lowest[0] < -0.1
    wanted = (vectors * lowest.abs()) @ vectors.mT / again[:, None] / again
    measured = repair_dense(hessian)
    torch.testing.assert_close(measured.repair, -2 * lowest[0])
    assert measured.flat == -1
    _assert_is_matrix(measured, wanted)


def test_a_definite_hessian_is_left_as_it_is() -> None:
    hessian = torch.tensor([[2e6, 30.0], [30.0, 1e-3]], dtype=F64)  # curvatures that differ a billion times
    measured = repair_dense(hessian)
    assert measured.repair == 0
    assert measured.flat == -1
    torch.testing.assert_close(_matrix(measured), hessian, rtol=1e-12, atol=0)


def test_flat_directions_are_named() -> None:
    flat = repair_dense(torch.diag(torch.tensor([2.0, 0.0, 3.0], dtype=F64)))
    assert flat.flat == 1
    assert flat.repair > 0
    shared = repair_dense(torch.block_diag(torch.eye(2, dtype=F64), torch.ones(2, 2, dtype=F64)))
    assert shared.flat in (2, 3)
    assert torch.isfinite(shared.precision.log_det())


def _arrow(along: list[float]) -> Arrow:
    none = torch.zeros(len(along), 0, dtype=F64)
    return Arrow(torch.tensor(along, dtype=F64), none, none, torch.zeros(0, 0, dtype=F64))


@pytest.mark.parametrize("form", ["dual", "diagonal", "kronecker"])
def test_other_forms_raise_the_priors_diagonal(form: str) -> None:
    rows = torch.zeros(1, 3, dtype=F64)

    def measured(along: list[float]) -> Measured:
        if form == "kronecker":
            return kronecker(_arrow(along), rows, [(3, 1)])
        return (dual if form == "dual" else diagonal)(_arrow(along), rows)

    repaired = measured([-2.0, 3.0, 1.0])
    _assert_is_matrix(repaired, torch.diag(torch.tensor([2.0, 3.0, 1.0], dtype=F64)))
    torch.testing.assert_close(repaired.repair, torch.tensor(4 / 3, dtype=F64))
    assert repaired.flat == -1
    assert measured([2.0, 3.0, 1.0]).repair == 0
    flat = measured([2.0, 3.0, 0.0])
    assert flat.flat == 2
    assert flat.repair > 0
    assert torch.isfinite(flat.precision.log_det())


def test_small_coordinates_of_the_dual_form_are_repaired_and_named() -> None:
    select = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    few = Arrow(torch.tensor([2.0, 0, 0], dtype=F64), select, torch.zeros(3, 2).to(F64), torch.diag(Z3[:2]) * 0)
    prior = few._replace(small=torch.diag(torch.tensor([-4.0, 5.0], dtype=F64)))
    rows = torch.zeros(1, 3, dtype=F64)
    repaired = dual(prior, rows)
    assert repaired.repair > 0
    assert repaired.flat == -1
    _assert_is_matrix(repaired, torch.diag(torch.tensor([2.0, 4.0, 5.0], dtype=F64)))
    flat = dual(few._replace(small=torch.diag(torch.tensor([4.0, 0.0], dtype=F64))), rows)
    assert flat.flat == 2


EVERY: tuple[tuple[Curvature, Form], ...] = (
    ("exact", "auto"),
    ("ggn", "dense"),
    ("fisher", "dense"),
    ("empirical_fisher", "dense"),
    ("ggn", "dual"),
    ("fisher", "dual"),
    ("diagonal", "auto"),
    ("kronecker", "auto"),
)

every_kind = pytest.mark.parametrize(("kind", "form"), EVERY, ids=["-".join(kind) for kind in EVERY])


@pytest.fixture
def small_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalars alone count as small sites, so that a task of six coordinates has a large one."""
    monkeypatch.setattr(module, "_SMALL_SITE", 1)


@every_kind
@pytest.mark.usefixtures("small_sites")
def test_padded_observations_count_for_nothing(kind: Curvature, form: Form) -> None:
    task = _bind(bent, BENT)
    junk = {name: torch.cat([value, torch.tensor([-7.0, 0.0], dtype=F64)]) for name, value in BENT.items()}
    padded = TaskDensity(task.density, task.prior, junk, torch.tensor([True] * 4 + [False] * 2))
    sites = task.density.sites
    plain, masked = (measure_curvature(t, Z6, kind, form, sites) for t in (task, padded))
    torch.testing.assert_close(_matrix(masked), _matrix(plain), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(masked.repair, plain.repair)


@pytest.mark.parametrize(("kind", "form"), [pair for pair in EVERY if pair[0] != "ggn"])
@pytest.mark.usefixtures("small_sites")
@pytest.mark.parametrize("what", ["solve", "colour", "log_det"])
def test_gradients_to_the_point_and_to_parameters_are_finite_differences(
    kind: Curvature, form: Form, what: str
) -> None:
    task = _bind(bent, BENT)
    sites = task.density.sites
    one = measure_curvature(task, Z6, kind, form, sites)
    assert not isinstance(one.precision, Diagonal) or kind == "diagonal"
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(one.precision.noise_dim if what == "colour" else 6, dtype=F64, generator=generator)

    def value(z: Tensor, sd: Tensor) -> Tensor:
        at = TaskDensity(task.density, {"sd": sd}, task.data)
        method = getattr(measure_curvature(at, z, kind, form, sites).precision, what)
        result: Tensor = method() if what == "log_det" else method(v)
        return result

    assert one.repair == 0
    assert torch.autograd.gradcheck(value, (Z6.clone().requires_grad_(), task.prior["sd"].clone().requires_grad_()))


@pytest.mark.usefixtures("small_sites")
@pytest.mark.parametrize(("kind", "form"), [("ggn", "dense"), ("ggn", "dual"), ("kronecker", "auto")])
@pytest.mark.parametrize("what", ["solve", "colour", "log_det"])
def test_gradients_of_a_networks_curvature_are_finite_differences(kind: Curvature, form: Form, what: str) -> None:
    # Its noise is no latent, so that no Gauss-Newton block is raised, and its weights are matrices.
    model = hierarchical_regression((1, 3, 2, 1), precisions="learned", center="learned", activation=torch.tanh)
    x = torch.linspace(-1, 1, 4, dtype=F64)
    task = _bind(model, {"x": x, "y": torch.sin(3 * x)})
    z = torch.linspace(-1, 1, 17, dtype=F64)
    one = measure_curvature(task, z, kind, form, task.density.sites)
    v = torch.randn(one.precision.noise_dim if what == "colour" else 17, dtype=F64)

    def value(z: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        at = TaskDensity(task.density, {**task.prior, "scale": scale, "noise": noise}, task.data)
        method = getattr(measure_curvature(at, z, kind, form, task.density.sites).precision, what)
        result: Tensor = method() if what == "log_det" else method(v)
        return result

    assert one.repair == 0
    given = z, task.prior["scale"], task.prior["noise"]
    assert torch.autograd.gradcheck(value, tuple(value.clone().requires_grad_() for value in given), fast_mode=True)


@pytest.mark.usefixtures("small_sites")
@pytest.mark.parametrize("form", ["dense", "dual"])
def test_batches_are_the_same_as_one_by_one(form: Form) -> None:
    task = _bind(bent, BENT)
    points = torch.stack([Z6, Z6 + 0.1])

    def every(z: Tensor) -> tuple[Tensor, ...]:
        measured = measure_curvature(task, z, "fisher", form, task.density.sites)
        return measured.precision.solve(Z6), measured.precision.log_det(), measured.repair, measured.flat

    together = vmap(every)(points)
    for i in range(2):
        for batched, alone in zip(together, every(points[i]), strict=True):
            torch.testing.assert_close(batched[i], alone)


def test_a_plain_function_has_an_exact_curvature_alone() -> None:
    def log_density(z: Tensor) -> Tensor:
        return -(z**4).sum() - z.prod()

    measured = measure_curvature(log_density, Z3.abs(), "auto")
    _assert_is_matrix(measured, exact_hessian(log_density, Z3.abs()))
    slim = measure_curvature(log_density, Z3.abs(), "diagonal")
    _assert_is_matrix(slim, torch.diag(12 * Z3**2))
    with pytest.raises(ValueError, match='curvature="exact"'):
        measure_curvature(log_density, Z3, "ggn")


def _latent_noise(y: Tensor | None = None) -> None:
    """Vectors whose scale is latent, so that its information is needed."""
    v = pyro.sample("v", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    with pyro.plate("data", 3):
        scale_tril = v[0].exp() * torch.eye(2, dtype=F64)
        pyro.sample("height", dist.MultivariateNormal(v, scale_tril=scale_tril), obs=y)


def _latent_count(y: Tensor | None = None) -> None:
    v = pyro.sample("v", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    with pyro.plate("data", 3):
        pyro.sample("deaths", dist.NegativeBinomial(v[0].exp(), logits=v[1]), obs=y)


def _known_count(y: Tensor | None = None) -> None:
    v = pyro.sample("v", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    size = pyro.param("size", torch.tensor(2.0, dtype=F64), constraint=dist.constraints.positive)
    with pyro.plate("data", 3):
        pyro.sample("deaths", dist.NegativeBinomial(size, logits=v.sum()), obs=y)


Z2 = torch.tensor([0.3, -0.2], dtype=F64)


@pytest.mark.parametrize("kind", ["fisher", "diagonal", "kronecker"])
@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (_latent_noise, torch.eye(3, 2, dtype=F64), r"'scale_tril' at observed site 'height' is not known.*\"ggn\""),
        (_latent_count, torch.ones(3, dtype=F64), r"'total_count' at observed site 'deaths' is not known.*\"ggn\""),
    ],
)
def test_an_unknown_information_that_is_needed_is_refused(
    model: Model, y: Tensor, message: str, kind: Curvature
) -> None:
    task = _bind(model, {"y": y})
    with pytest.raises(ValueError, match=message):
        check_curvature(task, Z2, kind)
    others: tuple[Curvature, ...] = ("auto", "exact", "ggn", "empirical_fisher")
    for other in others:
        check_curvature(task, Z2, other)


def test_an_unknown_information_that_is_not_needed_is_allowed() -> None:
    task = _bind(_known_count, {"y": torch.ones(3, dtype=F64)})
    check_curvature(task, Z2, "fisher")
    measured = measure_curvature(task, Z2, "fisher")
    p = Z2.sum().sigmoid()
    _assert_is_matrix(measured, torch.eye(2, dtype=F64) + 3 * 2 * p * torch.ones(2, 2, dtype=F64))


def test_a_family_without_an_information_is_refused() -> None:
    def model(y: Tensor | None = None) -> None:
        v = pyro.sample("v", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("share", dist.Beta(v[0].exp(), v[1].exp()), obs=y)

    task = _bind(model, {"y": torch.full((3,), 0.4, dtype=F64)})
    with pytest.raises(ValueError, match="Beta, observed at site 'share'"):
        check_curvature(task, Z2, "fisher")
    check_curvature(task, Z2, "ggn")


def _field(y: Tensor | None = None) -> None:
    """A large site whose coordinates depend on each other, beside one whose do not and a small one that may."""
    sd = pyro.sample("sd", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    pyro.sample("free", dist.Normal(torch.zeros(40, dtype=F64), sd).to_event(1))
    near = torch.eye(200, dtype=F64) + torch.diag(torch.full((199,), 0.3, dtype=F64), -1)
    field = pyro.sample("field", dist.MultivariateNormal(torch.zeros(200, dtype=F64), scale_tril=near))
    with pyro.plate("data", 3):
        pyro.sample("obs", dist.Normal(field[:3], 1.0), obs=y)


FIELD_FORMS: tuple[tuple[Curvature, Form], ...] = (
    ("auto", "auto"),
    ("ggn", "dual"),
    ("diagonal", "auto"),
    ("kronecker", "auto"),
)


@pytest.mark.parametrize(("kind", "form"), FIELD_FORMS)
def test_a_large_site_that_is_not_independent_is_refused(kind: Curvature, form: Form) -> None:
    task = _bind(_field, {"y": torch.ones(3, dtype=F64)})
    z, sites = 0.1 * torch.ones(241, dtype=F64), task.density.sites
    with pytest.raises(ValueError, match=r"coordinates of latent site 'field' depend.*form=\"dense\""):
        check_curvature(task, z, kind, form, sites)
    dense: tuple[tuple[Curvature, Form], ...] = (("exact", "auto"), ("ggn", "dense"), ("fisher", "dense"))
    for allowed in dense:
        check_curvature(task, z, *allowed, sites)


def test_a_large_site_that_depends_on_another_is_refused() -> None:
    def model(y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(40, dtype=F64), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.tanh(a), 1.0).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(b[:3], 1.0), obs=y)

    task = _bind(model, {"y": torch.ones(3, dtype=F64)})
    with pytest.raises(ValueError, match="on another large site"):
        check_curvature(task, 0.1 * torch.ones(80, dtype=F64), "fisher", "dual", task.density.sites)


@pytest.mark.parametrize(("kind", "form"), [(k, f) for k, f in EVERY if f != "dense"])
@pytest.mark.parametrize("precisions", ["latent", "learned"])
def test_networks_pass_the_checks(kind: Curvature, form: Form, precisions: Literal["latent", "learned"]) -> None:
    task, z = _network(precisions)
    given: Any = task.data
    for dtype in (torch.float32, F64):
        prior, data = ({k: v.to(dtype) for k, v in part.items()} for part in (task.prior, given))
        check_curvature(TaskDensity(task.density, prior, data), z.to(dtype), kind, form, task.density.sites)


def test_a_plain_function_passes_the_checks() -> None:
    check_curvature(lambda z: -z.square().sum(), Z2, "auto")
