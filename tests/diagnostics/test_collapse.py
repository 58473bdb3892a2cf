"""Collapsed particles, copies and identical restarts are told from sound ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.diagnostics.collapse import (
    count_distinct,
    describe_particles,
    local_spread,
    same_starts,
    stein_spread,
)

F64 = torch.float64
SITES: Any = {"a": SimpleNamespace(start=0, stop=1), "b": SimpleNamespace(start=1, stop=3)}
COVARIANCE = torch.tensor([[4.0, 1.8, 0.0], [1.8, 1.0, 0.1], [0.0, 0.1, 0.25]], dtype=F64)


def normal(z: Tensor) -> Tensor:
    return -0.5 * z @ torch.linalg.inv(COVARIANCE) @ z


def _points(num: int, dim: int, covariance: Tensor | None = None) -> Tensor:
    """Points whose sample covariance is exactly the given one, the identity where there is none."""
    draws = torch.randn(num, dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    white = draws - draws.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.atleast_2d(torch.cov(white.T)))).T
    return white if covariance is None else white @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("narrow", [1.0, 0.5, 1e-3])
def test_spread_is_the_ratio_of_standard_deviations_for_a_normal_posterior(narrow: float) -> None:
    scale = torch.tensor([1.0, narrow, 1.0], dtype=F64)
    found = describe_particles(normal, _points(8, 3, COVARIANCE) * scale + 5, SITES)
    torch.testing.assert_close(found.coordinate, scale)
    torch.testing.assert_close(found.spread[0], torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(found.spread[1], scale[1:].square().mean().sqrt())
    assert found.num_distinct == 8
    if narrow < 1:
        assert found.worst == 1


def test_stein_identity_holds_exactly_for_a_normal_posterior() -> None:
    particles = _points(8, 3, COVARIANCE)
    scores = -particles @ torch.linalg.inv(COVARIANCE)
    torch.testing.assert_close(stein_spread(particles + 3, scores), torch.ones(3, dtype=F64))
    torch.testing.assert_close(stein_spread(0.5 * particles, 0.5 * scores), torch.full((3,), 0.25, dtype=F64))


def test_many_coordinates_are_described_without_a_hessian() -> None:
    dim = 200
    sites: Any = {"all": SimpleNamespace(start=0, stop=dim)}
    particles = torch.randn(20, dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = describe_particles(lambda z: -2 * z @ z, 0.1 * particles, sites)
    # The mean of 3,800 independent squares: 0.2 has a standard error of 0.0023.
    torch.testing.assert_close(found.spread, torch.tensor([0.2], dtype=F64), atol=0.01, rtol=0)
    assert found.coordinate.shape == (dim,)


def test_local_spread_uses_the_particles_mean_curvature() -> None:
    particles = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)
    # Second derivatives of -z^4 are -12, 0 and -12: curvature 8, so that a standard deviation of 1 is sqrt(8) too many.
    torch.testing.assert_close(local_spread(lambda z: -(z[0] ** 4), particles), torch.tensor([8.0**0.5], dtype=F64))


def test_copies_count_once() -> None:
    particles = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    again = particles[[0, 1, 0, 2, 1, 1]]
    assert count_distinct(particles) == 3
    assert count_distinct(again) == 3
    assert count_distinct(again * (1 + 1e-15)) == 3
    assert count_distinct(again + 1e-9 * torch.arange(6, dtype=F64).unsqueeze(1)) == 6
    assert count_distinct(torch.zeros(5, 2)) == 1


def test_a_batch_of_tasks_is_vmapped() -> None:
    particles = torch.stack([_points(8, 3, COVARIANCE), torch.ones(8, 3, dtype=F64)])
    found = vmap(lambda z: describe_particles(normal, z, SITES))(particles)
    assert found.num_distinct.tolist() == [8, 1]
    torch.testing.assert_close(found.spread, torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=F64))
    assert found.worst.shape == (2,)


def test_restarts_at_the_same_particles_are_found_in_any_order() -> None:
    first, second = (torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert same_starts([first, second]) == []
    assert same_starts([first, second, first[[2, 0, 3, 1]], first[:3]]) == [(0, 2)]
    assert same_starts([first, first + 1e-4]) == []
    assert same_starts([torch.zeros(4, 2), torch.zeros(4, 2)]) == [(0, 1)]
