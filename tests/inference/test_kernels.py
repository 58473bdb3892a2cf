"""Kernels and the Stein direction against naive double loops and the authors' own formulas."""

from collections.abc import Callable
from functools import partial
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from bmaml_ppl.inference.kernels import (
    BANDWIDTHS,
    KERNELS,
    anchored_direction,
    anchors,
    moment_direction,
    stein_direction,
)

F64 = torch.float64

BLOCKS: dict[str, list[slice] | None] = {
    "joint": [slice(0, 5)],
    "site": [slice(0, 1), slice(1, 3), slice(3, 5)],
    "coordinate": None,
}
PROFILES: dict[str, Callable[[Tensor], Tensor]] = {
    "rbf": lambda t: torch.exp(-t),
    "imq": lambda t: 1 / torch.sqrt(1 + t),
}


def _particles(num: int = 7, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(num, dim, dtype=F64, generator=generator),
        torch.randn(num, dim, dtype=F64, generator=generator),
    )


def _naive_bandwidth(rule: str | float, x: Tensor) -> float:
    if not isinstance(rule, str):
        return rule
    num = len(x)
    pairs = sorted(((x[i] - x[j]) ** 2).sum().item() for i in range(num) for j in range(i))
    whole = sorted(((x[i] - x[j]) ** 2).sum().item() for i in range(num) for j in range(num))
    if rule == "mean":
        return sum(pairs) / len(pairs) / log(num + 1)
    if rule == "median":
        return pairs[(len(pairs) - 1) // 2] / log(num + 1)
    return whole[(len(whole) - 1) // 2] / log(num)


def _naive_direction(
    x: Tensor, scores: Tensor, profile: Callable[[Tensor], Tensor], rule: str | float, repulsion: float
) -> tuple[Tensor, Tensor]:
    """The direction of one block by Algorithm 1 of Liu and Wang, and each particle's kernel mass."""
    h = _naive_bandwidth(rule, x)
    direction, mass = torch.zeros_like(x), x.new_zeros(len(x))
    for i in range(len(x)):
        for j in range(len(x)):
            other = x[j].clone().requires_grad_()
            value = profile(((other - x[i]) ** 2).sum() / h)
            (slope,) = torch.autograd.grad(value, other)
            direction[i] += value.detach() * scores[j] + repulsion * slope
            mass[i] += value.detach()
    return direction, mass


@pytest.mark.parametrize("repulsion", [1.0, 0.5])
@pytest.mark.parametrize("rule", ["median", "mean", "released", 0.7])
@pytest.mark.parametrize("structure", ["joint", "site", "coordinate"])
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_direction_is_the_double_loop(kernel: str, structure: str, rule: str | float, repulsion: float) -> None:
    x, scores = _particles()
    blocks = BLOCKS[structure]
    bandwidth = BANDWIDTHS[rule] if isinstance(rule, str) else rule
    options: dict[str, Any] = {"kernel": KERNELS[kernel], "bandwidth": bandwidth, "repulsion": repulsion}
    parts = [slice(d, d + 1) for d in range(5)] if blocks is None else blocks
    naive = [_naive_direction(x[:, b], scores[:, b], PROFILES[kernel], rule, repulsion) for b in parts]
    summed = torch.cat([direction for direction, _ in naive], 1)
    mass = torch.cat([m[:, None].expand(-1, b.stop - b.start) for (_, m), b in zip(naive, parts, strict=True)], 1)
    torch.testing.assert_close(stein_direction(x, scores, blocks=blocks, **options), summed / 7)
    torch.testing.assert_close(stein_direction(x, scores, blocks=blocks, normalise=True, **options), summed / mass)


@pytest.mark.parametrize("num", [2, 5, 10])
def test_released_settings_are_the_authors_code(num: int) -> None:
    # jsikyoon/bmaml, bmaml.py 354-376: h over the whole matrix / log M, and half the kernel's true gradient.
    x, scores = _particles(num)
    squared = torch.cdist(x, x) ** 2
    h = squared.flatten().sort().values[(num * num - 1) // 2] / log(num)
    if h == 0:  # two particles: two of the four distances are the diagonal's zeros
        h = torch.tensor(torch.finfo(F64).tiny * 1e8, dtype=F64)
    k = torch.exp(-squared / h)
    grad_kernel = (x * k.sum(1, keepdim=True) - k @ x) / h
    expected = (k @ scores + grad_kernel) / num
    released = stein_direction(
        x,
        scores,
        kernel=KERNELS["rbf"],
        bandwidth=BANDWIDTHS["released"],
        repulsion=0.5,
        blocks=[slice(0, 5)],
    )
    torch.testing.assert_close(released, expected)


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_slope_is_the_derivative(kernel: str) -> None:
    t = torch.linspace(0, 4, 9, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(KERNELS[kernel].value(t).sum(), t)
    torch.testing.assert_close(KERNELS[kernel].slope(t), slope)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("structure", ["joint", "site", "coordinate"])
def test_one_particle_climbs_its_score(structure: str, normalise: bool) -> None:
    x, scores = _particles(1)
    direction = stein_direction(
        x,
        scores,
        kernel=KERNELS["rbf"],
        bandwidth=BANDWIDTHS["median"],
        repulsion=1.0,
        blocks=BLOCKS[structure],
        normalise=normalise,
    )
    assert torch.equal(direction, scores)


@pytest.mark.parametrize("structure", ["joint", "site", "coordinate"])
@pytest.mark.parametrize("rule", ["median", "mean", "released"])
def test_no_gradient_passes_through_the_bandwidth(structure: str, rule: str) -> None:
    x, scores = _particles()
    blocks = BLOCKS[structure]
    parts = [slice(d, d + 1) for d in range(5)] if blocks is None else blocks

    def fixed(x: Tensor) -> Tensor:
        columns = []
        for b in parts:
            h = _naive_bandwidth(rule, x[:, b].detach())
            block = [slice(0, b.stop - b.start)]
            options: dict[str, Any] = {"kernel": KERNELS["rbf"], "repulsion": 1.0, "blocks": block}
            columns.append(stein_direction(x[:, b], scores[:, b], bandwidth=h, **options))
        return torch.cat(columns, 1)

    rule_direction = partial(
        stein_direction,
        scores=scores,
        kernel=KERNELS["rbf"],
        bandwidth=BANDWIDTHS[rule],
        repulsion=1.0,
        blocks=blocks,
    )
    torch.testing.assert_close(torch.func.jacrev(rule_direction)(x), torch.func.jacrev(fixed)(x))


@pytest.mark.parametrize("structure", ["joint", "site", "coordinate"])
@pytest.mark.parametrize("rule", ["median", "mean", "released", 1.0])
def test_coinciding_particles_give_finite_directions_and_derivatives(structure: str, rule: str | float) -> None:
    x, scores = torch.ones(4, 5, dtype=F64), _particles(4)[1]

    def loss(x: Tensor) -> Tensor:
        bandwidth = BANDWIDTHS[rule] if isinstance(rule, str) else rule
        options: dict[str, Any] = {"kernel": KERNELS["rbf"], "bandwidth": bandwidth, "repulsion": 1.0}
        return stein_direction(x, scores, blocks=BLOCKS[structure], **options).square().sum()

    assert torch.isfinite(loss(x))
    assert torch.isfinite(torch.func.grad(loss)(x)).all()


@pytest.mark.parametrize("structure", ["joint", "site", "coordinate"])
def test_second_derivatives_are_finite_where_particles_coincide(structure: str) -> None:
    x, scores = torch.ones(4, 5, dtype=F64), _particles(4)[1]
    options: dict[str, Any] = {"kernel": KERNELS["rbf"], "bandwidth": 1.0, "repulsion": 1.0}

    def loss(x: Tensor) -> Tensor:
        return stein_direction(x, scores, blocks=BLOCKS[structure], **options).square().sum()

    second = torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("structure", ["joint", "site", "coordinate"])
def test_direction_does_not_see_a_shift_or_an_order(structure: str) -> None:
    x, scores = _particles()
    direction = partial(
        stein_direction,
        kernel=KERNELS["rbf"],
        bandwidth=BANDWIDTHS["median"],
        repulsion=1.0,
        blocks=BLOCKS[structure],
    )
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(direction(x + 100, scores), direction(x, scores))
    torch.testing.assert_close(direction(x[order], scores[order]), direction(x, scores)[order])


def test_moments_follow_the_linear_kernel_near_the_target() -> None:
    # Liu and Wang (2018): k(x, y) = x . y on centred particles gives (I - A) u, A = -1/M sum_j score_j u_j^T.
    x, _ = _particles(12)
    centred = x - x.mean(0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / 12)).T
    near = 1.001 * whitened
    linear = (
        sum(near[j].outer(near[j]) @ -near.T / 12 for j in range(12)).T + near
    )  # drive, with scores -u of a standard normal, and repulsion
    torch.testing.assert_close(moment_direction(near, -near), linear, rtol=1e-2, atol=0)
    torch.testing.assert_close(moment_direction(whitened, -whitened), torch.zeros_like(x))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_moments_never_overshoot(size: float) -> None:
    x, scores = _particles(12)
    centred = size * (x - x.mean(0))
    direction = moment_direction(size * x, 10 * scores)
    assert torch.linalg.matrix_norm(direction, 2) <= torch.linalg.matrix_norm(centred, 2) * (1 + 1e-9)


@pytest.mark.parametrize(("num", "dim"), [(2, 3), (5, 4), (20, 5), (20, 33), (20, 100), (5, 100)])
def test_anchors_are_centred_even_and_round(num: int, dim: int) -> None:
    y = anchors(num, dim)
    torch.testing.assert_close(y.mean(0), torch.zeros(dim, dtype=F64), atol=1e-9, rtol=0)
    torch.testing.assert_close(y.square().mean(0), torch.ones(dim, dtype=F64))
    values = torch.linalg.svdvals(y)[: min(num - 1, dim)]
    assert values[0] <= 1.2 * values[-1]
    assert torch.equal(anchors(num, dim), y)


def _curvature(dim: int) -> Tensor:
    """Factor of a curvature whose standard deviations are from .01 to 1 along random axes."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(dim, dim, dtype=F64, generator=generator)).Q
    return torch.linalg.cholesky(axes * torch.logspace(0, 4, dim, dtype=F64) @ axes.T)


OPTIONS: dict[str, Any] = {"kernel": KERNELS["rbf"], "bandwidth": 1.0, "repulsion": 1.1}


def test_anchored_direction_is_its_formula_in_original_coordinates() -> None:
    z, scores = _particles()
    factor = _curvature(5)
    covariance = torch.cholesky_inverse(factor)
    sd = covariance.diagonal().sqrt()
    x, newton, correlation = z / sd, scores @ covariance / sd, covariance / sd / sd.unsqueeze(1)
    white, white_scores = z @ factor, torch.linalg.solve_triangular(factor, scores.T, upper=False).T
    direction = anchored_direction(white, white_scores, factor, **OPTIONS)
    still = anchored_direction(white - white, white_scores - white_scores, factor, **OPTIONS)  # anchors alone
    phi = stein_direction(x, newton, blocks=None, normalise=True, **OPTIONS)
    u, phi = x - x.mean(0), phi - phi.mean(0)
    expected = 0.5 * (newton + newton.mean(0) - u) + phi @ correlation / (1 + correlation.abs().sum(0).max())
    back = torch.linalg.solve_triangular(factor.T, (direction - still).T, upper=True).T / sd
    torch.testing.assert_close(back, expected)


@pytest.mark.parametrize("dim", [20, 33, 100])
def test_anchors_are_level_in_original_coordinates_and_right_along_narrow_directions(dim: int) -> None:
    factor = _curvature(dim)
    zero = torch.zeros(20, dim, dtype=F64)
    white = anchored_direction(zero, zero, factor, **OPTIONS)
    z = torch.linalg.solve_triangular(factor.T, white.T, upper=True).T
    ratio = z.square().mean(0) / torch.cholesky_inverse(factor).diagonal()
    torch.testing.assert_close(ratio, torch.ones(dim, dtype=F64), atol=0.05, rtol=0)
    # Coordinates are dominated by the wide directions; along the 20 narrowest axes, whitened, variance is 1 on average.
    narrow = torch.linalg.eigh(factor @ factor.T).eigenvectors[:, -20:]
    along = (z @ narrow).square().mean(0) * ((factor.T @ narrow).square().sum(0))
    torch.testing.assert_close(along.mean(), torch.tensor(1.0, dtype=F64), atol=0.2, rtol=0)


def test_anchored_particles_of_a_gaussian_move_to_its_mean_at_once() -> None:
    white = _particles()[0] + 3
    direction = anchored_direction(white, -white, _curvature(5), **OPTIONS)
    torch.testing.assert_close(direction.mean(0), -white.mean(0))
