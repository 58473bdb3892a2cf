"""Can the posterior be trusted? Scores of predictions, and the door to ArviZ."""

from bmaml_ppl.diagnostics import export, scores

__all__ = ["export", "scores"]
