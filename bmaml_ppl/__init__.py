"""Bayesian meta-learning for Pyro: declare one task, learn the prior that many tasks share, adapt in milliseconds."""

from bmaml_ppl.diagnostics.check import check
from bmaml_ppl.full_bayes import full_bayes
from bmaml_ppl.laplace_guide import LaplaceGuide
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.posterior import Posterior
from bmaml_ppl.storage import load_prior
from bmaml_ppl.tasks import Tasks

__all__ = ["LaplaceGuide", "LearnedPrior", "Posterior", "Tasks", "check", "full_bayes", "load_prior", "meta_learn"]
__version__ = "0.1.0"
