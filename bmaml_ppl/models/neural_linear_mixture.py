"""A mixture of neural linear regressions: tasks are of several kinds, each with a few functions of its own."""

from collections.abc import Callable, Sequence
from math import sqrt

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from bmaml_ppl.checks import check_positive
from bmaml_ppl.models.inputs import check_output
from bmaml_ppl.models.neural_linear import Activation, check_features, make_features
from bmaml_ppl.types import Model

__all__ = ["neural_linear_mixture"]

_WIDTH = 0.05
_SHARED = 0.1


def neural_linear_mixture(
    network: Sequence[int] | nn.Module,
    *,
    num_components: int = 32,
    rank: int = 6,
    activation: Activation = torch.tanh,
    initial_scale: float = 1.0,
    initial_noise: float = 0.1,
    seed: int = 0,
) -> Model:
    r"""A task's function is a random combination of R functions, which of G sets of them is the task's own choice.

    .. math::
        k \sim Categorical(.9 \pi + .1 / G), \quad \log s \sim N(m, v^2), \quad c \sim N(0, s^2 I_R), \quad
        y_i \sim N\bigl(h(x_i)^T B_k c, (\rho s)^2\bigr)

    Given k and s, the posterior of c is Gaussian: tasks of one kind are a neural linear regression of rank R with noise
    in proportion to their size. Tasks that no linear combination of a few functions holds, curves of any frequency for
    example, are of many kinds. `laplace(num_particles=...)` weighs the kinds by their evidence, `evidence()` learns
    them. A tenth of the prior is shared by all kinds equally: where starts are drawn from learned weights alone, the
    kinds that many tasks took first get the starts, and with them the tasks.

    The kind is a number, k plus N(0, .05^2), rounded where it is used: gradients and Gaussian approximations know
    numbers only, and with as many starts as kinds or some times as many (`init="prior"`) nothing is lost by it.

    The returned model is `model(x, y=None)` with x (N,) or (N, d_in) and y (N,), best standardised. Latent sites:
    `kind`; `scale` s; `coef` c, (R,). Meta-learned: the network's weights, registered as "features"; `basis` B,
    (G, H + 1, R), the intercept first; `kind_logits`, of pi; `scale_loc` m, `scale_sd` v, and `noise_ratio` rho.

    Args:
        network: Layer sizes of a perceptron, whose last is the number H of features, or a module; see `neural_linear`.
        num_components: G.
        rank: R.
        activation: After each layer of a perceptron.
        initial_scale: First standard deviation of a task's function, in units of y, where features are around 1.
        initial_noise: First value of rho times `initial_scale`: noise, in units of y.
        seed: Of the first weights and functions.

    Raises:
        ValueError: If an option is not positive, sizes are too few or below 1, the network's output is not (N, H), or y
            is not (N,).

    References:
        Snoek et al. (2015), Scalable Bayesian Optimization Using Deep Neural Networks, section 3, for the regression;
        Tipping and Bishop (1999), Mixtures of Probabilistic Principal Component Analyzers, for the mixture; Jerfel et
        al. (2019), Reconciling Meta-Learning and Continual Learning with Online Mixtures of Tasks, for kinds of tasks.
    """
    check_positive(num_components=num_components, rank=rank, initial_scale=initial_scale, initial_noise=initial_noise)
    features = make_features(network, activation, seed)
    kinds = torch.arange(float(num_components), dtype=torch.float64)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        hidden = pyro.module("features", features)(x)
        check_features(hidden, x)
        logits = _parameter("kind_logits", hidden, lambda: torch.zeros(num_components))
        kind = pyro.sample("kind", _near(kinds.to(hidden), logits))
        size = (num_components, hidden.shape[1] + 1, rank)
        bases = _parameter("basis", hidden, lambda: _first_basis(size, initial_scale, seed))
        index = kind.detach().round().clamp(0, num_components - 1).long()
        basis = bases.index_select(0, index.unsqueeze(0)).squeeze(0)
        loc = _parameter("scale_loc", hidden, lambda: torch.zeros(()))
        scale = pyro.sample("scale", dist.LogNormal(loc, _positive("scale_sd", hidden, 1.0)))
        coef = pyro.sample("coef", dist.Normal(hidden.new_zeros(rank), scale).to_event(1))
        mean = (basis[0] + hidden @ basis[1:]) @ coef
        check_output(mean, y)
        noise = _positive("noise_ratio", hidden, initial_noise / initial_scale) * scale
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, noise), obs=y)

    return model


def _near(kinds: Tensor, logits: Tensor) -> dist.MixtureSameFamily:
    weights = (1 - _SHARED) * logits.softmax(0) + _SHARED / len(kinds)
    width = kinds.new_full(kinds.shape, _WIDTH)
    return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(kinds, width))


def _parameter(name: str, like: Tensor, start: Callable[[], Tensor]) -> Tensor:
    value: Tensor = pyro.param(name, lambda: start().to(like))
    return value


def _positive(name: str, like: Tensor, start: float) -> Tensor:
    value: Tensor = pyro.param(name, lambda: like.new_tensor(start), constraint=constraints.positive)
    return value


def _first_basis(size: tuple[int, int, int], scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale / sqrt((size[1] - 1) * size[2]) * torch.randn(size, generator=generator)
