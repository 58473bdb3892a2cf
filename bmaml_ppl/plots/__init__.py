"""Figures: each function draws on given axes (or new ones) and returns them; nothing is saved or shown here.

Colours are Okabe and Ito's, which readers with any common colour vision tell apart, and what differs in colour
differs in shape or line as well.
"""

from bmaml_ppl.plots.calibration import plot_calibration, plot_pit, plot_sbc
from bmaml_ppl.plots.fans import Points, plot_prior_predictive, plot_task
from bmaml_ppl.plots.figures import draw_figure, encode_png
from bmaml_ppl.plots.forest import plot_forest
from bmaml_ppl.plots.latents import plot_particles, plot_prior_posterior
from bmaml_ppl.plots.learning import draw_learning, plot_gradient_norm, plot_learning_curve

__all__ = [
    "Points",
    "draw_figure",
    "draw_learning",
    "encode_png",
    "plot_calibration",
    "plot_forest",
    "plot_gradient_norm",
    "plot_learning_curve",
    "plot_particles",
    "plot_pit",
    "plot_prior_posterior",
    "plot_prior_predictive",
    "plot_sbc",
    "plot_task",
]
