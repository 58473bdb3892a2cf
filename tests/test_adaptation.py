"""The adaptation loop and the choice of a start."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bmaml_ppl.adaptation import TaskData, as_task_data, resolve_start
from bmaml_ppl.density import from_model
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import map_estimate, svgd
from bmaml_ppl.types import Model
from tests.toys import bind, level, level_tasks, line, line_tasks


def noise_only(x: Tensor, y: Tensor | None = None) -> None:
    """Meta-parameters in the likelihood alone."""
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("obs", dist.Normal(a, noise), obs=y)


@pytest.mark.parametrize(("model", "wanted"), [(level, "prior"), (noise_only, "free"), (line, "free")])
def test_auto_starts_at_the_prior_where_it_is_learned(model: Model, wanted: str) -> None:
    data = {k: v[0] for k, v in level_tasks(1, 4).data.items()}
    assert resolve_start(svgd(), from_model(model, data), TaskData(data, None)) == wanted
    assert resolve_start(svgd(init="free"), from_model(model, data), TaskData(data, None)) == "free"


def test_particles_start_at_reparameterised_prior_draws() -> None:
    tasks = level_tasks(1, 4)
    adapter = bind(level, tasks, map_estimate(num_particles=4000, num_steps=0, init="prior"), "prior")
    task = as_task_data(tasks)

    def mean_and_sd(mean: Tensor, sd: Tensor) -> Tensor:
        with seeded(0, torch.device("cpu")):
            prior = {"mean": mean, "sd": sd, "noise": torch.tensor(1.0)}
            particles = adapter.adapt(prior, task).particles
        return torch.stack([particles.mean(), particles.std()])

    at = (torch.tensor(2.0), torch.tensor(0.5))
    # Standard errors are 0.008 and 0.006: four of them fail once in 16,000 seeds, and the seed is fixed.
    torch.testing.assert_close(mean_and_sd(*at), torch.tensor([2.0, 0.5]), rtol=0, atol=0.03)
    jacobian = torch.stack(torch.func.jacrev(mean_and_sd, (0, 1))(*at), -1)
    torch.testing.assert_close(jacobian, torch.eye(2), rtol=0, atol=0.06)


def test_more_steps_go_on_from_where_fewer_end() -> None:
    tasks = line_tasks(1, 6)
    adapter = bind(line, tasks, svgd(num_particles=4, num_steps=2, init="free"), "free")
    task, prior = as_task_data(tasks), {"particles": torch.randn(4, 2)}
    on = adapter.run(adapter.adapt(prior, task, 2), prior, task, 3)
    torch.testing.assert_close(on.particles, adapter.adapt(prior, task, 5).particles)


def test_first_order_changes_gradients_and_not_values() -> None:
    tasks = line_tasks(1, 6)
    task, start = as_task_data(tasks), torch.randn(3, 2)
    gradients, values = [], []
    for first_order in (False, True):
        adapter = bind(line, tasks, map_estimate(num_particles=3, num_steps=2), "free", first_order)

        def total(particles: Tensor, adapter: object = adapter) -> Tensor:
            return adapter.adapt({"particles": particles}, task).particles.sum()  # type: ignore[attr-defined]

        values.append(total(start))
        gradients.append(torch.func.grad(total)(start))
    torch.testing.assert_close(values[0], values[1])
    assert not torch.allclose(gradients[0], gradients[1])
    assert gradients[1].abs().min() > 0


def test_a_seeded_block_puts_the_generator_back() -> None:
    before = torch.get_rng_state()
    with seeded(3, torch.device("cpu")):
        first = torch.randn(2)
    assert torch.equal(before, torch.get_rng_state())
    with seeded(3, torch.device("cpu")):
        assert torch.equal(first, torch.randn(2))
