"""Meta-gradients against finite differences in float64, for every way to adapt and every start."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import map_estimate, svgd
from bmaml_ppl.objectives import Objective, chaser, query_nll
from bmaml_ppl.outer import MetaGradient, clip, constrain, meta_gradient, parameter_groups, unconstrain
from bmaml_ppl.types import Inference, Start, Tensors
from tests.toys import bind, finite_differences, level, level_tasks, line, line_tasks, views_of

KNOWN = {"sd": constraints.positive, "noise": constraints.positive, "step_size": constraints.positive}
# A bandwidth rule passes no gradient by definition, so that only a fixed bandwidth has finite differences.
INFERENCES: dict[str, Callable[..., Inference]] = {
    "map plain": lambda **kw: map_estimate(num_particles=2, num_steps=2, step_size=0.05, preconditioner="none", **kw),
    "map newton": lambda **kw: map_estimate(
        num_particles=2, num_steps=2, step_size=0.5, preconditioner="curvature", **kw
    ),
    "map adaptive": lambda **kw: map_estimate(num_particles=2, num_steps=2, preconditioner="adaptive", **kw),
    "svgd plain": lambda **kw: svgd(
        num_particles=4, num_steps=2, step_size=0.05, preconditioner="none", bandwidth=2.0, **kw
    ),
    "svgd imq": lambda **kw: svgd(
        num_particles=4, num_steps=2, preconditioner="adaptive", kernel="imq", bandwidth=2.0, **kw
    ),
    "svgd newton": lambda **kw: svgd(num_particles=5, num_steps=2, preconditioner="curvature", **kw),
}


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


def check(objective: Objective, inference: Inference, start: Start, params: dict[str, Tensor]) -> None:
    model, tasks = (level, level_tasks(2, 5)) if start == "prior" else (line, line_tasks(2, 5))
    adapter = bind(model, tasks, inference, start)
    views = views_of(tasks, 3)

    def gradient(params: Tensors) -> MetaGradient:
        with seeded(3, torch.device("cpu")):
            return meta_gradient(adapter, objective, KNOWN, params, views)

    got = gradient(params).gradients
    for name, value in params.items():

        def loss(moved: Tensor, name: str = name) -> Tensor:
            return gradient({**params, name: moved}).loss

        torch.testing.assert_close(got[name], finite_differences(loss, value), rtol=2e-5, atol=2e-6)
        assert got[name].abs().max() > 1e-4


@pytest.mark.parametrize("name", INFERENCES)
@pytest.mark.parametrize("kind", ["mixture", "mean"])
def test_meta_gradient_of_a_free_start(name: str, kind: str) -> None:
    inference = INFERENCES[name](init="free")
    particles = torch.randn(inference.num_particles, 2, generator=torch.Generator().manual_seed(0))
    check(query_nll(kind), inference, "free", {"particles": particles})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", INFERENCES)
def test_meta_gradient_through_the_start_at_the_prior(name: str) -> None:
    params = {"mean": torch.tensor(0.2), "sd": torch.tensor(-0.3), "noise": torch.tensor(-0.5)}
    check(query_nll(), INFERENCES[name](init="prior"), "prior", params)


@pytest.mark.parametrize(("learned", "shape"), [("scalar", ()), ("site", (1,)), ("parameter", (2,))])
def test_meta_gradient_of_a_learned_step_size(learned: str, shape: tuple[int, ...]) -> None:
    inference = svgd(
        num_particles=3,
        num_steps=2,
        preconditioner="none",
        bandwidth=2.0,
        learn_step_size=learned,  # type: ignore[arg-type]
        init="free",
    )
    particles = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    check(query_nll(), inference, "free", {"particles": particles, "step_size": torch.full(shape, -3.0)})


def test_constrain_inverts_unconstrain() -> None:
    params = {"sd": torch.tensor(0.3), "mean": torch.tensor(-2.0)}
    torch.testing.assert_close(constrain(unconstrain(params, KNOWN), KNOWN), params)
    assert unconstrain(params, KNOWN)["mean"] is params["mean"]


def test_clip_shortens_only_long_gradients() -> None:
    gradients = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    clipped, norm = clip(gradients, 1.0)
    assert norm == 5.0
    torch.testing.assert_close(clipped, {"a": torch.tensor([0.6]), "b": torch.tensor([0.8])})
    torch.testing.assert_close(clip(gradients, 10.0)[0], gradients)


def test_networks_and_particles_move_slowly() -> None:
    params = {"mean": torch.zeros(1), "net$$$weight": torch.zeros(1), "particles": torch.zeros(1)}
    fast, slow = parameter_groups(params, {"net$$$weight", "particles"})
    assert fast["params"] == [params["mean"]]
    assert slow["lr"] < fast["lr"]
    assert len(parameter_groups({"mean": params["mean"]}, {"particles"})) == 1


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["map newton", "svgd newton", "svgd adaptive median"])
@pytest.mark.parametrize("objective", [query_nll(), chaser(2)], ids=str)
def test_recorded_steps_have_the_same_meta_gradient(first_order: bool, name: str, objective: Objective) -> None:
    """Stop-gradients included: at the bandwidth, at the leader, and at first-order scores."""
    median = svgd(num_particles=4, num_steps=2, preconditioner="adaptive", init="free")
    inference = median if name == "svgd adaptive median" else INFERENCES[name](init="free")
    particles = torch.randn(inference.num_particles, 2, generator=torch.Generator().manual_seed(0))
    tasks = line_tasks(2, 5)
    eager, recorded = (
        meta_gradient(
            bind(line, tasks, inference, "free", first_order, recorded),
            objective,
            {},
            {"particles": particles},
            views_of(tasks, 3),
        )
        for recorded in (False, True)
    )
    torch.testing.assert_close(recorded, eager, rtol=1e-10, atol=1e-10)
