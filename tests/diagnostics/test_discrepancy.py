"""Discrepancies against naive loops, closed forms and autograd."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from bmaml_ppl.diagnostics.discrepancy import (
    average_particle_distance,
    kernel_stein_discrepancy,
    sliced_wasserstein,
    spread_ratio,
)

F64 = torch.float64


def _radial(kernel: str, x: Tensor, y: Tensor, h: float) -> Tensor:
    t = (x - y).square().sum() / h
    return torch.exp(-t) if kernel == "rbf" else torch.rsqrt(1 + t)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
@pytest.mark.parametrize("statistic", ["u", "v"])
@pytest.mark.parametrize("dim", [1, 3])
def test_kernel_stein_discrepancy_by_naive_loop(kernel: str, statistic: str, dim: int) -> None:
    x, s, h = torch.randn(6, dim, dtype=F64) + 5, torch.randn(6, dim, dtype=F64), 1.7
    total, pairs = 0.0, 0
    for i in range(6):
        for j in range(6):
            if i == j and statistic == "u":
                continue

            def k(a: Tensor, b: Tensor) -> Tensor:
                return _radial(kernel, a, b, h)

            value = k(x[i], x[j]) * (s[i] @ s[j]) + s[i] @ grad(k, 1)(x[i], x[j]) + s[j] @ grad(k, 0)(x[i], x[j])
            total += float(value + jacrev(grad(k, 0), 1)(x[i], x[j]).trace())
            pairs += 1
    options = {"kernel": kernel, "statistic": statistic, "bandwidth": h}
    assert kernel_stein_discrepancy(x, s, **options).item() == pytest.approx(total / pairs)  # type: ignore[arg-type]


def test_kernel_stein_discrepancy_defaults_to_the_median() -> None:
    x, s = torch.randn(9, 2, dtype=F64), torch.randn(9, 2, dtype=F64)
    pairs = [float((x[i] - x[j]).square().sum()) for i in range(9) for j in range(i)]
    median = sorted(pairs)[17]
    torch.testing.assert_close(kernel_stein_discrepancy(x, s), kernel_stein_discrepancy(x, s, bandwidth=median))


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_unbiased_statistic_is_zero_on_average_for_exact_draws(kernel: str) -> None:
    # Means over 400 sets of 30 draws; five standard errors give a false alarm once in a million.
    x = torch.randn(400, 30, 3, dtype=F64)
    values = vmap(
        lambda z: kernel_stein_discrepancy(z, -z, kernel=kernel, bandwidth=3.0, statistic="u")  # type: ignore[arg-type]
    )(x)
    assert abs(float(values.mean())) < 5 * float(values.std()) / math.sqrt(400)
    narrow = kernel_stein_discrepancy(x[0] / 3, -x[0] / 3, bandwidth=3.0, statistic="u")
    assert float(narrow) > values.mean() + 5 * values.std()


def test_stein_discrepancy_of_one_draw() -> None:
    # u(x, x) = |s|^2 + 2 D f'(0) / h * (-1), with f'(0) = -1/2.
    x, s = torch.randn(1, 3, dtype=F64), torch.randn(1, 3, dtype=F64)
    torch.testing.assert_close(kernel_stein_discrepancy(x, s, bandwidth=2.0), s.square().sum() + 3 / 2)
    with pytest.raises(ValueError, match="no pair"):
        kernel_stein_discrepancy(x, s)


def test_stein_discrepancy_is_finite_in_collapse_and_float32() -> None:
    x = torch.ones(5, 2)
    assert bool(kernel_stein_discrepancy(x, -x, bandwidth=1.0).isfinite())
    far = torch.randn(50, 3) + 1000
    exact = kernel_stein_discrepancy(far.double(), (1000 - far).double())
    assert kernel_stein_discrepancy(far, 1000 - far).item() == pytest.approx(exact.item(), rel=1e-3)


def test_errors_say_what_to_write() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="vmap"):
        kernel_stein_discrepancy(x[None], x[None])
    with pytest.raises(ValueError, match="imq"):
        kernel_stein_discrepancy(x, x, kernel="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"u" or "v"'):
        kernel_stein_discrepancy(x, x, statistic="w")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(4, 3\)"):
        spread_ratio(x, torch.randn(4, 3))


def test_spread_ratio_by_hand() -> None:
    draws, reference = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [4.0, 2.0]])
    torch.testing.assert_close(spread_ratio(draws, reference), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(spread_ratio(draws[:1], reference), torch.zeros(2))
    twice = torch.randn(7, 3, dtype=F64)
    torch.testing.assert_close(spread_ratio(2 * twice, twice, correction=1), torch.full((3,), 2.0, dtype=F64))
    expected = twice.std(0) / torch.arange(5, dtype=F64).std()
    torch.testing.assert_close(
        spread_ratio(twice, torch.arange(5, dtype=F64)[:, None].expand(-1, 3), correction=1), expected
    )


def _naive_wasserstein(a: Tensor, b: Tensor, order: int) -> float:
    """W_p of two sets of points on the line, each repeated to their common size."""
    first = a.sort().values.repeat_interleave(len(b))
    second = b.sort().values.repeat_interleave(len(a))
    return float(((first - second).abs() ** order).mean())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sizes", [(6, 6), (4, 7), (1, 5)])
def test_sliced_wasserstein_by_naive_loop(sizes: tuple[int, int], order: int) -> None:
    a, b = torch.randn(sizes[0], 3, dtype=F64), torch.randn(sizes[1], 3, dtype=F64) + 1
    normal = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 20))).T
    naive = [_naive_wasserstein(a @ u, b @ u, order) for u in normal / normal.norm(dim=1, keepdim=True)]
    found = sliced_wasserstein(a, b, num_directions=20, order=order, seed=5)
    assert found.item() == pytest.approx((sum(naive) / 20) ** (1 / order))


def test_sliced_wasserstein_of_a_shift_in_one_dimension() -> None:
    a = torch.randn(30, 1, dtype=F64)
    torch.testing.assert_close(sliced_wasserstein(a, a + 0.7), torch.tensor(0.7, dtype=F64))
    torch.testing.assert_close(sliced_wasserstein(a.repeat(3, 1), a), torch.tensor(0.0, dtype=F64))


def test_sliced_wasserstein_of_gaussians() -> None:
    # N(0, I) and N(0, 4 I) are W_2 = 1 apart along every direction; 20,000 draws estimate it within .03.
    a = torch.randn(20_000, 4, dtype=F64)
    assert sliced_wasserstein(a, 2 * torch.randn(10_000, 4, dtype=F64)).item() == pytest.approx(1.0, abs=0.05)


def test_average_particle_distance_by_hand() -> None:
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert average_particle_distance(square).item() == pytest.approx((4 + 2 * math.sqrt(2)) / 6)
    assert average_particle_distance(square[:1]).item() == 0
    assert average_particle_distance(torch.ones(4, 3)).item() == 0


def test_all_go_under_vmap() -> None:
    a, b = torch.randn(3, 8, 2, dtype=F64), torch.randn(3, 5, 2, dtype=F64)
    for function in (spread_ratio, sliced_wasserstein):
        looped = [function(x, y) for x, y in zip(a, b, strict=True)]
        torch.testing.assert_close(vmap(function)(a, b), torch.stack(looped))
    looped = [kernel_stein_discrepancy(x, -x) for x in a]
    torch.testing.assert_close(vmap(lambda x: kernel_stein_discrepancy(x, -x))(a), torch.stack(looped))
    torch.testing.assert_close(
        vmap(average_particle_distance)(a), torch.stack([average_particle_distance(x) for x in a])
    )
