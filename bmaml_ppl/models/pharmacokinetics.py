"""Pharmacokinetics: what a dose of a drug does to its concentration in the blood."""

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bmaml_ppl.models.inputs import as_floating
from bmaml_ppl.types import Model

__all__ = ["OralDose", "concentration_after", "one_compartment"]


# A difference of exponents below which the series' first left-out term is under 1e-11 of the value.
_NEAR = 0.02


class OralDose(NamedTuple):
    """Where the meta-learned prior of `one_compartment` starts: typical rates, and their spread.

    The defaults suit a small molecule, absorbed within an hour and eliminated within a day.

    Attributes:
        absorption: k_a, 1/h.
        elimination: k_e, 1/h.
        clearance: Cl, L/h per kg of body weight where the dose is per kg.
        spread: Standard deviation of each one's logarithm between subjects.
    """

    absorption: float = 1.0
    elimination: float = 0.1
    clearance: float = 0.05
    spread: float = 0.3


def concentration_after(
    time: Tensor, dose: Tensor, absorption: Tensor, elimination: Tensor, clearance: Tensor
) -> Tensor:
    r"""Concentration at some time after a single oral dose, absorbed and eliminated at first order.

    .. math:: C(t) = \frac{D k_a k_e}{Cl (k_a - k_e)} \bigl(e^{-k_e t} - e^{-k_a t}\bigr)

    The limit at k_a = k_e, D k_e^2 t exp(-k_e t) / Cl, is met with its first and second derivatives, by a series.

    Args:
        time: h since the dose, (N,).
        dose: mg, or mg per kg, scalar.
        absorption: k_a, 1/h.
        elimination: k_e, 1/h.
        clearance: L/h, or L/h per kg.

    Returns:
        mg/L, (N,).

    Reference:
        Pinheiro and Bates (2000), Mixed-Effects Models in S and S-PLUS, appendix C.5 (SSfol).
    """
    difference = (absorption - elimination) * time
    near = difference.abs() < _NEAR
    x = torch.where(near, difference, 0.0)
    at_equality = torch.exp(-elimination * time) * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5))))
    x = torch.where(near, 1.0, difference.abs())
    elsewhere = torch.exp(-torch.minimum(absorption, elimination) * time) * -torch.expm1(-x) / x
    return dose * absorption * elimination / clearance * time * torch.where(near, at_equality, elsewhere)


def one_compartment(start: OralDose | None = None, *, relative_noise: bool = False) -> Model:
    r"""One subject's concentrations after an oral dose: a one-compartment model with first-order absorption.

    .. math::
        (\log k_a, \log k_e, \log Cl) \sim N(\mu, L L^T), \quad
        y_i \sim N\bigl(C(t_i), a^2 + (b \, C(t_i))^2\bigr)

    with C of `concentration_after`. The returned model is `model(time, dose, concentration=None)`: `time`, h, and
    `concentration`, mg/L, both (N,), and the constant `dose`, mg per kg. It is written in these units: leave the tasks
    unstandardised. Latent site: `rates`, (3,), the logarithms of k_a and k_e (1/h) and of the clearance Cl (L/h
    per kg). Deterministic sites: `absorption`, `elimination` and `clearance` themselves. Meta-learned: `mean` and
    `scale_tril` of `rates`; `noise` a, mg/L, and `relative_noise` b
    where asked for.

    Args:
        start: Where the prior starts; None is `OralDose()`.
        relative_noise: Whether b is learned; else it is 0, as published. Learned, a and b need many subjects: the
            samples taken at time 0, which are 0 but for a few, make the noise of small concentrations vanish.

    References:
        Boeckmann, Sheiner and Beal (1994), NONMEM Users Guide, Part V; Pinheiro and Bates (2000), Mixed-Effects
        Models in S and S-PLUS, section 8.2.1, whose theophylline model this is.
    """
    begin = start or OralDose()
    typical = torch.tensor(begin[:3]).log()

    def model(time: Tensor, dose: Tensor, concentration: Tensor | None = None) -> None:
        time = as_floating(time)
        mean = pyro.param("mean", lambda: typical.to(time))
        root = pyro.param(
            "scale_tril", lambda: begin.spread * torch.eye(3).to(time), constraint=constraints.lower_cholesky
        )
        noise = pyro.param("noise", lambda: time.new_tensor(0.5), constraint=constraints.positive)
        rates = pyro.sample("rates", dist.MultivariateNormal(mean, scale_tril=root))
        names = ("absorption", "elimination", "clearance")
        values = [pyro.deterministic(name, rate.exp()) for name, rate in zip(names, rates, strict=True)]
        curve = concentration_after(time, dose, *values)
        if relative_noise:
            relative = pyro.param("relative_noise", lambda: time.new_tensor(0.1), constraint=constraints.positive)
            noise = (noise**2 + (relative * curve) ** 2).sqrt()
        with pyro.plate("samples", len(time)):
            pyro.sample("obs", dist.Normal(curve, noise), obs=concentration)

    return model
