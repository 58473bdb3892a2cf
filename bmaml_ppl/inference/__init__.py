"""Inference algorithms: one a file, one contract (`bmaml_ppl.types.Inference`), one registry."""

from collections.abc import Callable

from bmaml_ppl.inference.point import map_estimate
from bmaml_ppl.inference.svgd import svgd
from bmaml_ppl.types import Inference

__all__ = ["ALGORITHMS", "map_estimate", "svgd"]

ALGORITHMS: dict[str, Callable[..., Inference]] = {"map_estimate": map_estimate, "svgd": svgd}
"""Every algorithm by name; the contract tests run over it and saved priors are rebuilt from it."""
