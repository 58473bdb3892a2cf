"""Inputs that are whole numbers, days or doses, are inputs too."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bmaml_ppl.density import from_model
from bmaml_ppl.models import (
    context_network,
    growth_curve,
    hierarchical_regression,
    linear_regression,
    neural_linear,
    neural_linear_mixture,
    one_compartment,
    sinusoid_program,
    smooth_growth,
)
from bmaml_ppl.types import Model

XY = ("x", "y")
MODELS: dict[str, tuple[Callable[[], Model], tuple[str, ...]]] = {
    "context network": (lambda: context_network((1, 4, 1)), XY),
    "growth curve": (growth_curve, ("time", "value")),
    "smooth growth": (smooth_growth, ("time", "value")),
    "linear": (lambda: linear_regression(1), XY),
    "network": (lambda: hierarchical_regression((1, 4, 1)), XY),
    "network that all share": (lambda: neural_linear((1, 4, 3)), XY),
    "mixture": (lambda: neural_linear_mixture((1, 4, 3), num_components=2, rank=2), XY),
    "sinusoid": (sinusoid_program, XY),
    "one compartment": (one_compartment, ("time", "dose", "concentration")),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_numbers_have_the_density_of_the_same_floats(name: str) -> None:
    make, (*inputs, output) = MODELS[name]
    whole = {**{x: torch.arange(1, 6) for x in inputs}, output: torch.linspace(0.5, 1.5, 5)}
    density = from_model(make(), whole)
    z = 0.1 * torch.randn(density.dim, generator=torch.Generator().manual_seed(0))
    floats = {x: value.float() for x, value in whole.items()}
    expected = density.log_joint(z, density.prior, floats)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(density.log_joint(z, density.prior, whole), expected)
    assert density.log_joint(z, density.prior, {**whole, inputs[0]: whole[inputs[0]] + 1}) != expected


def test_a_network_of_words_takes_their_numbers() -> None:
    words = {"x": torch.tensor([0, 2, 1, 2]), "y": torch.randn(4, 3)}
    module = nn.Embedding(3, 3)
    density = from_model(hierarchical_regression(module, center="learned"), words)
    mean = density.observe(torch.zeros(density.dim), density.prior, words)["obs"].fn.mean
    assert mean.shape == (4, 3)
    torch.testing.assert_close(mean[1], mean[3])
