"""The same computations in JAX: NumPyro's model of Bayesian MAML, MAML by hand, and blackjax's NUTS."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.util import log_density
from torch import Tensor

__all__ = ["blackjax_nuts", "bmaml", "maml", "to_jax"]


def to_jax(value: Tensor) -> Any:
    return jnp.asarray(value.detach().cpu().numpy())


def _network(weights: Any, x: Any, sizes: Sequence[int]) -> Any:
    """A perceptron whose weights lie in one vector, layer by layer, (d_out, d_in) and bias."""
    hidden, offset, pairs = x[:, None], 0, list(pairwise(sizes))
    for layer, (d_in, d_out) in enumerate(pairs):
        matrix = weights[offset : offset + d_in * d_out].reshape(d_out, d_in)
        bias = weights[offset + d_in * d_out : offset + (d_in + 1) * d_out]
        offset += (d_in + 1) * d_out
        hidden = hidden @ matrix.T + bias
        hidden = jax.nn.relu(hidden) if layer + 1 < len(pairs) else hidden
    return hidden[:, 0]


def bmaml(
    sizes: Sequence[int], follow: int, lead: int, step_size: float, particles: Tensor, *data: Tensor
) -> Callable[[], Any]:
    """Gradient of the mean chaser loss, (M, D): a NumPyro model's log density, vmapped, differentiated and jitted.

    Args:
        sizes: Of the network.
        follow: Follower steps.
        lead: Leader steps.
        step_size: Of SVGD.
        particles: Where all tasks start, (M, D).
        *data: Support x and y, then all x and y, (T, N) each.
    """
    num, dim = particles.shape
    upper = jnp.triu_indices(num, 1)

    def model(x: Any, y: Any) -> None:
        gamma = numpyro.sample("gamma", dist.Gamma(2.0, 0.2))
        lam = numpyro.sample("lam", dist.Gamma(2.0, 2.0))
        weights = numpyro.sample("weights", dist.Normal(jnp.zeros(dim - 2), lam**-0.5).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("obs", dist.Normal(_network(weights, x, sizes), gamma**-0.5), obs=y)

    def log_joint(z: Any, x: Any, y: Any) -> Any:
        values = {"gamma": jnp.exp(z[0]), "lam": jnp.exp(z[1]), "weights": z[2:]}
        return log_density(model, (x, y), {}, values)[0] + z[0] + z[1]

    def step(z: Any, x: Any, y: Any) -> Any:
        scores = jax.vmap(jax.grad(log_joint), (0, None, None))(z, x, y)
        squared = ((z[:, None] - z[None]) ** 2).sum(-1)
        h = jax.lax.stop_gradient(jnp.median(squared[upper]) / jnp.log(num + 1.0))
        kernel = jnp.exp(-squared / h)
        return z + step_size * (kernel @ scores + 2 / h * (kernel.sum(1, keepdims=True) * z - kernel @ z)) / num

    def loss(z: Any, x: Any, y: Any, all_x: Any, all_y: Any) -> Any:
        for _ in range(follow):
            z = step(z, x, y)
        leader = jax.lax.stop_gradient(z)
        for _ in range(lead):
            leader = step(leader, all_x, all_y)
        return ((z - jax.lax.stop_gradient(leader)) ** 2).sum()

    gradient = jax.jit(jax.grad(lambda z, *task: jax.vmap(loss, (None, 0, 0, 0, 0))(z, *task).mean()))
    start, batch = to_jax(particles), [to_jax(value) for value in data]
    return lambda: gradient(start, *batch).block_until_ready()


def maml(sizes: Sequence[int], num_steps: int, step_size: float, weights: Tensor, *data: Tensor) -> Callable[[], Any]:
    """Gradient of the mean query loss of MAML, (D,), by hand.

    Args:
        sizes: Of the network.
        num_steps: Inner steps.
        step_size: Of the inner steps on the mean squared error.
        weights: The shared start, (D,).
        *data: Support x and y, query x and y, (T, N) each.
    """

    def error(w: Any, x: Any, y: Any) -> Any:
        return ((_network(w, x, sizes) - y) ** 2).mean()

    def query_loss(w: Any, x: Any, y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(num_steps):
            w = w - step_size * jax.grad(error)(w, x, y)
        return error(w, query_x, query_y)

    gradient = jax.jit(jax.grad(lambda w, *task: jax.vmap(query_loss, (None, 0, 0, 0, 0))(w, *task).mean()))
    start, batch = to_jax(weights), [to_jax(value) for value in data]
    return lambda: gradient(start, *batch).block_until_ready()


def blackjax_nuts(
    mean: Tensor, scale: Tensor, time: Tensor, weight: Tensor, num_warmup: int, num_draws: int
) -> Callable[[], Any]:
    """Draws of (coefficients, log noise) of growth curves, (T, S, 4): window adaptation and NUTS, vmapped over tasks.

    Args:
        mean: Of the coefficients' prior, (3,).
        scale: Their standard deviations, (3,).
        time: (T, N).
        weight: (T, N).
        num_warmup: Steps of adaptation.
        num_draws: S.
    """
    loc, spread = to_jax(mean), to_jax(scale)

    def model(time: Any, weight: Any) -> None:
        coef = numpyro.sample("coef", dist.Normal(loc, spread).to_event(1))
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        curve = jnp.stack([time**0, time, time**2], -1) @ coef
        with numpyro.plate("data", time.shape[0]):
            numpyro.sample("obs", dist.Normal(curve, noise), obs=weight)

    def sample(key: Any, time: Any, weight: Any) -> Any:
        def log_joint(z: Any) -> Any:
            return log_density(model, (time, weight), {}, {"coef": z[:3], "noise": jnp.exp(z[3])})[0] + z[3]

        warm_key, *keys = jax.random.split(key, num_draws + 1)
        warmup = blackjax.window_adaptation(blackjax.nuts, log_joint)
        start = jnp.concatenate([loc, jnp.zeros(1)])
        (state, tuned), _ = warmup.run(warm_key, start, num_steps=num_warmup)
        kernel = blackjax.nuts(log_joint, **tuned)

        def one_step(state: Any, key: Any) -> Any:
            state, _ = kernel.step(key, state)
            return state, state.position

        return jax.lax.scan(one_step, state, jnp.stack(keys))[1]

    keys = jax.random.split(jax.random.PRNGKey(0), len(time))
    run = jax.jit(jax.vmap(sample))
    batch = to_jax(time), to_jax(weight)
    return lambda: np.asarray(run(keys, *batch))
