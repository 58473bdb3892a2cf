"""The paper-sized job that several benchmarks time: Bayesian MAML's meta-gradient on sinusoids."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bmaml_ppl.adaptation import Adapter
from bmaml_ppl.compile import Mode
from bmaml_ppl.compiled_gradient import make_gradient
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.inference import svgd
from bmaml_ppl.memory import Memory
from bmaml_ppl.models.regression import hierarchical_regression
from bmaml_ppl.objectives import Objective, chaser
from bmaml_ppl.outer import Views, episode_views

__all__ = ["SEED", "SIZES", "STEP_SIZE", "Job", "Ours"]

SEED, SIZES, STEP_SIZE = 0, (1, 40, 40, 40, 1), 1e-3

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class Ours:
    """The library's meta-gradient of the particles, on the path that `meta_learn` takes for an adapter of this mode.

    Args:
        adapter: Inference bound to a density.
        objective: What is minimised.
        particles: The shared start, (M, D).
        views: A batch of tasks.
        scale: Factor of the gradient that is returned.
    """

    def __init__(
        self, adapter: Adapter, objective: Objective, particles: Tensor, views: Views, scale: float = 1.0
    ) -> None:
        self.gradient = make_gradient(adapter, objective, {})
        self.params, self.views, self.scale = {"particles": particles}, views, scale

    def __call__(self) -> Tensor:
        return self.scale * self.gradient(self.params, self.views).gradients["particles"]

    @property
    def how(self) -> str | None:
        """What the compiled mode chose."""
        return getattr(self.gradient, "how", None)


@dataclass(frozen=True)
class Job:
    """A meta-gradient of the chaser loss: scalar-median RBF kernel, second order, particles that all tasks share.

    Attributes:
        num_tasks: T.
        follow: Follower steps n.
        lead: Leader steps s.
        num_particles: M.
        num_support: K, and as many query points.
        sizes: Of the network, with two precisions beside its weights.
        device: Where to compute.
        step_size: alpha.
    """

    num_tasks: int = 10
    follow: int = 1
    lead: int = 1
    num_particles: int = 10
    num_support: int = 10
    sizes: tuple[int, ...] = SIZES
    device: str = "cpu"
    step_size: float = STEP_SIZE

    @cached_property
    def views(self) -> Views:
        tasks = sinusoid(self.num_tasks, 2 * self.num_support, seed=SEED).tasks.to(self.device)
        return episode_views(tasks.split_observations(self.num_support))

    @cached_property
    def model(self) -> Callable[..., Any]:
        return hierarchical_regression(self.sizes)

    @cached_property
    def example(self) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.views[0].data.items()}

    @cached_property
    def density(self) -> Density:
        return from_model(self.model, self.example)

    @cached_property
    def particles(self) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            return self.density.initial_particles(self.num_particles, self.example).to(self.device)

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support x and y, then all x and y, (T, N) each."""
        support, _, everything = self.views
        return support.data["x"], support.data["y"], everything.data["x"], everything.data["y"]

    def ours(self, mode: Mode, memory: Memory | None = None) -> Ours:
        """The library's."""
        inference = svgd(
            num_particles=self.num_particles,
            num_steps=self.follow,
            step_size=self.step_size,
            preconditioner="none",
            structure="joint",
        )
        adapter = Adapter(self.density, inference, "free", mode=mode, memory=memory or Memory())
        return Ours(adapter, chaser(self.lead), self.particles, self.views)

    def by_hand(self) -> Callable[[], Tensor]:
        """As one would write it with `torch.func` for this model alone, on Pyro's own traced log-joint."""

        def loss(z: Tensor, x: Tensor, y: Tensor, all_x: Tensor, all_y: Tensor) -> Tensor:
            for _ in range(self.follow):
                z = self._step(z, x, y)
            leader = z
            for _ in range(self.lead):
                leader = self._step(leader, all_x, all_y)
            return (z - leader.detach()).square().sum()

        def run() -> Tensor:
            with pyro.validation_enabled(False):
                mean = grad_and_value(lambda p: vmap(loss, (None, 0, 0, 0, 0))(p, *self.data).mean())
                return mean(self.particles)[0]

        return run

    def by_hand_compiled(self) -> Callable[[], Tensor]:
        """The same with its step recorded by `make_fx`, compiled by `torch.compile`, and looped."""
        x, y, all_x, all_y = self.data
        start = self.particles.expand(self.num_tasks, -1, -1).contiguous()

        def batch(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return vmap(self._step)(z, x, y)

        with pyro.validation_enabled(False):
            graphs = make_fx(batch)(start.clone().requires_grad_(), x, y), make_fx(batch)(start, all_x, all_y)
        follow, lead = (torch.compile(graph, fullgraph=True, dynamic=False) for graph in graphs)

        def run() -> Tensor:
            leaf = self.particles.detach().requires_grad_()
            z = leaf.expand(self.num_tasks, -1, -1).contiguous()
            for _ in range(self.follow):
                z = follow(z, x, y)
            with torch.no_grad():
                leader = z.detach()
                for _ in range(self.lead):
                    leader = lead(leader, all_x, all_y)
            return torch.autograd.grad((z - leader).square().sum((1, 2)).mean(), leaf)[0]

        return run

    def _step(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        scores = vmap(grad(self._log_joint), (0, None, None))(z, x, y)
        squared = (z[:, None] - z[None]).square().sum(-1)
        rows, columns = torch.triu_indices(len(z), len(z), 1, device=z.device)
        h = (squared[rows, columns].median() / torch.log(torch.tensor(len(z) + 1.0))).detach()
        kernel = torch.exp(-squared / h)
        repulsion = 2 / h * (kernel.sum(1, keepdim=True) * z - kernel @ z)
        return z + self.step_size * (kernel @ scores + repulsion) / len(z)

    def _log_joint(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        values = {"gamma": z[0].exp(), "lam": z[1].exp(), "weights": z[2:]}
        trace = pyro.poutine.trace(pyro.poutine.condition(self.model, data=values)).get_trace(x=x, y=y)
        return trace.log_prob_sum() + z[0] + z[1]
