"""Ready task models: factories of ordinary Pyro models on keyword tensors."""

from bmaml_ppl.models.growth import growth_curve
from bmaml_ppl.models.linear import linear_regression
from bmaml_ppl.models.regression import hierarchical_regression
from bmaml_ppl.models.schools import eight_schools, eight_schools_data, eight_schools_tasks, school_effect

__all__ = [
    "eight_schools",
    "eight_schools_data",
    "eight_schools_tasks",
    "growth_curve",
    "hierarchical_regression",
    "linear_regression",
    "school_effect",
]
