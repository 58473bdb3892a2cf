"""Inference algorithms: one a file, one contract (`bmaml_ppl.types.Inference`), one registry."""

from collections.abc import Callable

from bmaml_ppl.inference.hmc import hmc
from bmaml_ppl.inference.laplace import laplace
from bmaml_ppl.inference.mean_field import mean_field
from bmaml_ppl.inference.platipus import platipus
from bmaml_ppl.inference.point import map_estimate
from bmaml_ppl.inference.smc import smc
from bmaml_ppl.inference.svgd import svgd
from bmaml_ppl.types import Inference

__all__ = ["ALGORITHMS", "hmc", "laplace", "map_estimate", "mean_field", "platipus", "smc", "svgd"]

ALGORITHMS: dict[str, Callable[..., Inference]] = {
    "hmc": hmc,
    "laplace": laplace,
    "map_estimate": map_estimate,
    "mean_field": mean_field,
    "platipus": platipus,
    "smc": smc,
    "svgd": svgd,
}
"""Every algorithm by name; the contract tests run over it and saved priors are rebuilt from it."""
