"""Trust as a first user meets it: draws, chains, checks and exports on awkward models."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import vmap

import bmaml_ppl as bp
from bmaml_ppl.draws import reparameterised
from bmaml_ppl.inference import hmc, laplace, svgd
from bmaml_ppl.inference.nuts import nuts
from tests import toys

NUM_DRAWS = 20_000


@pytest.mark.parametrize(("dim", "concentration"), [(2, 1.0), (3, 0.7), (3, 2.0), (5, 1.0)])
def test_correlations_have_the_marginals_of_lkj(dim: int, concentration: float) -> None:
    # Every correlation is 2 B - 1 with B ~ Beta(a, a), a = concentration - 1 + dim / 2: Lewandowski et al. (2009).
    def draw(_: Tensor) -> Tensor:
        return reparameterised(dist.LKJCholesky(dim, torch.tensor(concentration, dtype=torch.float64)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        factor = vmap(draw, randomness="different")(torch.zeros(NUM_DRAWS))
    row, column = torch.tril_indices(dim, dim, offset=-1)
    correlation = (factor @ factor.mT)[:, row, column]
    a = torch.tensor(concentration - 1 + dim / 2, dtype=torch.float64)
    # E r^2 = 1 / (2 a + 1) and E r^4 = 3 / ((2 a + 1) (2 a + 3)); 6 standard errors, false alarm 4e-8 a fresh seed.
    second, fourth = 1 / (2 * a + 1), 3 / ((2 * a + 1) * (2 * a + 3))
    error = ((fourth - second**2) / NUM_DRAWS).sqrt()
    assert bool(((correlation.square().mean(0) - second).abs() < 6 * error).all())
    assert bool((correlation.mean(0).abs() < 6 * (second / NUM_DRAWS).sqrt()).all())


def untrained(model: Any, tasks: bp.Tasks) -> bp.LearnedPrior:
    return bp.meta_learn(model, tasks, num_support=2, num_steps=0, compile=False, progress=False)


def test_chains_of_nuts_are_chains_to_check_and_to_arviz() -> None:
    tasks = toys.level_tasks(2, 4)
    posterior = nuts(untrained(toys.level, tasks), tasks[0], num_warmup=30, num_draws=50, num_chains=2)
    assert posterior.num_chains == 2
    names = {found.name for found in bp.check(posterior, num_samples=100).findings}
    assert {"agreement of chains (R-hat)", "effective sample size", "divergent transitions"} <= names
    tree = posterior.to_arviz()
    assert tree["posterior"].sizes["chain"] == 2
    assert tree["posterior"].sizes["draw"] == 50
    assert {"diverging", "acceptance_rate", "energy", "step_size"} <= set(tree["sample_stats"])


def constrained(x: Tensor, y: Tensor | None = None) -> None:
    """A level that a factor holds near 1, and an observation weighted down row by row."""
    a = pyro.sample("a", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))
    pyro.factor("soft", -0.5 * (a - 1.0) ** 2)
    with pyro.plate("data", x.shape[0]):
        pyro.factor("each", -0.1 * (a - x) ** 2)
        pyro.sample("obs", dist.Normal(a, 0.5), obs=y)


@pytest.mark.parametrize("single", [False, True])
def test_factors_are_exported_with_what_they_count(single: bool) -> None:
    tasks = toys.level_tasks(3, 4)
    posterior = untrained(constrained, tasks).adapt(tasks, inference=laplace())
    tree = (posterior[1] if single else posterior).to_arviz(num_samples=20)
    num_tasks = 1 if single else 3
    shapes = {name: tree["log_likelihood"][name].shape for name in ("soft", "each", "obs")}
    assert shapes == {"soft": (1, 20, num_tasks), "each": (1, 20, 4 * num_tasks), "obs": (1, 20, 4 * num_tasks)}


def weighed(x: Tensor, total: Tensor | None = None, y: Tensor | None = None) -> None:
    """A level seen twice: once for the whole task, and row by row."""
    a = pyro.sample("a", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))
    pyro.sample("total", dist.Normal(10 * a, 1.0), obs=total)
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(a, 0.5), obs=y)


@pytest.mark.parametrize("inference", [laplace(), svgd(), hmc(num_warmup=40, num_draws=60)], ids=lambda i: i.name)
def test_one_number_observed_for_a_whole_task(inference: Any) -> None:
    rows, total = toys.level_tasks(3, 3), torch.tensor([10.0, 0.0, -10.0])
    tasks = bp.Tasks(rows.data, {"total": total}, outputs=("y",))
    posterior = untrained(weighed, tasks).adapt(tasks, inference=inference)
    # Precisions 1, 100 and 4 a row: known in closed form.
    mean = (10 * total + 4 * rows.data["y"].sum(1)) / (1 + 100 + 4 * 3)
    assert bool(((posterior.sites(200)["a"].mean(0) - mean).abs() < 0.06).all())
    assert posterior.to_arviz(num_samples=40)["log_likelihood"]["total"].shape[2:] == (3,)
