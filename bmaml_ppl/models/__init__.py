"""Ready task models: factories of ordinary Pyro models on keyword tensors."""

from bmaml_ppl.models.context import context_network
from bmaml_ppl.models.growth import growth_curve, smooth_growth
from bmaml_ppl.models.linear import linear_regression
from bmaml_ppl.models.neural_linear import neural_linear
from bmaml_ppl.models.neural_linear_mixture import neural_linear_mixture
from bmaml_ppl.models.pharmacokinetics import one_compartment
from bmaml_ppl.models.radon import county_radon, radon_data, radon_houses
from bmaml_ppl.models.regression import hierarchical_regression
from bmaml_ppl.models.schools import eight_schools, eight_schools_data, eight_schools_tasks, school_effect
from bmaml_ppl.models.sinusoid import sinusoid_program

__all__ = [
    "context_network",
    "county_radon",
    "eight_schools",
    "eight_schools_data",
    "eight_schools_tasks",
    "growth_curve",
    "hierarchical_regression",
    "linear_regression",
    "neural_linear",
    "neural_linear_mixture",
    "one_compartment",
    "radon_data",
    "radon_houses",
    "school_effect",
    "sinusoid_program",
    "smooth_growth",
]
