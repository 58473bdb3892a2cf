"""Losses of adapted particles: of the query set, of the chaser, and of all observations together."""

from collections.abc import Sequence
from math import log
from typing import Literal

import torch
from torch import Tensor

from bmaml_ppl.objectives.objective import Objective, Rollout

__all__ = ["chaser", "marginal_nll", "query_nll"]


def query_nll(kind: Literal["mixture", "mean"] = "mixture") -> Objective:
    r"""Negative log-likelihood of the query set under the adapted particles.

    .. math::
        -\log \frac1M \sum_m p(D^{val} \mid \theta_m)
        \quad\text{or}\quad -\frac1M \sum_m \log p(D^{val} \mid \theta_m)

    Args:
        kind: "mixture" scores the particles together, "mean" each by itself (EMAML, MAML).

    Reference:
        Finn, Abbeel and Levine (2017), Model-Agnostic Meta-Learning, equation 1; Yoon et al. (2018),
        Bayesian Model-Agnostic Meta-Learning, section 3.1, for the mixture.
    """
    if kind not in ("mixture", "mean"):
        raise ValueError(f'query_nll(kind={kind!r}) is not known; choose "mixture" or "mean"')

    def loss(rollout: Rollout) -> Tensor:
        particles = rollout.follower.particles
        log_likelihood = rollout.adapter.log_likelihood(particles, rollout.prior, rollout.query)
        if kind == "mean":
            return -log_likelihood.mean(-1)
        return log(particles.shape[1]) - torch.logsumexp(log_likelihood, -1)

    return Objective(((1.0, f"query_nll({kind})", loss),))


def chaser(num_leader_steps: int = 1, sites: Sequence[str] | None = None) -> Objective:
    r"""Squared distance from the adapted particles to where more steps on more data would take them.

    .. math:: \sum_m \lVert \theta_m^{n} - \mathrm{stopgrad}(\theta_m^{n+s}) \rVert^2

    The leader goes on from the follower's end on support and query together; particles are matched by
    index.

    Args:
        num_leader_steps: s.
        sites: Latent sites that enter the distance; None takes all. The BMAML authors leave the
            precisions out: `sites=["weights"]`.

    Reference:
        Yoon et al. (2018), Bayesian Model-Agnostic Meta-Learning, equation 9 and Algorithm 3.
    """
    if num_leader_steps < 1:
        raise ValueError(f"chaser(num_leader_steps={num_leader_steps}) learns nothing; give at least 1")
    if isinstance(sites, str) or (sites is not None and not sites):
        raise ValueError(
            f'chaser(sites={sites!r}) must be a list of latent sites, such as ["weights"], or None for all'
        )

    def loss(rollout: Rollout) -> Tensor:
        adapter, follower = rollout.adapter, rollout.follower
        known = adapter.density.sites
        unknown = sorted(set(sites or ()) - set(known))
        if unknown:
            raise ValueError(f"chaser(sites=...) names {unknown}, but the model's latent sites are {list(known)}")
        with torch.no_grad():
            leader = adapter.run(follower, rollout.prior, rollout.everything, num_leader_steps)
        squared = (follower.particles - leader.particles.detach()).square()
        return torch.stack([squared[..., known[s].slice].sum((-2, -1)) for s in sites or known]).sum(0)

    return Objective(((1.0, f"chaser({num_leader_steps})", loss),))


def marginal_nll(num_steps: int | None = None) -> Objective:
    r"""Negative log marginal likelihood of all of a task's observations, by its gradient at the particles.

    By Fisher's identity, the gradient of the log marginal likelihood is the posterior mean of the
    gradient of the log joint density, so that no gradient passes through the adaptation:

    .. math:: \nabla_\theta \log p(D \mid \theta) = E_{p(z \mid D, \theta)} \nabla_\theta \log p(D, z \mid \theta)

    Particles adapt to support and query together. The loss shown is the mean negative log joint density.

    Args:
        num_steps: Adaptation steps; None takes the inference's own.

    References:
        Kuntz, Lim and Johansen (2023), Particle algorithms for maximum likelihood training of latent
        variable models, equation 5; Sharrock, Dodd and Nemeth (2024) for the SVGD variant.
    """

    def loss(rollout: Rollout) -> Tensor:
        adapter, task = rollout.adapter, rollout.everything
        with torch.no_grad():
            particles = rollout.adapt(task, num_steps).particles
        return -adapter.log_joint(particles, rollout.prior, task).mean(-1)

    return Objective(((1.0, "marginal_nll", loss),))
