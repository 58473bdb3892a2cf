"""Small task models whose answers are known in closed form, shared by the tests."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bmaml_ppl.adaptation import Adapter
from bmaml_ppl.density import from_model
from bmaml_ppl.inference import ALGORITHMS
from bmaml_ppl.outer import Views, episode_views
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, Model, Start


def level(x: Tensor, y: Tensor | None = None) -> None:
    """A normal level with normal noise: y ~ N(a, noise), a ~ N(mean, sd), all three meta-learned."""
    mean = pyro.param("mean", torch.tensor(0.5))
    sd = pyro.param("sd", torch.tensor(0.5), constraint=dist.constraints.positive)
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    a = pyro.sample("a", dist.Normal(mean, sd))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(a, noise), obs=y)


def line(x: Tensor, y: Tensor | None = None) -> None:
    """A straight line with a standard normal prior and known noise: nothing to learn but the start."""
    coef = pyro.sample("coef", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * x, 0.5), obs=y)


def straight(x: Tensor, y: Tensor | None = None) -> None:
    """A straight line with meta-learned mean, covariance and noise: the linear mixed model."""
    mean = pyro.param("mean", torch.zeros(2))
    scale_tril = pyro.param("scale_tril", torch.eye(2), constraint=dist.constraints.lower_cholesky)
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    coef = pyro.sample("coef", dist.MultivariateNormal(mean, scale_tril=scale_tril))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(coef[0] + coef[1] * x, noise), obs=y)


def level_tasks(num_tasks: int, num_observations: int, seed: int = 0) -> Tasks:
    """Tasks of `level` with mean 0, sd 1 and noise 0.5."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num_tasks, 1, generator=generator)
    y = a + 0.5 * torch.randn(num_tasks, num_observations, generator=generator)
    return Tasks({"x": torch.zeros_like(y), "y": y}, outputs=("y",))


def line_tasks(num_tasks: int, num_observations: int, seed: int = 0) -> Tasks:
    """Tasks of `line` and `straight`: coefficients N(0, 1), noise 0.5, inputs N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    coef = torch.randn(num_tasks, 2, generator=generator)
    x = torch.randn(num_tasks, num_observations, generator=generator)
    noise = 0.5 * torch.randn(num_tasks, num_observations, generator=generator)
    return Tasks({"x": x, "y": coef[:, :1] + coef[:, 1:] * x + noise}, outputs=("y",))


def bind(
    model: Model, tasks: Tasks, inference: Inference, start: Start, first_order: bool = False, recorded: bool = False
) -> Adapter:
    """An adapter for a model, its inference rebuilt with the model's site layout."""
    density = from_model(model, {k: v[0] for k, v in tasks.data.items()})
    bound = ALGORITHMS[inference.name](**inference.config, sites=density.sites)
    return Adapter(density, bound, start, first_order, "recorded" if recorded else "eager")


def views_of(tasks: Tasks, num_support: int) -> Views:
    """Support, query and everything, the first rows as support."""
    return episode_views(tasks.split_observations(num_support))


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, eps: float = 1e-5) -> Tensor:
    """Central differences of a scalar function of one tensor, in the tensor's shape."""
    flat = at.reshape(-1)
    slopes = []
    for i in range(flat.numel()):
        step = torch.zeros_like(flat)
        step[i] = eps
        up, down = function((flat + step).reshape(at.shape)), function((flat - step).reshape(at.shape))
        slopes.append((up - down) / (2 * eps))
    return torch.stack(slopes).reshape(at.shape)
