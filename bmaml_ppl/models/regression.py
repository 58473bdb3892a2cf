"""The hierarchical Bayesian network of Grant et al. (2018) and Bayesian MAML (2018), for regression."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod, sqrt
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call
from torch.nn import functional

from bmaml_ppl.checks import check_positive
from bmaml_ppl.models.inputs import as_columns, as_floating, check_output
from bmaml_ppl.types import Model

__all__ = ["hierarchical_regression"]

Activation = Callable[[Tensor], Tensor]

_BIAS_SD = 0.01


def hierarchical_regression(
    network: Sequence[int] | nn.Module,
    *,
    center: Literal["zero", "learned"] = "zero",
    precisions: Literal["latent", "learned"] = "latent",
    noise_prior: tuple[float, float] = (2.0, 0.2),
    weight_prior: tuple[float, float] = (2.0, 2.0),
    initial_noise: float = 0.1,
    initial_scale: float = 0.1,
    precision_spread: float = 0.001,
    activation: Activation = torch.relu,
    seed: int = 0,
) -> Model:
    r"""A regression task whose latents are all weights of a network, and two precisions unless those are learned.

    .. math::
        \gamma \sim \Gamma(a, b), \quad \lambda \sim \Gamma(a', b'), \quad w \sim N(\theta, \lambda^{-1} I), \quad
        y_i \sim N(f(x_i; w), \gamma^{-1})

    The returned model is `model(x, y=None)` with x (N,) or (N, d_in) and y (N,), or (N, d_out) for several
    outputs, in plate "data". Latent sites: `gamma` and `lam`, scalars, and `weights`, one vector of all P
    weights, so that a 1-40-40-40-1 network has D = 3403. Free particles start as the authors' do: an
    independent draw of the weights each, `gamma` at `initial_noise**-2` and `lam` at 1. With
    `precisions="learned"` the latents are the weights alone (D = P):

    .. math:: w_p \sim N(\theta_p, s_p^2), \quad y_i \sim N(f(x_i; w), \sigma^2)

    Args:
        network: Layer sizes of a perceptron, such as (1, 40, 40, 40, 1), or a module whose parameters are
            replaced by slices of `weights`; it learns nothing by itself and is left as it is.
        center: Mean of the weights' prior. "zero" is Bayesian MAML's, where what tasks share is the start of
            the particles; "learned" is Grant's, a `pyro.param("theta")` at which particles start, spread by
            `lam`. A spread of 1 is wide for a network: `weight_prior=(200.0, 2.0)` starts it at 0.1.
        precisions: "latent" gives each task its own `gamma` and `lam`; "learned" meta-learns one standard
            deviation a weight, `pyro.param("scale")`, and of the noise, `pyro.param("noise")`, as ABML does, and
            wants `center="learned"` as well.
        noise_prior: Shape a and rate b of the noise precision, in units of y^-2.
        weight_prior: Shape a' and rate b' of the weights' precision.
        initial_noise: Noise standard deviation at which free particles, or the learned noise, start, in units of y.
        initial_scale: First value of all entries of a learned `scale`.
        precision_spread: Standard deviation of the logarithms of free particles' precisions at the start.
        activation: Between the layers of a perceptron; unused for a module.
        seed: Of the first value of `theta` for layer sizes; a module starts at its own weights.

    Raises:
        ValueError: If an option is unknown, sizes are too few or below 1, a module has no parameters or keeps
            running statistics, or y and the network's output differ in shape.

    References:
        Grant et al. (2018), Recasting Gradient-Based Meta-Learning as Hierarchical Bayes, section 3; Yoon et
        al. (2018), Bayesian Model-Agnostic Meta-Learning, section 5.1, and its released code for the priors
        and starts; Ravi and Beatson (2019), Amortized Bayesian Meta-Learning, section 3, for learned precisions.
    """
    scales = {"initial_noise": initial_noise, "initial_scale": initial_scale, "precision_spread": precision_spread}
    _check_options(center, precisions, **scales)
    wrapped = _from_module(network) if isinstance(network, nn.Module) else _from_sizes(network, activation, seed)

    def near(precision: float) -> Tensor:
        return precision * torch.exp(precision_spread * torch.randn(()))

    def latent(zeros: Tensor) -> tuple[Tensor, Tensor]:
        gamma = pyro.sample("gamma", dist.Gamma(*noise_prior), infer=_start(lambda: near(initial_noise**-2)))
        lam = pyro.sample("lam", dist.Gamma(*weight_prior), infer=_start(lambda: near(1.0)))
        return gamma.rsqrt(), lam.rsqrt()

    def learned(zeros: Tensor) -> tuple[Tensor, Tensor]:
        positive = constraints.positive
        noise = pyro.param("noise", lambda: zeros.new_tensor(initial_noise), constraint=positive)
        return noise, pyro.param("scale", lambda: torch.full_like(zeros, initial_scale), constraint=positive)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        zeros = as_floating(x).new_zeros(len(wrapped.loc))
        theta = pyro.param("theta", lambda: wrapped.start.to(zeros)) if center == "learned" else zeros
        noise, scale = (latent if precisions == "latent" else learned)(zeros)
        start = _start(lambda: wrapped.draw(zeros.dtype), shapes=wrapped.shapes)
        weights = pyro.sample("weights", dist.Normal(theta, scale).to_event(1), infer=start)
        mean = wrapped.apply(weights, x)
        check_output(mean, y)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, noise).to_event(mean.ndim - 1), obs=y)

    return model


def _check_options(center: str, precisions: str, **positive: float) -> None:
    if center not in ("zero", "learned"):
        raise ValueError(f'center={center!r} is not known; choose "zero" or "learned"')
    if precisions not in ("latent", "learned"):
        raise ValueError(f'precisions={precisions!r} is not known; choose "latent" or "learned"')
    check_positive(**positive)


def _start(draw: Callable[[], Tensor], **more: Any) -> Any:
    return {"init": draw, **more}


@dataclass(frozen=True, eq=False)
class _Network:
    """A network as a function of one vector of P weights.

    Attributes:
        apply: (weights, x) -> output, without the last dimension where it is 1.
        loc: Mean of a particle's first weights, (P,).
        scale: Their standard deviation, (P,).
        start: First value of the learned prior mean, (P,).
        shapes: Shape of each parameter, in the order of the vector.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    loc: Tensor
    scale: Tensor
    start: Tensor
    shapes: list[tuple[int, ...]]

    def draw(self, dtype: torch.dtype) -> Tensor:
        noise = torch.randn(len(self.loc), dtype=dtype)
        return self.loc.to(noise) + self.scale.to(noise) * noise


