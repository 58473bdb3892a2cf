"""What the outer loop minimises: losses of tasks' adaptation, and weighted sums of them."""

from bmaml_ppl.objectives.evidence import evidence
from bmaml_ppl.objectives.objective import Objective, Rollout
from bmaml_ppl.objectives.particles import chaser, marginal_nll, query_nll
from bmaml_ppl.objectives.variational import elbo, platipus_loss

__all__ = ["Objective", "Rollout", "chaser", "elbo", "evidence", "marginal_nll", "platipus_loss", "query_nll"]
