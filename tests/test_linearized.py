"""The linearised predictive: the sampled one of a linear model, and a Gaussian's moments of any."""

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from bmaml_ppl.inference import laplace, svgd
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.posterior import Posterior
from bmaml_ppl.tasks import Tasks
from tests.toys import line_tasks, straight


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def bend(x: Tensor, y: Tensor | None = None) -> None:
    """A curve whose mean and noise are nonlinear in the latents; two outputs a row."""
    mean = pyro.param("mean", torch.tensor([0.5, -0.3]))
    z = pyro.sample("z", dist.Normal(mean, 0.3).to_event(1))
    curve = torch.stack([torch.sin(z[0] * x), z[1] * x**2], -1)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(curve, torch.exp(0.3 * z[1] - 2)).to_event(1), obs=y)


@pytest.fixture
def bent() -> Posterior:
    x = torch.linspace(-1, 2, 5)
    y = torch.stack([torch.sin(0.7 * x), -0.2 * x**2], -1)[None]
    tasks = Tasks({"x": x[None], "y": y}, outputs=("y",))
    prior = meta_learn(bend, tasks, num_support=2, inference=laplace(), num_steps=0, progress=False)
    return prior.adapt(x=x, y=y[0])


def test_a_linear_models_predictive_is_the_sampled_one() -> None:
    tasks = line_tasks(3, 6)
    prior = meta_learn(straight, tasks, num_support=3, inference=laplace(), num_steps=0, progress=False)
    posterior = prior.adapt(tasks)
    sampled, linear = (posterior.predict(num_samples=50, linearized=flag)["obs"] for flag in (False, True))
    torch.testing.assert_close(linear, sampled)
    scored = [posterior.log_likelihood(num_samples=50, linearized=flag)["obs"] for flag in (False, True)]
    torch.testing.assert_close(*scored)


def test_parameters_are_first_order_in_the_draws(bent: Posterior) -> None:
    new = torch.tensor([0.3, 1.4])
    target = torch.tensor([[0.1, 0.2], [0.9, -0.5]])
    got = bent.log_likelihood(num_samples=7, linearized=True, x=new, y=target)["obs"]

    def parameters(z: Tensor) -> tuple[Tensor, Tensor]:
        loc = torch.stack([torch.sin(z[0] * new), z[1] * new**2], -1)
        return loc, (0.3 * z[1] - 2).expand(2, 2)

    mode = bent.particles[0]
    values, slopes = parameters(mode), jacrev(parameters)(mode)
    for i, z in enumerate(bent.draws(7)):
        loc, log_scale = (v + s @ (z - mode) for v, s in zip(values, slopes, strict=True))
        expected = torch.distributions.Normal(loc, log_scale.exp()).log_prob(target).sum(-1)
        torch.testing.assert_close(got[i], expected)


def test_draws_have_the_linearised_mean(bent: Posterior) -> None:
    # Fixed seed; the standard error of a mean of 4,000 draws is below .01.
    new = torch.tensor([0.3, 1.4])
    drawn = bent.predict(num_samples=4000, linearized=True, x=new)["obs"]
    assert drawn.shape == (4000, 2, 2)
    mode = bent.particles[0]
    expected = torch.stack([torch.sin(mode[0] * new), mode[1] * new**2], -1)
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.04, rtol=0)
    assert (bent.predict(num_samples=4000, x=new)["obs"].mean(0) - expected).abs().max() > 0.005


def test_padded_rows_are_blank() -> None:
    tasks = line_tasks(2, 6)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    ragged = Tasks({k: v * real for k, v in tasks.data.items()}, mask=real, names=("a", "b"), outputs=("y",))
    prior = meta_learn(straight, ragged, num_support=2, inference=laplace(), num_steps=0, progress=False)
    drawn = prior.adapt(ragged).predict(num_samples=5, linearized=True)["obs"]
    assert drawn[:, 1, 4:].isnan().all()
    assert not drawn[:, 0].isnan().any()
    assert not drawn[:, 1, :4].isnan().any()


def test_particles_cannot_be_linearised() -> None:
    tasks = line_tasks(2, 6)
    for inference in (svgd(num_particles=5), laplace(num_particles=2)):
        prior = meta_learn(straight, tasks, num_support=3, inference=inference, num_steps=0, progress=False)
        with pytest.raises(ValueError, match="linearized=True needs one mode"):
            prior.adapt(tasks).predict(linearized=True)
