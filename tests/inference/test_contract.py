"""The contract of `bmaml_ppl.types.Inference`, for every algorithm of the registry."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map

from bmaml_ppl.inference import ALGORITHMS
from bmaml_ppl.types import Inference, LogDensity

F64 = torch.float64
DIM = 3
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
PRECISION = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 4.0]], dtype=F64)

PRECONDITIONERS = ("none", "adaptive", "curvature")
LEARNED = ("none", "scalar", "parameter")

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "map_estimate": [
        {"num_particles": m, "preconditioner": p, "learn_step_size": s}
        for m in (1, 4)
        for p in PRECONDITIONERS
        for s in LEARNED
    ],
    "mean_field": [
        {"num_particles": m, "preconditioner": p, "learn_step_size": s, "init": i}
        for m, p, s, i in (
            (1, "none", "parameter", "free"),
            (3, "natural", "none", "free"),
            (4, "adaptive", "scalar", "prior"),
            (7, "curvature", "none", "free"),
        )
    ]
    + [{"noise": "fresh"}],
    "hmc": [
        {"num_chains": m, "num_warmup": 2, "num_draws": 3, "num_leapfrog": 2, "mass_matrix": k}
        for m, k in ((1, "dense"), (3, "diagonal"), (2, "identity"))
    ],
    "platipus": [
        {"num_particles": 3, "preconditioner": p, "learn_step_size": s} for p in PRECONDITIONERS for s in LEARNED
    ],
    # A plain log density shows no observations: what needs them has tests of its own.
    "laplace": [{"preconditioner": p} for p in PRECONDITIONERS]
    + [{"num_particles": 4, "curvature": c, "gradient": "unrolled"} for c in ("exact", "diagonal")]
    + [{"gradient": "unrolled", "learn_step_size": "parameter", "preconditioner": "curvature"}],
    "smc": [{"num_particles": m, "num_moves": n, "ess_threshold": e} for m, n, e in ((7, 1, 0.5), (8, 3, 0.9))],
    "svgd": [{"num_particles": 5, "preconditioner": p, "learn_step_size": s} for p in PRECONDITIONERS for s in LEARNED],
}
"""What the contract is tested on besides an algorithm's defaults."""

DIFFERENTIABLE: dict[str, list[dict[str, Any]]] = {
    "laplace": [{"num_particles": 2, "gradient": "unrolled"}],
    "map_estimate": [{"num_particles": 2}],
    "mean_field": [{"num_particles": 6}, {"num_particles": 2, "noise": "fresh", "init": "free"}],
    "platipus": [{"num_particles": 2}],
    # A number as bandwidth: no gradient passes through a rule, so that finite differences would not agree.
    "svgd": [
        {"num_particles": 4, "bandwidth": 0.8, "structure": s, "kernel": k}
        for s, k in (("joint", "rbf"), ("site", "imq"), ("coordinate", "rbf"))
    ]
    + [{"num_particles": 6, "bandwidth": 0.8}],
}


def _instances() -> Iterator[Any]:
    for name, factory in ALGORITHMS.items():
        for settings in [{}, *SETTINGS.get(name, [])]:
            label = ",".join(str(v) for v in settings.values()) or "defaults"
            yield pytest.param(factory(**settings), id=f"{name}-{label}")


