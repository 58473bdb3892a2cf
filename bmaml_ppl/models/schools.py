"""Eight schools: coaching effects in parallel experiments, fully Bayesian and as one task a school."""

from math import sqrt

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Model

__all__ = ["eight_schools", "eight_schools_data", "eight_schools_tasks", "school_effect"]


def eight_schools_data() -> dict[str, Tensor]:
    """Estimated coaching effects `y` and their standard errors `sigma`, in test points, (8,) each.

    Reference:
        Rubin (1981), Estimation in Parallel Randomized Experiments, table 1.
    """
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return {"sigma": torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]), "y": y}


def eight_schools_tasks() -> Tasks:
    """The same data with one task a school, for `school_effect`.

    Meta-learning keeps observations apart to be predicted, and a school has one. So each estimate is entered
    twice with a standard error larger by sqrt(2): together they have the likelihood of the one estimate, up to
    a constant, and `marginal_nll`, which uses both, is exact.
    """
    data = eight_schools_data()
    twice = {"sigma": sqrt(2) * data["sigma"], "y": data["y"]}
    columns = {key: value.unsqueeze(1).repeat(1, 2) for key, value in twice.items()}
    return Tasks(columns, names=tuple(f"school {letter}" for letter in "ABCDEFGH"), outputs=("y",))


def eight_schools(num_schools: int = 8) -> Model:
    r"""All schools as ONE task, fully Bayesian and non-centred.

    .. math::
        \mu \sim N(0, 5^2), \quad \tau \sim \text{HalfCauchy}(5), \quad \eta_j \sim N(0, 1), \quad
        y_j \sim N(\mu + \tau \eta_j, \sigma_j^2)

    The returned model is `model(sigma, y=None, school=None)`. Row i is an estimate for school `school[i]`, an
    integer from 0 on; without it row i is school i. Latent sites: `mu` and `tau`, in units of y, and `eta`,
    (num_schools,); deterministic site `theta`, the schools' effects. Nothing is meta-learned but the start.

    Args:
        num_schools: J.

    References:
        Rubin (1981), Estimation in Parallel Randomized Experiments; Gelman et al. (2013), Bayesian Data
        Analysis, section 5.5.
    """
    if num_schools < 1:
        raise ValueError(f"num_schools={num_schools}; give at least 1")

    def model(sigma: Tensor, y: Tensor | None = None, school: Tensor | None = None) -> None:
        zero = sigma.new_zeros(())
        mu = pyro.sample("mu", dist.Normal(zero, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
        eta = pyro.sample("eta", dist.Normal(zero, 1.0).expand([num_schools]).to_event(1))
        theta = pyro.deterministic("theta", mu + tau * eta, event_dim=1)
        effects = theta[: len(sigma)] if school is None else theta[school.long()]
        with pyro.plate("data", len(sigma)):
            pyro.sample("obs", dist.Normal(effects, sigma), obs=y)

    return model


def school_effect() -> Model:
    r"""ONE school as a task: the empirical Bayes version, whose hyperparameters are meta-learned.

    .. math:: \theta \sim N(\mu, \tau^2), \quad y_i \sim N(\theta, \sigma_i^2)

    The returned model is `model(sigma, y=None)`, both (N,) in units of y: estimates of the school's effect and
    their standard errors. Latent site: `theta`. Meta-learned: `mu` and `tau`, which start at 0 and 10. Beware
    that the maximum of Rubin's marginal likelihood is at tau = 0, toward which a long run goes: all schools
    alike. `eight_schools` averages over tau instead.

    Reference:
        Efron and Morris (1975), Data Analysis Using Stein's Estimator and its Generalizations, section 2.
    """

    def model(sigma: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.param("mu", lambda: sigma.new_zeros(()))
        tau = pyro.param("tau", lambda: sigma.new_tensor(10.0), constraint=constraints.positive)
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("data", len(sigma)):
            pyro.sample("obs", dist.Normal(theta, sigma), obs=y)

    return model
