"""R-hat and effective sample size, against ArviZ's."""

import arviz
import numpy as np
import pytest
import torch
from torch import Tensor

from bmaml_ppl.diagnostics.mixing import ess, rhat


def chains(kind: str) -> Tensor:
    """Four chains of 200 draws of 2 x 3 coordinates."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4, 200, 2, 3, generator=generator, dtype=torch.float64)
    if kind == "slow":
        draws = draws.cumsum(1)
    elif kind == "apart":
        draws[0] += 1.0
    elif kind == "uneven":
        draws[0] *= 3.0
    elif kind == "heavy":
        draws = draws / torch.randn(draws.shape, generator=generator, dtype=torch.float64)
    elif kind == "rejecting":
        stay = torch.rand(draws.shape, generator=generator) < 0.7
        for i in range(1, 200):
            draws[:, i] = torch.where(stay[:, i], draws[:, i - 1], draws[:, i])
    return draws


@pytest.mark.parametrize("kind", ["mixed", "slow", "apart", "uneven", "heavy", "rejecting"])
def test_they_are_arvizs(kind: str) -> None:
    draws = chains(kind)
    data = arviz.convert_to_dataset({"x": draws.numpy()})
    np.testing.assert_allclose(rhat(draws).numpy(), arviz.rhat(data)["x"].values, rtol=1e-6)
    # Pyro cuts the sum of autocorrelations off at another place than ArviZ, which tells where few draws are effective.
    effective, theirs = ess(draws).numpy(), arviz.ess(data)["x"].values
    np.testing.assert_allclose(effective, theirs, rtol=0.15 if theirs.min() > 100 else 1.0)


def test_chains_that_never_moved_are_not_mixed() -> None:
    still = torch.ones(4, 20, 3) * torch.arange(4.0).reshape(4, 1, 1)
    assert (rhat(still) == torch.inf).all()
    assert (ess(still) == 0).all()


def test_too_little_to_tell() -> None:
    assert rhat(chains("mixed")[:1]).isnan().all()
    assert rhat(chains("mixed")[:, :3]).isnan().all()
    assert ess(chains("mixed")[:, :3]).isnan().all()
