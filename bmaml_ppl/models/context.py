"""A network that all tasks share, steered by a few numbers of each task's own."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional

from bmaml_ppl.checks import check_positive
from bmaml_ppl.generators import seeded
from bmaml_ppl.models.inputs import as_columns, check_output
from bmaml_ppl.types import Model

__all__ = ["context_network"]

Activation = Callable[[Tensor], Tensor]


def context_network(
    network: Sequence[int],
    *,
    num_context: int = 4,
    activation: Activation = torch.tanh,
    initial_noise: float = 1.0,
    seed: int = 0,
) -> Model:
    r"""A regression task whose latents are a context vector that shifts and scales the layers of a shared network.

    .. math::
        c \sim N(0, I_C), \quad h_{l+1} = a\bigl((W_l h_l + b_l) \odot (1 + V_l c) + U_l c\bigr), \quad
        y_i \sim N(f(x_i; c), \sigma(c)^2)

    Where tasks differ in a few respects, the network learns what these are, and the posterior of a task is one of a few
    numbers, whatever the size of the network: `smc()` finds all its modes. The returned model is `model(x, y=None)`
    with x (N,) or (N, d_in) and y (N,), in plate "data", best standardised. Latent site: `context`, (C,). Meta-learned:
    all weights, registered as "network", among them those of the noise, which may differ between tasks.

    Args:
        network: Layer sizes of the network of x, such as (1, 64, 64, 1), with at least one hidden layer to steer.
        num_context: C.
        activation: Between layers.
        initial_noise: First value of sigma, in units of y. Of the size of y: the posterior then begins wide, and
            narrows as the network learns.
        seed: Of the first weights, from a generator of their own.

    Raises:
        ValueError: If sizes are too few or below 1, the last is not 1, or `initial_noise` is not positive.

    References:
        Zintgraf et al. (2019), Fast Context Adaptation via Meta-Learning, for context that is adapted alone; Perez et
        al. (2018), FiLM: Visual Reasoning with a General Conditioning Layer, for how it steers.
    """
    if len(network) < 3 or min(network) < 1 or network[-1] != 1:
        raise ValueError(f"network={network!r} needs at least three sizes of at least 1, the last 1: (1, 64, 64, 1)")
    if num_context < 1:
        raise ValueError(f"num_context={num_context!r} must be at least 1")
    check_positive(initial_noise=initial_noise)
    steered = _Steered(network, num_context, activation, initial_noise, seed)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        columns = as_columns(x, network[0])
        zeros = columns.new_zeros(num_context)
        context = pyro.sample("context", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
        mean, noise = pyro.module("network", steered)(columns, context)
        check_output(mean, y)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, noise), obs=y)

    return model


class _Steered(nn.Module):
    """Maps x (N, d_in) and context (C,) to means (N,) and one standard deviation."""

    def __init__(
        self, sizes: Sequence[int], num_context: int, activation: Activation, initial_noise: float, seed: int
    ) -> None:
        super().__init__()
        self.activation = activation
        pairs = list(pairwise(sizes))
        with seeded(seed, torch.device("cpu")):
            layers = [nn.Linear(*pair) for pair in pairs]
            steering = [nn.Linear(num_context, 2 * pair[1], bias=False) for pair in pairs[:-1]]
            first, last = nn.Linear(num_context, 16), nn.Linear(16, 1)
            for layer in layers:
                nn.init.xavier_normal_(layer.weight, 5 / 3)
            for layer in steering:
                nn.init.normal_(layer.weight, std=0.5 / num_context**0.5)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, log(initial_noise))
        self.layers, self.steering = nn.ModuleList(layers), nn.ModuleList(steering)
        self.noise = nn.Sequential(first, nn.Tanh(), last)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x
        for layer, steering in zip(self.layers[:-1], self.steering, strict=True):
            scale, shift = _apply(steering, context).chunk(2)
            hidden = self.activation(_apply(layer, hidden) * (1 + scale) + shift)
        first, bend, last = self.noise
        log_noise = _apply(last, bend(_apply(first, context)))
        return _apply(self.layers[-1], hidden).squeeze(-1), log_noise.squeeze(-1).exp()


def _apply(layer: Any, x: Tensor) -> Tensor:
    # At the first run the weights are the module's own, which need not have the data's dtype or device.
    return functional.linear(x, layer.weight.to(x), None if layer.bias is None else layer.bias.to(x))
