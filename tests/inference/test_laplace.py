"""Laplace's method: exact where the posterior is Gaussian, and differentiable where it is not."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from bmaml_ppl import adaptation
from bmaml_ppl.adaptation import Adapter, as_task_data
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import laplace, map_estimate
from bmaml_ppl.inference.curvature import Arrow, dual
from bmaml_ppl.inference.laplace import LaplaceState, log_mass
from bmaml_ppl.meta import meta_learn
from bmaml_ppl.models import hierarchical_regression
from bmaml_ppl.task_density import TaskDensity
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, LogDensity, Model
from tests.toys import bind, line_tasks, straight

F64 = torch.float64
CPU = torch.device("cpu")


def _double(tasks: Tasks) -> Tasks:
    return Tasks({name: value.double() for name, value in tasks.data.items()}, outputs=tasks.outputs)


def _first(state: Any) -> Any:
    return tree_map(lambda value: value[0], state)


def _adapt(adapter: Adapter, prior: dict[str, Tensor], tasks: Tasks) -> Any:
    with seeded(0, CPU):
        return adapter.adapt(prior, as_task_data(tasks))


STRAIGHT = {
    "mean": torch.tensor([0.3, -0.7], dtype=F64),
    "scale_tril": torch.tensor([[0.8, 0.0], [-0.4, 1.1]], dtype=F64),
    "noise": torch.tensor(0.6, dtype=F64),
}

GAUSSIAN: list[dict[str, Any]] = [
    {},
    {"curvature": "ggn"},
    {"curvature": "fisher"},
    {"curvature": "fisher", "form": "dual"},
    {"curvature": "exact", "gradient": "unrolled"},
    {"num_particles": 3},
    {"num_steps": 1},
    {"num_steps": 3, "preconditioner": "gauss_newton"},
]


def _design(tasks: Tasks, i: int) -> Tensor:
    x = tasks.data["x"][i]
    return torch.stack([torch.ones_like(x), x], -1)


@pytest.mark.parametrize("settings", GAUSSIAN, ids=lambda s: ",".join(map(str, s.values())) or "defaults")
def test_a_linear_gaussian_model_has_its_closed_form(settings: dict[str, Any]) -> None:
    tasks = _double(line_tasks(3, 6))
    recorded = settings.get("form") == "dual"  # recording takes seconds
    state = _adapt(bind(straight, tasks, laplace(**settings), "prior", recorded=recorded), STRAIGHT, tasks)
    covariance = STRAIGHT["scale_tril"] @ STRAIGHT["scale_tril"].mT
    for i in range(3):
        x, y = _design(tasks, i), tasks.data["y"][i]
        precision = torch.linalg.inv(covariance) + x.mT @ x / STRAIGHT["noise"] ** 2
        mean = torch.linalg.solve(
            precision, torch.linalg.solve(covariance, STRAIGHT["mean"]) + x.mT @ y / STRAIGHT["noise"] ** 2
        )
        marginal = x @ covariance @ x.mT + STRAIGHT["noise"] ** 2 * torch.eye(6, dtype=F64)
        evidence = dist.MultivariateNormal(x @ STRAIGHT["mean"], marginal).log_prob(y)
        found = tree_map(lambda value: value[i], state)  # noqa: B023
        close = torch.testing.assert_close
        close(found.particles, mean.expand_as(found.particles), rtol=1e-10, atol=1e-10)
        close(found.log_evidence, evidence.expand_as(found.log_evidence), rtol=1e-10, atol=1e-10)
        one = tree_map(lambda value: value[0], found.precision)
        colour = torch.func.jacrev(one.colour)(torch.zeros(one.noise_dim, dtype=F64))
        close(colour @ colour.mT, torch.linalg.inv(precision), rtol=1e-10, atol=1e-10)
        at = torch.tensor([0.1, 0.4], dtype=F64)
        log_prob = laplace().log_prob
        assert log_prob is not None
        posterior = dist.MultivariateNormal(mean, precision_matrix=precision)
        close(log_prob(found, at), posterior.log_prob(at), rtol=1e-9, atol=1e-9)
        assert not found.repair.any()
        assert (found.flat == -1).all()
        assert found.decrement.abs().max() < 1e-18


def test_draws_are_the_mode_plus_coloured_noise() -> None:
    tasks = _double(line_tasks(1, 6))
    inference = laplace()
    found = _first(_adapt(bind(straight, tasks, inference, "prior"), STRAIGHT, tasks))
    one = tree_map(lambda value: value[0], found.precision)
    drawn = inference.sample(found, 5, torch.Generator().manual_seed(3))
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    torch.testing.assert_close(drawn, found.particles + vmap(one.colour)(noise))


WEIGHTS = torch.tensor([0.3, 0.7], dtype=F64)
MODES = torch.tensor([-4.0, 3.0], dtype=F64)
WIDTHS = torch.tensor([0.5, 1.0], dtype=F64)


def _two_modes(z: Tensor) -> Tensor:
    return torch.logsumexp(WEIGHTS.log() + dist.Normal(MODES, WIDTHS).log_prob(z), 0)


def _run(inference: Inference, start: list[float], log_density: LogDensity) -> Any:
    state = inference.init({"particles": torch.tensor(start, dtype=F64).unsqueeze(-1)})
    for _ in range(inference.num_steps):
        state = inference.update(state, log_density)
    state = state if inference.settle is None else inference.settle(state, log_density)
    assert inference.measure is not None
    return inference.measure(state, log_density)


STARTS = ([-4.5, 2.5], [-4.5, 3.5, -3.8, 2.5, 2.8])


@pytest.mark.parametrize("start", STARTS, ids=["once", "several times"])
def test_modes_count_once_and_by_their_evidence(start: list[float]) -> None:
    # Of the other mode, 1e-5 of the density is left at each: the mixture's weights are the evidence to 1e-4.
    inference = laplace(num_particles=len(start))
    state = _run(inference, start, _two_modes)
    low = state.particles[:, 0] < 0
    assert low.tolist() == [value < 0 for value in start]
    torch.testing.assert_close(state.log_evidence, torch.where(low, *WEIGHTS.log()), rtol=0, atol=1e-4)
    drawn = inference.sample(state, 1000, torch.Generator().manual_seed(0))[:, 0]
    # Stratified choice: exact up to two draws; a draw from one mode lands beyond -1 once in 10^8 (low) or 3 10^4.
    assert abs(int((drawn < -1).sum()) - 300) <= 2
    mixture = torch.tensor([-4.6, -1.0, 0.0, 2.0, 5.0], dtype=F64)
    assert inference.log_prob is not None
    found = torch.stack([inference.log_prob(state, z) for z in mixture.unsqueeze(-1)])
    wanted = torch.stack([_two_modes(z) for z in mixture])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("far", [1e3, 1e6], ids=["negligible", "no number"])
def test_a_start_that_ends_nowhere_changes_nothing(far: float) -> None:
    def density(z: Tensor) -> Tensor:
        return torch.where(z.abs() > 1e5, torch.nan, _two_modes(z.clamp(-20, 20)) - z.abs().clamp_min(20)).squeeze()

    inference = laplace(num_particles=3)
    with_it = _run(inference, [-4.5, 2.5, far], density)
    torch.testing.assert_close(with_it.particles[2], with_it.particles[1])
    without = _run(laplace(num_particles=2), [-4.5, 2.5], density)
    torch.testing.assert_close(log_mass(with_it).logsumexp(0), log_mass(without).logsumexp(0))
    drawn = inference.sample(with_it, 1000, torch.Generator().manual_seed(0))[:, 0]
    assert abs(int((drawn < -1).sum()) - 300) <= 2


def test_a_mode_whose_curvature_is_no_number_has_no_mass() -> None:
    inference = laplace(num_particles=2)
    state = _run(inference, [-4.5, 2.5], _two_modes)
    state = state._replace(log_evidence=torch.tensor([torch.nan, 0.0], dtype=F64))
    assert bool((inference.sample(state, 100, torch.Generator().manual_seed(0)) > -1).all())


@pytest.mark.parametrize("start", STARTS, ids=["once", "several times"])
def test_the_log_density_integrates_to_one(start: list[float]) -> None:
    inference = laplace(num_particles=len(start))
    state = _run(inference, start, _two_modes)
    grid = torch.linspace(-15, 15, 3001, dtype=F64)
    log_prob = inference.log_prob
    assert log_prob is not None
    values = vmap(lambda z: log_prob(state, z))(grid.unsqueeze(-1))
    torch.testing.assert_close(torch.trapezoid(values.exp(), grid), torch.ones((), dtype=F64), rtol=0, atol=1e-10)


def test_an_ascent_that_did_not_end_shows_its_decrement() -> None:
    matrix = torch.diag(torch.tensor([1.0, 4.0], dtype=F64))
    inference = laplace(num_steps=0)
    state = inference.init({"particles": torch.tensor([[3.0, 1.0]], dtype=F64)})
    assert inference.measure is not None
    measured = inference.measure(state, lambda z: -0.5 * z @ matrix @ z)
    torch.testing.assert_close(measured.decrement, torch.tensor([0.5 * 9 + 0.5 * 4], dtype=F64))
    assert measured.steepest == 0


def test_a_saddle_is_repaired_and_reported() -> None:
    inference = laplace(num_steps=0)
    state = inference.init({"particles": torch.zeros(1, 2, dtype=F64)})
    assert inference.measure is not None
    measured = inference.measure(state, lambda z: z[0] ** 2 - 2 * z[1] ** 2)
    assert measured.repair > 0
    drawn = inference.sample(measured, 4, torch.Generator().manual_seed(0))
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(drawn, noise / torch.tensor([2.0, 4.0], dtype=F64).sqrt())


def test_steps_go_on_from_a_measured_state() -> None:
    inference = laplace(num_steps=2)
    state = _run(inference, [-2.9], _two_modes)
    again = inference.update(state, _two_modes)
    assert not isinstance(again, LaplaceState)
    torch.testing.assert_close(again.particles, inference.update(state.point, _two_modes).particles)


def counts(x: Tensor, y: Tensor | None = None) -> None:
    """Counts whose log rate is a line, with a meta-learned prior."""
    mean = pyro.param("mean", torch.zeros(2))
    sd = pyro.param("sd", torch.ones(2), constraint=dist.constraints.positive)
    coef = pyro.sample("coef", dist.Normal(mean, sd).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Poisson((coef[0] + coef[1] * x).exp()), obs=y)


def robust(x: Tensor, y: Tensor | None = None) -> None:
    """A line with heavy-tailed noise, whose Fisher information is not its Hessian, and a latent scale."""
    mean = pyro.param("mean", torch.zeros(2))
    sd = pyro.param("sd", torch.ones(2), constraint=dist.constraints.positive)
    noise = pyro.sample("noise", dist.LogNormal(mean[0], sd[1]))
    coef = pyro.sample("coef", dist.Normal(mean, sd).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.StudentT(4.0, coef[0] + coef[1] * x, noise), obs=y)


X = torch.tensor([[-1.0, 0.0, 0.5, 1.0], [-0.5, 0.3, 0.8, 1.5]], dtype=F64)
COUNTS = Tasks({"x": X, "y": torch.tensor([[0.0, 1, 1, 3], [2.0, 1, 1, 0]], dtype=F64)}, outputs=("y",))
NUMBERS = Tasks({"x": X, "y": torch.tensor([[-0.7, 0.1, 0.9, 1.2], [2.0, 1, 0.8, 3.0]], dtype=F64)}, outputs=("y",))
LEARNED = torch.tensor([0.2, -0.3], dtype=F64), torch.tensor([0.9, 0.6], dtype=F64)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"gradient": "unrolled", "num_steps": 12},
    {"curvature": "fisher"},
    {"curvature": "fisher", "form": "dual"},
    {"curvature": "empirical_fisher"},
    {"curvature": "diagonal"},
    {"curvature": "kronecker"},
    {"num_particles": 2},
]


def _values(model: Model, tasks: Tasks, inference: Inference, recorded: bool = False) -> Any:
    """Particles, log evidence, draws and log densities of all tasks as functions of the learned prior."""
    adapter = bind(model, tasks, inference, "prior", recorded=recorded)
    points: list[Tensor] = []

    def draw(one: Any) -> Tensor:
        return adapter.inference.sample(one, 3, torch.Generator().manual_seed(1))

    def value(mean: Tensor, sd: Tensor) -> tuple[Tensor, ...]:
        state = _adapt(adapter, {"mean": mean, "sd": sd}, tasks)
        if adapter.inference.log_prob is None:
            return (state.particles,)
        if not points:  # which do not move with the prior
            points.append(state.particles[:, 0].detach() + 0.3)
        drawn = vmap(draw, randomness="same")(state)
        return state.particles, state.log_evidence, drawn, vmap(adapter.inference.log_prob)(state, points[0])

    return value


def _learned() -> tuple[Tensor, Tensor]:
    mean, sd = (value.clone().requires_grad_() for value in LEARNED)
    return mean, sd


MODELS: dict[str, tuple[Model, Tasks]] = {"counts": (counts, COUNTS), "robust": (robust, NUMBERS)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(map(str, s.values())) or "defaults")
def test_gradients_to_the_prior_are_finite_differences(name: str, settings: dict[str, Any]) -> None:
    value = _values(*MODELS[name], laplace(**settings))
    assert torch.autograd.gradcheck(value, _learned(), fast_mode=True)


@pytest.mark.parametrize("curvature", ["exact", "fisher"])
def test_conjugate_gradients_are_finite_differences(curvature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "_DENSE_LIMIT", 0)
    assert torch.autograd.gradcheck(_values(robust, NUMBERS, laplace(curvature=curvature)), _learned(), fast_mode=True)


@pytest.mark.parametrize("dense_limit", [0, 128])
def test_implicit_maximum_a_posteriori_gradients_are_finite_differences(
    dense_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptation, "_DENSE_LIMIT", dense_limit)
    inference = map_estimate(gradient="implicit", num_steps=20)
    assert torch.autograd.gradcheck(_values(robust, NUMBERS, inference), _learned(), fast_mode=True)


@pytest.mark.parametrize("dense_limit", [0, 128])
def test_recorded_and_eager_agree_in_values_and_gradients(dense_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "_DENSE_LIMIT", dense_limit)
    results = []
    for recorded in (False, True):
        given = _learned()
        values = _values(counts, COUNTS, laplace(), recorded)(*given)
        slopes = [torch.autograd.grad(value.cos().sum(), given, retain_graph=True) for value in values]
        results.append([*values, *(slope for pair in slopes for slope in pair)])
    for eager, recorded_one in zip(*results, strict=True):
        torch.testing.assert_close(recorded_one, eager, rtol=1e-9, atol=1e-9)
        assert eager.abs().max() > 1e-3


def test_implicit_and_unrolled_gradients_agree() -> None:
    gradients = []
    for inference in (laplace(), laplace(gradient="unrolled", num_steps=12)):
        given = _learned()
        log_evidence = _values(counts, COUNTS, inference)(*given)[1]
        gradients.append(torch.autograd.grad(log_evidence.sum(), given))
    for implicit, unrolled in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-8, atol=1e-8)


def test_gradients_of_a_networks_evidence_are_finite_differences() -> None:
    # More coordinates than the dense form is for: Gauss-Newton steps, dual precision, conjugate gradients.
    model = hierarchical_regression((1, 10, 10, 1), precisions="learned", center="learned", activation=torch.tanh)
    x = torch.linspace(-1, 1, 5, dtype=F64)
    tasks = Tasks({"x": x[None], "y": torch.sin(3 * x)[None]}, outputs=("y",))
    adapter = bind(model, tasks, laplace(num_steps=45), "prior")
    prior = {name: value.to(F64) for name, value in adapter.density.prior.items()}
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(141, dtype=F64, generator=generator)

    def value(theta: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        learned = {"theta": prior["theta"] + theta * along, "scale": prior["scale"] * scale, "noise": noise}
        state = _adapt(adapter, learned, tasks)
        drawn = vmap(lambda one: adapter.inference.sample(one, 1, torch.Generator().manual_seed(1)), randomness="same")
        return torch.cat([state.log_evidence[:, 0], state.particles[:, 0] @ along, drawn(state)[:, 0] @ along])

    given = tuple(torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.1, 1.2, 0.15))
    assert torch.autograd.gradcheck(value, given, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "hessian"}, r"curvature='hessian' is not known; choose one of \['auto', 'exact'"),
        ({"form": "sparse"}, r"form='sparse' is not known"),
        ({"form": "dual", "curvature": "exact"}, r'form="dual" keeps "ggn", "fisher" or "empirical_fisher"'),
        ({"gradient": "none"}, r"gradient='none' is not known"),
        ({"learn_step_size": "scalar"}, r'has no implicit gradient.*write gradient="unrolled"'),
        ({"num_particles": 0}, "num_particles"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        laplace(**settings)


def test_no_task_stays_where_a_long_step_was_refused() -> None:
    """Latent noise makes some Newton steps a thousand times too long; with four fractions 1 to 9 % of tasks stood."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.param("mean", torch.zeros(2))
        w = pyro.sample("w", dist.Normal(mean, 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(torch.tensor(1.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w[0] + w[1] * x, s), obs=y)

    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 15, generator=generator), torch.randn(200, 2, generator=generator)
    noise = torch.randn(200, 1, generator=generator).abs() * torch.randn(200, 15, generator=generator)
    tasks = Tasks({"x": x, "y": w[:, :1] + w[:, 1:] * x + noise}, outputs=("y",))
    prior = meta_learn(model, tasks, num_support=8, inference=laplace(), num_steps=0, progress=False)
    for seed in (0, 1):
        assert prior.adapt(tasks, seed=seed).diagnostics()["converged"].all()


def test_prior_of_many_latents_given_a_few_is_prepared_without_losing_density() -> None:
    model = hierarchical_regression((1, 12, 12, 1), center="learned")
    x = torch.linspace(-2, 2, 10).repeat(4, 1)
    tasks = Tasks({"x": x, "y": torch.sin(x)}, outputs=("y",))
    prior = meta_learn(model, tasks, num_support=5, inference=laplace(), num_steps=0, progress=False)
    adapter = Adapter(prior.density, prior.inference, "prior")
    data = as_task_data(tasks)
    for seed in range(4):
        with seeded(seed, torch.device("cpu")), torch.no_grad():
            drawn = adapter._begin(prior.params, data)
            ready = adapter._prepare(drawn, prior.params, data)
        density = TaskDensity(prior.density, prior.params, {k: v[0] for k, v in data.data.items()})
        before, after = (density.log_prior(state.particles[0, 0]) for state in (drawn, ready))
        assert after >= before


def test_dual_keeps_precision_where_predictions_are_far_above_the_noise() -> None:
    # Curvature of the data a billion times the prior's; single precision loses the R x R matrix then.
    generator = torch.Generator().manual_seed(0)
    rows = 3e4 * torch.randn(12, 200, generator=generator, dtype=F64)
    prior = Arrow(torch.ones(200), torch.zeros(200, 0), torch.zeros(200, 0), torch.zeros(0, 0))
    single = dual(prior, rows.float()).precision
    exact = torch.linalg.slogdet(torch.eye(200, dtype=F64) + rows.mT @ rows).logabsdet
    assert single.log_det().item() == pytest.approx(exact.item(), rel=1e-5)
    v = torch.randn(200, generator=generator)
    expected = torch.linalg.solve(torch.eye(200, dtype=F64) + rows.mT @ rows, v.double())
    torch.testing.assert_close(single.solve(v).double(), expected, rtol=1e-3, atol=1e-4)
    assert dual(prior, rows.float()).flat.item() == -1
