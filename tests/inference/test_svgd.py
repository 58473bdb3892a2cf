"""SVGD: one particle is gradient ascent, many recover a Gaussian, released settings are the authors' step."""

from importlib import import_module
from math import log
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bmaml_ppl.density import from_model
from bmaml_ppl.inference import map_estimate, svgd
from bmaml_ppl.inference.derivatives import FirstOrder
from bmaml_ppl.types import Inference, LogDensity

F64 = torch.float64
SITES: Any = {"a": SimpleNamespace(start=0, stop=1), "b": SimpleNamespace(start=1, stop=3)}


def banana(z: Tensor) -> Tensor:
    return -0.5 * (z[0] - 1) ** 2 - (z[1] - 0.3 * z[0] ** 2) ** 2 - 0.5 * z[2] ** 2


def _run(inference: Inference, particles: Tensor, log_density: LogDensity, steps: int) -> Tensor:
    state = inference.init({"particles": particles})
    for _ in range(steps):
        state = inference.update(state, log_density)
    return state.particles


def _gaussian(dim: int) -> tuple[Tensor, Tensor, LogDensity]:
    """Mean, standard deviations (.05 to 5) and log density of a correlated Gaussian, in float64."""
    mean = torch.linspace(-3, 3, dim, dtype=F64) if dim > 1 else torch.tensor([2.0], dtype=F64)
    sd = torch.logspace(-1.3, 0.7, dim, dtype=F64)
    correlation = 0.5 * torch.eye(dim, dtype=F64) + 0.5
    precision = torch.linalg.inv(sd[:, None] * correlation * sd)
    return mean, sd, lambda z: -0.5 * (z - mean) @ precision @ (z - mean)


@pytest.mark.parametrize("preconditioner", ["auto", "none", "adaptive", "curvature"])
def test_one_particle_is_map_estimate(preconditioner: Any) -> None:
    start = torch.randn(1, 3, dtype=F64)
    single = svgd(num_particles=1, preconditioner=preconditioner)
    point = map_estimate(preconditioner=preconditioner)
    torch.testing.assert_close(_run(single, start, banana, 5), _run(point, start, banana, 5))


