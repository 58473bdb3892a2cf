"""What the outer loop minimises: losses of tasks' adaptation, and weighted sums of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import log
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.adaptation import Adapter, TaskData
from bmaml_ppl.inference.laplace import log_mass
from bmaml_ppl.types import Tensors

__all__ = ["Objective", "Rollout", "chaser", "evidence", "marginal_nll", "query_nll"]


@dataclass
class Rollout:
    """The adaptation of a batch of T tasks, as far as an objective asks for it.

    Attributes:
        adapter: The inference algorithm bound to the density.
        prior: Meta-parameters, constrained.
        support: Observations that the task adapts to.
        query: Held-out observations.
        everything: Both together.
        states: Each adaptation's end so far, in which an inference may report on itself.
    """

    adapter: Adapter
    prior: Tensors
    support: TaskData
    query: TaskData
    everything: TaskData
    states: list[Any] = field(default_factory=list)

    @cached_property
    def follower(self) -> Any:
        """Each task's state after adaptation to its support set, differentiable."""
        return self.adapt(self.support)

    def adapt(self, view: TaskData, num_steps: int | None = None) -> Any:
        """Each task's state after adaptation to some of its observations, differentiable."""
        self.states.append(self.adapter.adapt(self.prior, view, num_steps))
        return self.states[-1]

    @property
    def num_repaired(self) -> int:
        """Tasks whose curvature had to be repaired in some adaptation."""
        repairs = [state.repair.detach().flatten(1).amax(1) > 0 for state in self.states if hasattr(state, "repair")]
        return int(torch.stack(repairs).any(0).sum()) if repairs else 0


Loss = Callable[[Rollout], Tensor]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses of tasks' adaptation; add two, or multiply one by a number.

    Attributes:
        terms: Weight, name and loss of each term.
    """

    terms: tuple[tuple[float, str, Loss], ...] = field(default=())

    def __call__(self, rollout: Rollout) -> Tensor:
        """The loss of each task, (T,)."""
        return torch.stack([weight * loss(rollout) for weight, _, loss in self.terms]).sum(0)

    def __add__(self, other: "Objective") -> "Objective":
        return Objective(self.terms + other.terms)

    def __radd__(self, other: object) -> "Objective":
        # sum() starts at 0.
        return self if other == 0 else NotImplemented

    def __mul__(self, weight: float) -> "Objective":
        return Objective(tuple((weight * w, name, loss) for w, name, loss in self.terms))

    __rmul__ = __mul__

    def __str__(self) -> str:
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for weight, name, _ in self.terms)


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
        log_det = vmap(vmap(lambda precision: precision.log_det()))(state.precision)
        return (eta * log_det - adapter.log_likelihood(state.particles, prior, rollout.query)).mean(-1)

    name = "evidence" if kind == "marginal" else f"evidence(query, {eta:g})"
    return Objective(((1.0, name, marginal if kind == "marginal" else query),))


def _refuse_without_curvature(rollout: Rollout) -> None:
    name = rollout.adapter.inference.name
    if name != "laplace":
        raise ValueError(f"evidence() needs the curvature of inference=laplace(...), got {name}(...)")