def _from_sizes(sizes: Sequence[int], activation: Activation, seed: int) -> _Network:
    """A perceptron with Xavier-normal weights and biases near zero."""
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"network={sizes!r} needs at least two sizes of at least 1, for example (1, 40, 40, 1)")
    pairs = list(pairwise(sizes))
    shapes: list[tuple[int, ...]] = [shape for d_in, d_out in pairs for shape in ((d_out, d_in), (d_out,))]
    lengths = [prod(shape) for shape in shapes]
    deviations = [sd for d_in, d_out in pairs for sd in (sqrt(2 / (d_in + d_out)), _BIAS_SD)]

    def apply(weights: Tensor, x: Tensor) -> Tensor:
        hidden = as_columns(x, sizes[0])
        parts = iter(weights.split(lengths))
        for layer, (d_in, d_out) in enumerate(pairs):
            hidden = functional.linear(hidden, next(parts).reshape(d_out, d_in), next(parts))
            hidden = activation(hidden) if layer + 1 < len(pairs) else hidden
        return _drop_single(hidden)

    scale = torch.tensor(deviations).repeat_interleave(torch.tensor(lengths))
    start = scale * torch.randn(len(scale), generator=torch.Generator().manual_seed(seed))
    return _Network(apply, torch.zeros_like(scale), scale, start, shapes)


def _from_module(module: nn.Module) -> _Network:
    """A module; its initialiser is approximated by the mean and spread of each tensor's present values."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    if not shapes:
        raise ValueError(f"network={type(module).__name__} has no parameters; give one with weights to infer")
    if kept := [name for name, layer in module.named_modules() if getattr(layer, "track_running_stats", False)]:
        raise ValueError(
            f"layers {kept} keep running statistics, which tasks would share; write track_running_stats=False, or "
            "use nn.LayerNorm"
        )
    lengths = [shape.numel() for shape in shapes.values()]
    values = [parameter.detach().reshape(-1) for parameter in module.parameters()]

    def apply(weights: Tensor, x: Tensor) -> Tensor:
        named = dict(zip(shapes, weights.split(lengths), strict=True))
        return _drop_single(functional_call(module, {k: v.reshape(shapes[k]) for k, v in named.items()}, (x,)))

    loc = torch.cat([value.mean().expand(len(value)) for value in values])
    scale = torch.cat([value.var(correction=0).add(_BIAS_SD**2).sqrt().expand(len(value)) for value in values])
    return _Network(apply, loc, scale, torch.cat(values).clone(), [tuple(shape) for shape in shapes.values()])


def _drop_single(output: Tensor) -> Tensor:
    return output.squeeze(-1) if output.ndim == 2 and output.shape[-1] == 1 else output
