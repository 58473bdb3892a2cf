"""Losses of Laplace's method: the evidence, and Grant's ML-LAPLACE."""

from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.inference.laplace import log_mass
from bmaml_ppl.objectives.objective import Objective, Rollout

__all__ = ["evidence"]


def evidence(kind: Literal["marginal", "query"] = "marginal", eta: float = 0.5) -> Objective:
    r"""Laplace's approximation of the negative log marginal likelihood, or Grant's ML-LAPLACE; needs `laplace`.

    .. math::
        -\log p(D \mid \hat\phi) - \log p(\hat\phi \mid \theta) + \tfrac12 \log\det \frac{H}{2\pi}
        \quad\text{or}\quad -\log p(D^{val} \mid \hat\phi) + \eta \log\det \hat H

    "marginal" adapts to support and query together and is exact where the posterior is Gaussian: its minimum is then
    the maximum likelihood of the mixed model. "query" adapts to the support set alone; its curvature is that of the
    query set's log joint density at the adapted point.

    Args:
        kind: "marginal" or "query".
        eta: Weight of the log determinant in "query"; Grant et al. derive 1/2 and use 1e-6 for images.

    References:
        Tierney and Kadane (1986), Accurate Approximations for Posterior Moments and Marginal Densities, equation
        2.2; Grant et al. (2018), Recasting Gradient-Based Meta-Learning as Hierarchical Bayes, subroutine 4.
    """
    if kind not in ("marginal", "query"):
        raise ValueError(f'evidence({kind!r}) is not known; choose "marginal" or "query"')

    def marginal(rollout: Rollout) -> Tensor:
        _refuse_without_curvature(rollout)
        state = rollout.adapt(rollout.everything)
        weighted = vmap(log_mass)(state)
        return -torch.logsumexp(weighted, -1)

    def query(rollout: Rollout) -> Tensor:
        _refuse_without_curvature(rollout)
        adapter, prior = rollout.adapter, rollout.prior
        state = adapter.measure(rollout.follower, prior, rollout.query)
        rollout.measured.append(state)
        log_det = vmap(vmap(lambda precision: precision.log_det()))(state.precision)
        log_likelihood = adapter.log_likelihood(state.particles, prior, rollout.query)
        return (eta * log_det.to(log_likelihood) - log_likelihood).mean(-1)

    name = "evidence" if kind == "marginal" else f"evidence(query, {eta:g})"
    return Objective(((1.0, name, marginal if kind == "marginal" else query),))


def _refuse_without_curvature(rollout: Rollout) -> None:
    name = rollout.adapter.inference.name
    if name != "laplace":
        raise ValueError(f"evidence() needs the curvature of inference=laplace(...), got {name}(...)")
