"""MAML as higher, TorchOpt and torch.func write it, and Pyro's own SVGD and NUTS, one task at a time."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import higher
import pyro
import torch
import torchopt
from pyro.infer import MCMC, NUTS, SVGD, RBFSteinKernel
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

__all__ = ["higher_maml", "pyro_nuts", "pyro_svgd", "torch_func_maml", "torchopt_maml"]

Task = tuple[Tensor, Tensor, Tensor, Tensor]


def make_network(sizes: Sequence[int], weights: Tensor) -> nn.Module:
    """A perceptron with these weights, (D,)."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    nn.utils.vector_to_parameters(weights.clone(), network.parameters())
    return network


def _flatten(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _error(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(network(x[:, None])[:, 0], y)


def _tasks(data: Sequence[Tensor]) -> list[Task]:
    return list(zip(*data, strict=True))


def higher_maml(
    sizes: Sequence[int], num_steps: int, step_size: float, weights: Tensor, *data: Tensor
) -> Callable[[], Tensor]:
    """Its README's loop: `innerloop_ctx` a task, `backward` through it; arguments as in `peers_jax.maml`."""
    network = make_network(sizes, weights)
    optimizer = torch.optim.SGD(network.parameters(), lr=step_size)

    def run() -> Tensor:
        network.zero_grad()
        for x, y, query_x, query_y in _tasks(data):
            with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(num_steps):
                    inner.step(_error(fast, x, y))
                (_error(fast, query_x, query_y) / len(data[0])).backward()
        return _flatten([p.grad for p in network.parameters() if p.grad is not None])

    return run


def torchopt_maml(
    sizes: Sequence[int], num_steps: int, step_size: float, weights: Tensor, *data: Tensor
) -> Callable[[], Tensor]:
    """Its few-shot example's loop: `MetaSGD`, state taken out before a task and put back after it."""
    network = make_network(sizes, weights)
    inner = torchopt.MetaSGD(network, lr=step_size)
    leaves = tuple(network.parameters())

    def run() -> Tensor:
        losses = []
        before = torchopt.extract_state_dict(network, by="reference"), torchopt.extract_state_dict(inner)
        for x, y, query_x, query_y in _tasks(data):
            for _ in range(num_steps):
                inner.step(_error(network, x, y))
            losses.append(_error(network, query_x, query_y))
            torchopt.recover_state_dict(network, before[0])
            torchopt.recover_state_dict(inner, before[1])
        return _flatten(torch.autograd.grad(torch.stack(losses).mean(), leaves))

    return run


def torch_func_maml(
    sizes: Sequence[int], num_steps: int, step_size: float, weights: Tensor, *data: Tensor
) -> Callable[[], Tensor]:
    """`functional_call`, `grad` and `vmap` over tasks."""
    network = make_network(sizes, weights)
    params = {name: value.detach() for name, value in network.named_parameters()}

    def error(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return _error(lambda x: functional_call(network, params, (x,)), x, y)

    def query_loss(params: dict[str, Tensor], x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        for _ in range(num_steps):
            gradient = grad(error)(params, x, y)
            params = {name: value - step_size * gradient[name] for name, value in params.items()}
        return error(params, query_x, query_y)

    mean = grad(lambda params: vmap(query_loss, (None, 0, 0, 0, 0))(params, *data).mean())
    return lambda: _flatten(list(mean(params).values()))


def pyro_svgd(
    model: Callable[..., Any], tasks: Sequence[dict[str, Tensor]], num_particles: int, num_steps: int
) -> list[dict[str, Tensor]]:
    """Particles of each task in turn, by Pyro's SVGD with the optimiser and kernel of its documentation."""
    found = []
    for task in tasks:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svgd = SVGD(
            model, RBFSteinKernel(), PyroOptim(torch.optim.Adam, {"lr": 0.1}), num_particles, max_plate_nesting=1
        )
        for _ in range(num_steps):
            svgd.step(**task)
        found.append({name: value.detach() for name, value in svgd.get_named_particles().items()})
    return found


def pyro_nuts(
    model: Callable[..., Any], tasks: Sequence[dict[str, Tensor]], num_warmup: int, num_draws: int
) -> list[dict[str, Tensor]]:
    """Pyro's NUTS of each task in turn, recorded by its own `jit_compile`, its faster way."""
    draws = []
    for task in tasks:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
        chain = MCMC(kernel, num_samples=num_draws, warmup_steps=num_warmup, disable_progbar=True)
        chain.run(**task)
        draws.append(chain.get_samples())
    return draws