def _prior(inference: Inference, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    particles = torch.randn(inference.num_particles, DIM, dtype=F64, generator=generator)
    learned = {k: v.to(F64) if v.is_floating_point() else v for k, v in inference.parameters(DIM).items()}
    return {**learned, "particles": particles}


def _gaussian(z: Tensor) -> Tensor:
    return -0.5 * (z - MEAN) @ PRECISION @ (z - MEAN)


def _banana(z: Tensor) -> Tensor:
    """Neither Gaussian nor concave everywhere."""
    return -0.5 * (z[0] - 1) ** 2 - (z[1] - 0.3 * z[0] ** 2) ** 2 - 0.5 * z[2] ** 2 - torch.logaddexp(z[2], -z[2])


def _run(inference: Inference, prior: dict[str, Tensor], log_density: LogDensity, steps: int) -> Any:
    state, visits = inference.init(prior), []
    for _ in range(steps):
        state = inference.update(state, log_density)
        visits.append(None if inference.visit is None else inference.visit(state))
    if inference.collect is not None:
        state = inference.collect(state, tree_map(lambda *kept: torch.stack(kept), *visits[-inference.num_draws :]))
    return state if inference.measure is None else inference.measure(state, log_density)


def _seeded(call: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return call()


def _assert_same(left: Any, right: Any) -> None:
    (first, shape), (second, other) = tree_flatten(left), tree_flatten(right)
    assert shape == other
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inference", list(_instances()))
def test_shapes_and_dtypes(inference: Inference) -> None:
    prior = _prior(inference)
    state = _seeded(lambda: _run(inference, prior, _banana, 2))
    assert state.particles.shape == (inference.num_particles, DIM)
    assert state.particles.dtype == F64
    assert torch.isfinite(state.particles).all()
    for num in (1, inference.num_particles, 2 * inference.num_particles + 1):
        drawn = inference.sample(state, num, torch.Generator().manual_seed(0))
        assert drawn.shape == (num, DIM)
        assert drawn.dtype == F64
    assert all(v.is_floating_point() for v in inference.parameters(DIM).values())


@pytest.mark.parametrize("inference", list(_instances()))
def test_functions_are_pure(inference: Inference) -> None:
    prior = _prior(inference)
    kept = {name: value.clone() for name, value in prior.items()}
    state = inference.init(prior)
    before = tree_map(torch.clone, state)
    first, second = (_seeded(lambda: inference.update(state, _banana)) for _ in range(2))
    _assert_same(first, second)
    _assert_same(state, before)
    _assert_same(prior, kept)
    draws = [inference.sample(first, 7, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("inference", list(_instances()))
def test_batches_of_tasks_are_vmapped(inference: Inference) -> None:
    prior = _prior(inference)
    tasks = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.0]], dtype=F64)

    def adapt(task: Tensor) -> Any:
        return _run(inference, prior, lambda z: _banana(z - task), 3)

    together = _seeded(lambda: vmap(adapt, randomness="same")(tasks))
    assert together.particles.shape == (2, inference.num_particles, DIM)
    for i, task in enumerate(tasks):
        alone = _seeded(partial(vmap(adapt, randomness="same"), task[None]))
        torch.testing.assert_close(together.particles[i], alone.particles[0])
    drawn = _seeded(lambda: vmap(lambda s: inference.sample(s, 4, None), randomness="same")(together))
    assert drawn.shape == (2, 4, DIM)


@pytest.mark.parametrize("inference", list(_instances()))
def test_config_rebuilds_the_same_algorithm(inference: Inference) -> None:
    text = json.dumps(inference.config, allow_nan=False)
    again = ALGORITHMS[inference.name](**json.loads(text))
    assert again.config == inference.config
    assert (again.num_particles, again.num_steps, again.start) == (
        inference.num_particles,
        inference.num_steps,
        inference.start,
    )
    prior = _prior(inference)
    _assert_same(*(_seeded(partial(_run, i, prior, _banana, 2)) for i in (inference, again)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_names_are_keys_of_the_registry(name: str) -> None:
    inference = ALGORITHMS[name]()
    assert inference.name == name
    assert inference.num_particles >= 1
    assert inference.num_steps >= 0


def _differentiable() -> Iterator[Any]:
    for name, variants in DIFFERENTIABLE.items():
        for settings in variants:
            for preconditioner in PRECONDITIONERS:
                label = ",".join(str(v) for v in settings.values())
                yield pytest.param(
                    name, {**settings, "preconditioner": preconditioner}, id=f"{name}-{label}-{preconditioner}"
                )


@pytest.mark.parametrize(("name", "settings"), list(_differentiable()))
def test_gradient_to_the_prior_is_finite_differences(name: str, settings: dict[str, Any]) -> None:
    inference = ALGORITHMS[name](**settings, step_size=0.2, learn_step_size="parameter")
    prior = {key: value.requires_grad_() for key, value in _prior(inference).items()}

    def end(particles: Tensor, step_size: Tensor) -> Tensor:
        start = {**prior, "particles": particles, "step_size": step_size}
        return _seeded(lambda: _run(inference, start, _banana, 3)).particles

    assert torch.autograd.gradcheck(end, (prior["particles"], prior["step_size"]))


@pytest.mark.parametrize(("name", "settings"), list(_differentiable()))
def test_gradient_to_the_density_is_finite_differences(name: str, settings: dict[str, Any]) -> None:
    # The outer loop also learns the model's own parameters, which reach the end through the density.
    inference = ALGORITHMS[name](**settings, step_size=0.2)
    prior = _prior(inference)

    def end(location: Tensor) -> Tensor:
        return _seeded(lambda: _run(inference, prior, lambda z: _banana(z - location), 2)).particles

    assert torch.autograd.gradcheck(end, (0.1 * torch.randn(DIM, dtype=F64)).requires_grad_())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_gaussians_mean_is_recovered(name: str) -> None:
    # At least 200 updates. Fixed seed; 4,000 draws have a standard error of .016 sd each, a tolerance of .15
    # leaves room for particles' own bias.
    inference = ALGORITHMS[name]()
    state = _seeded(lambda: _run(inference, _prior(inference), _gaussian, max(200, inference.num_steps)))
    drawn = inference.sample(state, 4000, torch.Generator().manual_seed(0))
    sd = torch.linalg.inv(PRECISION).diagonal().sqrt()
    torch.testing.assert_close((drawn.mean(0) - MEAN) / sd, torch.zeros(DIM, dtype=F64), atol=0.15, rtol=0)
