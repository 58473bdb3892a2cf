"""Objectives of the variational relatives: the ELBO of ABML, and that of PLATIPUS."""

from torch import Tensor

from bmaml_ppl.inference.mean_field import MeanFieldState, entropy
from bmaml_ppl.inference.platipus import PlatipusState
from bmaml_ppl.objectives.objective import Objective, Rollout

__all__ = ["elbo", "platipus_loss"]


def elbo(kl_weight: float = 1.0) -> Objective:
    r"""Negative evidence lower bound of all of a task's observations, with q adapted to the support set alone.

    .. math:: -E_{q(z \mid D^{trn})} \log p(D^{trn}, D^{val} \mid z) + w \, KL(q(z \mid D^{trn}) \| p(z \mid \theta))

    With w = 1 it bounds the negative log marginal likelihood of support and query from above.

    Args:
        kl_weight: w.

    Raises:
        ValueError: If the weight is negative, or the inference is not `mean_field`.

    Reference:
        Ravi and Beatson (2019), Amortized Bayesian Meta-Learning, section 3.
    """
    _check_weight("elbo", kl_weight)

    def loss(rollout: Rollout) -> Tensor:
        state, adapter, task = rollout.follower, rollout.adapter, rollout.everything
        if not isinstance(state, MeanFieldState):
            raise ValueError(
                f"elbo() needs the density of the adapted posterior, which {adapter.inference.name}() does not keep; "
                "write inference=mean_field()"
            )
        joint = adapter.log_joint(state.particles, rollout.prior, task).mean(-1)
        bound = joint + entropy(state.log_scale)
        if kl_weight == 1:
            return -bound
        likelihood = adapter.log_likelihood(state.particles, rollout.prior, task).mean(-1)
        return -likelihood - kl_weight * (bound - likelihood)

    return Objective(((1.0, "elbo" if kl_weight == 1 else f"elbo(kl_weight={kl_weight:g})", loss),))


def platipus_loss(kl_weight: float = 1.0) -> Objective:
    r"""PLATIPUS' bound: query loss of draws that have seen the query set, and how far they are from the prior.

    .. math::
        -\frac1M \sum_m \log p(D^{val} \mid \phi_m) + w \, KL(N(\mu_q, v_q) \| N(\mu_p, \sigma^2)), \quad
        \mu_{q} = \mu + \gamma_q \nabla \log p(D^{val} \mid \mu), \quad
        \mu_{p} = \mu + \gamma_p \nabla \log p(D^{trn} \mid \mu)

    where phi_m is a draw from N(mu_q, v_q) after the inference's steps on the support set.

    Args:
        kl_weight: w. Small ones let draws rely on the query set, which a new task does not show; with 1 the loss is a
            bound on the evidence.

    Raises:
        ValueError: If the weight is negative, or the inference is not `platipus`.

    Reference:
        Finn, Xu and Levine (2018), Probabilistic Model-Agnostic Meta-Learning, Algorithm 1.
    """
    _check_weight("platipus_loss", kl_weight)

    def loss(rollout: Rollout) -> Tensor:
        adapter, prior = rollout.adapter, rollout.prior
        before = adapter.begin(prior, rollout.support)
        if not isinstance(before, PlatipusState):
            raise ValueError(
                f"platipus_loss() learns what platipus() draws from, got {adapter.inference.name}(); write "
                "inference=platipus()"
            )
        seen = adapter.begin({**prior, "log_gamma_p": prior["log_gamma_q"]}, rollout.query)
        drawn = seen.center.unsqueeze(1) + (0.5 * prior["log_v_q"]).exp() * seen.noise
        adapted = adapter.run(before._replace(particles=drawn), prior, rollout.support, adapter.inference.num_steps)
        likelihood = adapter.log_likelihood(adapted.particles, prior, rollout.query).mean(-1)
        return -likelihood + kl_weight * _divergence(seen.center, prior["log_v_q"], before.center, before.scale)

    return Objective(((1.0, f"platipus_loss(kl_weight={kl_weight:g})", loss),))


def _divergence(center: Tensor, log_variance: Tensor, of_center: Tensor, of_scale: Tensor) -> Tensor:
    """KL divergence of one diagonal Gaussian from another, (T, D) -> (T,)."""
    log_ratio = log_variance - 2 * of_scale.log()
    shift = (center - of_center) / of_scale
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + shift.square()).sum(-1)


def _check_weight(name: str, kl_weight: float) -> None:
    if not kl_weight >= 0:
        raise ValueError(f"{name}(kl_weight={kl_weight!r}) must be 0 or more; 1 is the evidence lower bound")
