"""Linear regression whose coefficients vary from task to task."""

import pyro
import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.models.inputs import as_floating
from bmaml_ppl.types import Model

__all__ = ["linear_regression"]


def linear_regression(num_features: int) -> Model:
    r"""A task's linear regression with a meta-learned normal prior on its intercept and slopes.

    .. math:: c_j \sim N(\mu_j, s_j^2), \quad y_i \sim N(c_0 + x_i^T c_{1:}, \sigma^2)

    The returned model is `model(x, y=None)` with x (N, num_features), or (N,) for one feature, and y (N,).
    Latent site: `coef`, (num_features + 1,), the intercept first. Meta-learned: `mean` and `scale` of the
    coefficients, and `noise` sigma in units of y.

    Args:
        num_features: Columns of x; 0 is not allowed, a random intercept alone is `growth_curve(0)`.

    Raises:
        ValueError: If there are no features, or x has another number of them.

    Reference:
        Gelman and Hill (2006), Data Analysis Using Regression and Multilevel Models, section 13.1.
    """
    if num_features < 1:
        raise ValueError(f"num_features={num_features}; give at least 1, or use growth_curve(0)")

    def model(x: Tensor, y: Tensor | None = None) -> None:
        x = as_floating(x)
        columns = x.unsqueeze(-1) if x.ndim == 1 else x
        if columns.ndim != 2 or columns.shape[1] != num_features:
            raise ValueError(f"x has shape {tuple(x.shape)}, but the model takes (N, {num_features})")
        mean = pyro.param("mean", lambda: x.new_zeros(num_features + 1))
        scale = pyro.param("scale", lambda: x.new_ones(num_features + 1), constraint=constraints.positive)
        noise = pyro.param("noise", lambda: x.new_tensor(0.5), constraint=constraints.positive)
        coef = pyro.sample("coef", dist.Normal(mean, scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(coef[0] + columns @ coef[1:], noise), obs=y)

    return model