@pytest.mark.parametrize("dim", [1, 3, 10])
def test_a_gaussian_is_recovered(dim: int) -> None:
    # Deterministic: from one seeded start, the particles' fixed point.
    mean, sd, log_density = _gaussian(dim)
    start = torch.randn(20, dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    particles = _run(svgd(num_particles=20), start, log_density, 100)
    torch.testing.assert_close(particles.std(0) / sd, torch.ones(dim, dtype=F64), atol=0.1, rtol=0)
    torch.testing.assert_close((particles.mean(0) - mean) / sd, torch.zeros(dim, dtype=F64), atol=0.1, rtol=0)


def _rotated(dim: int) -> tuple[Tensor, LogDensity]:
    """Standard deviations by coordinate, and a normal log density whose own are .1 to 1 along random axes."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(dim, dim, dtype=F64, generator=generator)).Q
    precision = axes * torch.logspace(0, 2, dim, dtype=F64) @ axes.T
    return torch.linalg.inv(precision).diagonal().sqrt(), lambda z: -0.5 * (z - 1) @ precision @ (z - 1)


@pytest.mark.parametrize("num_particles", [10, 20, 50])
@pytest.mark.parametrize("scale", [1.0, 0.05, 0.0])
@pytest.mark.parametrize("dim", [20, 33, 100])
def test_default_steps_keep_the_spread_of_many_latents(dim: int, scale: float, num_particles: int) -> None:
    # Deterministic: the default number of steps from a start that is wide, narrow, or one point for all particles.
    sd, log_density = _rotated(dim)
    start = scale * torch.randn(num_particles, dim, dtype=F64, generator=torch.Generator().manual_seed(1))
    inference = svgd(num_particles=num_particles)
    particles = _run(inference, start, log_density, inference.num_steps)
    torch.testing.assert_close(particles.mean(0), torch.ones(dim, dtype=F64), atol=0.02, rtol=0)
    # One point stays one point where the kernels alone spread it.
    if scale > 0 or num_particles <= dim + 1:
        torch.testing.assert_close(particles.std(0) / sd, torch.ones(dim, dtype=F64), atol=0.1, rtol=0)


def test_above_the_limit_spread_is_lost() -> None:
    start = 0.05 * torch.randn(20, 129, dtype=F64, generator=torch.Generator().manual_seed(1))
    particles = _run(svgd(), start, lambda z: -0.5 * z @ z, 10)
    assert particles.std(0).max() < 0.5


def test_one_particle_keeps_the_steps_of_map_estimate_where_several_would_be_whitened() -> None:
    start = torch.randn(1, 40, dtype=F64, generator=torch.Generator().manual_seed(1))
    log_density = _rotated(40)[1]
    torch.testing.assert_close(
        _run(svgd(num_particles=1), start, log_density, 3), _run(map_estimate(), start, log_density, 3)
    )


def _convex(z: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2, z.shape[-1], dtype=z.dtype)
    return -(weights * z.square()).sum() - torch.logaddexp(z, -z).sum() - 0.1 * z.sum() ** 4


def test_products_with_each_curvature_do_what_the_whole_does() -> None:
    # In as many coordinates as products, Krylov spaces are everything.
    module = import_module("bmaml_ppl.inference.svgd")
    generator = torch.Generator().manual_seed(0)
    particles, direction = (torch.randn(6, 4, dtype=F64, generator=generator) for _ in range(2))
    curvature = -torch.stack([torch.autograd.functional.hessian(_convex, z) for z in particles])
    factor = torch.linalg.cholesky(curvature.mean(0))
    whole = module._shorten_where_sharper(direction, curvature, factor)
    torch.testing.assert_close(module._shorten_by_products(_convex, particles, direction, factor), whole)
    assert (whole.norm(dim=1) < direction.norm(dim=1)).any()


@pytest.mark.parametrize("each_limit", [32, 2])
@pytest.mark.parametrize("num_particles", [2, 4, 6])
def test_gradients_of_whitened_steps_are_finite_differences(
    num_particles: int, each_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Anchored up to four particles; above the limit one Hessian is shared.
    monkeypatch.setattr(import_module("bmaml_ppl.inference.svgd"), "_EACH_LIMIT", each_limit)
    start = torch.randn(num_particles, 3, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    shift = torch.tensor([0.3, -0.2, 0.1], dtype=F64, requires_grad=True)
    inference = svgd(num_particles=num_particles)

    def end(start: Tensor, shift: Tensor) -> Tensor:
        return _run(inference, start, lambda z: banana(z - shift) - torch.logaddexp(z[2], -z[2]), 3)

    assert torch.autograd.gradcheck(end, (start, shift))


@pytest.mark.parametrize("narrow", [1e-1, 1e-2, 1e-3])
def test_default_steps_serve_latents_of_very_different_width(narrow: float) -> None:
    # Nothing is tuned: ten steps from a standard normal start; a start 1,000 sd away is still half a sd off.
    sd, mean = torch.tensor([narrow, 1.0, 1.0]), torch.tensor([0.3, 2.0, -3.0])
    start = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    particles = _run(svgd(), start, lambda z: -0.5 * ((z - mean) / sd).square().sum(), svgd().num_steps)
    torch.testing.assert_close(particles.std(0) / sd, torch.ones(3), atol=0.1, rtol=0)
    torch.testing.assert_close((particles.mean(0) - mean) / sd, torch.zeros(3), atol=0.5, rtol=0)
    torch.testing.assert_close(particles.mean(0)[1:], mean[1:], atol=0.1, rtol=0)


@pytest.mark.parametrize("structure", ["coordinate", "site", "joint"])
def test_plain_steps_recover_a_gaussian_in_few_dimensions(structure: Any) -> None:
    mean = torch.tensor([1.0, -1.0], dtype=F64)
    start = torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    inference = svgd(num_particles=20, preconditioner="none", step_size=0.5, structure=structure)
    particles = _run(inference, start, lambda z: -0.5 * (z - mean).square().sum(), 300)
    torch.testing.assert_close(particles.mean(0), mean, atol=0.05, rtol=0)
    # Scalar-bandwidth kernels are known to be narrow: .89 at D = 2.
    torch.testing.assert_close(particles.std(0), torch.ones(2, dtype=F64), atol=0.2, rtol=0)


def test_released_settings_take_the_authors_step() -> None:
    start = torch.randn(6, 3, dtype=F64)
    inference = svgd(
        num_particles=6,
        step_size=0.01,
        preconditioner="none",
        structure="joint",
        bandwidth="released",
        repulsion=0.5,
    )
    z = start
    for _ in range(3):
        scores = torch.stack([torch.autograd.functional.jacobian(banana, particle) for particle in z])
        squared = torch.cdist(z, z) ** 2
        h = squared.flatten().sort().values[17] / log(6)
        k = torch.exp(-squared / h)
        z = z + 0.01 * (k @ scores + (z * k.sum(1, keepdim=True) - k @ z) / h) / 6
    torch.testing.assert_close(_run(inference, start, banana, 3), z)


def test_site_kernels_see_only_their_site() -> None:
    start = torch.randn(6, 3, dtype=F64)
    options: dict[str, Any] = {"num_particles": 6, "step_size": 0.1, "preconditioner": "none"}

    def separable(z: Tensor) -> Tensor:
        return -0.5 * z[0] ** 2 - torch.logaddexp(z[1:], -z[1:]).sum()

    together = _run(svgd(structure="site", sites=SITES, **options), start, separable, 4)
    first = _run(svgd(structure="joint", **options), start[:, :1], lambda z: -0.5 * z[0] ** 2, 4)
    rest = _run(svgd(structure="joint", **options), start[:, 1:], lambda z: -torch.logaddexp(z, -z).sum(), 4)
    torch.testing.assert_close(together, torch.cat([first, rest], 1))


def test_whitened_steps_do_not_see_linear_coordinates() -> None:
    # With a kernel on all coordinates, the rotation left free by the Cholesky factor cancels.
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 3, dtype=F64, generator=generator) + 2 * torch.eye(3, dtype=F64)
    start = torch.randn(8, 3, dtype=F64, generator=generator)
    inference = svgd(num_particles=8, preconditioner="curvature", structure="joint")

    def log_density(z: Tensor) -> Tensor:
        return -0.5 * z @ (torch.eye(3, dtype=F64) + 1) @ z

    plain = _run(inference, start, log_density, 5)
    mixed = _run(inference, start @ torch.linalg.inv(mix).T, lambda z: log_density(mix @ z), 5)
    torch.testing.assert_close(mixed @ mix.T, plain)


@pytest.mark.parametrize("each_limit", [32, 2])
@pytest.mark.parametrize("preconditioner", ["none", "adaptive", "curvature"])
def test_first_order_keeps_values_and_a_gradient_to_the_start(
    preconditioner: Any, each_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("bmaml_ppl.inference.svgd"), "_EACH_LIMIT", each_limit)
    start = torch.randn(4, 3, dtype=F64)
    inference = svgd(num_particles=4, step_size=0.05, preconditioner=preconditioner)
    exact, first = (_run(inference, start, f, 3) for f in (banana, FirstOrder(banana)))
    torch.testing.assert_close(first, exact)
    jacobian = torch.func.jacrev(lambda z: _run(inference, z, FirstOrder(banana), 3))(start).reshape(12, 12)
    assert torch.linalg.matrix_rank(jacobian) == 12
    if preconditioner == "none":
        torch.testing.assert_close(jacobian, torch.eye(12, dtype=F64), atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "laplace"}, "kernel='laplace'"),
        ({"structure": "block"}, "structure='block'"),
        ({"bandwidth": "mode"}, "bandwidth='mode'"),
        ({"bandwidth": "released", "num_particles": 1}, "needs M > 1"),
        ({"bandwidth": -1.0}, "bandwidth=-1.0"),
        ({"bandwidth": 0}, "bandwidth=0"),
        ({"num_particles": 0}, "num_particles=0"),
        ({"num_steps": -1}, "num_steps=-1"),
        ({"kernel": 1}, "kernel=1"),
        ({"structure": 1.0}, "structure=1.0"),
        ({"preconditioner": "newton"}, "preconditioner='newton'"),
        ({"structure": "moments", "preconditioner": "none"}, "moments"),
        ({"structure": "anchored", "preconditioner": "adaptive"}, "anchored"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        svgd(**options)


@pytest.mark.parametrize(("dim", "steps"), [(1, 10), (8, 10), (9, 20), (128, 20), (129, 10)])
def test_steps_follow_the_number_of_latents(dim: int, steps: int) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(a.sum() + 0 * x, 1.0), obs=y)

    sites = from_model(model, {"x": torch.zeros(2), "y": torch.zeros(2)}).sites
    assert svgd(sites=sites).num_steps == steps
    assert svgd(sites=sites, num_steps=3).num_steps == 3
    assert svgd().num_steps == 10
