"""The prior seen from its draws, against closed forms."""

import pytest
import torch
from torch import Tensor

from bmaml_ppl.inference.derivatives import FirstOrder, exact_density
from bmaml_ppl.inference.prior_moments import prior_moments

F64 = torch.float64
PRECISION = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 4.0]], dtype=F64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=F64)


@pytest.mark.parametrize("dim", [3, 80])
def test_prior_moments_cancel_the_draw(dim: int) -> None:
    loc, scale = torch.randn(dim, dtype=F64), torch.rand(dim, dtype=F64) + 0.01

    def moments(loc: Tensor, scale: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, dim, dtype=F64, generator=torch.Generator().manual_seed(seed))
        density = torch.distributions.Normal(loc, scale)
        return prior_moments(lambda z: density.log_prob(z).sum(), loc + scale * noise)

    for seed in (0, 1):
        torch.testing.assert_close(moments(loc, scale, seed), (loc, scale))
    jacobian = torch.autograd.functional.jacobian(lambda a, b: moments(a, b, 0), (loc, scale))
    eye, none = torch.eye(dim, dtype=F64), torch.zeros(dim, dim, dtype=F64)
    torch.testing.assert_close(jacobian, ((eye, none), (none, eye)))


def test_prior_moments_of_a_correlated_normal() -> None:
    density = torch.distributions.MultivariateNormal(MEAN, precision_matrix=PRECISION)
    loc, scale = prior_moments(density.log_prob, torch.randn(3, 3, dtype=F64))
    torch.testing.assert_close(loc, MEAN)
    torch.testing.assert_close(scale, PRECISION.diagonal().rsqrt())


def test_a_skewed_prior_gets_a_normal_with_its_mode() -> None:
    # The logarithm of a Gamma(a, b) variable has its mode at log(a / b) and curvature a there.
    def log_prior(z: Tensor) -> Tensor:
        return (3.0 * z - 2.0 * z.exp()).sum()

    mode = torch.full((1, 2), 1.5, dtype=F64).log()
    loc, scale = prior_moments(log_prior, mode)
    torch.testing.assert_close(loc, mode[0])
    torch.testing.assert_close(scale, torch.full((2,), 3.0, dtype=F64).rsqrt())
    moved, _ = prior_moments(log_prior, mode + 0.3)
    assert ((moved - mode).abs() < 0.06).all()


def test_exact_density_takes_stop_gradients_away() -> None:
    def density(z: Tensor) -> Tensor:
        return -z.square().sum()

    assert exact_density(FirstOrder(density)) is density
    assert exact_density(density) is density
