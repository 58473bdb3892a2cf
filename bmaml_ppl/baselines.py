"""Classical baselines for many small regressions: polynomials by least squares, and the linear mixed model.

They work in standardised units (a scaling of the training tasks is applied at the door) and return the exact
Gaussian prediction of each new observation, so that they can be scored beside a learned prior.
"""

import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bmaml_ppl.tasks import Tasks

__all__ = ["Gaussian", "MixedModel", "fit_mixed_model", "predict_by_task", "predict_mixed", "predict_pooled"]


class Gaussian(NamedTuple):
    """Independent normal predictions, one per observation; padded rows hold finite numbers without meaning.

    Attributes:
        mean: Predictive mean, (T, N), in standardised units.
        sd: Predictive standard deviation, noise included, (T, N).
    """

    mean: Tensor
    sd: Tensor

    def draws(self, num_samples: int) -> Tensor:
        """Stratified draws, (S, T, N): the quantiles at (s + 1/2) / S, without Monte Carlo error."""
        levels = (torch.arange(num_samples, dtype=self.mean.dtype) + 0.5) / num_samples
        return self.mean + self.sd * torch.special.ndtri(levels)[:, None, None]

    def log_density(self, target: Tensor) -> Tensor:
        """Log density of the targets, (T, N), in nats."""
        return torch.distributions.Normal(self.mean, self.sd).log_prob(target)


class MixedModel(NamedTuple):
    """A fitted linear mixed model, y = X (beta + b) + e with b ~ N(0, covariance) of each task.

    Attributes:
        mean: Fixed effects beta, (P,).
        covariance: Of the random effects; zero rows where an effect is fixed only, (P, P).
        noise: Standard deviation of e.
    """

    mean: Tensor
    covariance: Tensor
    noise: float

    def predict(self, support: Tensor, outcome: Tensor, query: Tensor) -> Gaussian:
        r"""The exact conditional distribution of new observations of the same tasks (empirical Bayes).

        .. math:: \hat\beta + \Psi X^T (X \Psi X^T + \sigma^2 I)^{-1} (y - X \hat\beta)

        Args:
            support: Design of the observations, (T, K, P).
            outcome: The observations, (T, K).
            query: Design of what is predicted, (T, N, P).

        References:
            Robinson (1991), That BLUP is a good thing: the estimation of random effects, section 1.
        """
        noise = self.noise**2 * torch.eye(support.shape[1], dtype=support.dtype)
        cross = self.covariance @ support.mT
        gain = torch.linalg.solve(support @ cross + noise, cross.mT).mT
        residual = outcome - support @ self.mean
        effect = self.mean + (gain @ residual.unsqueeze(-1)).squeeze(-1)
        left = self.covariance - gain @ cross.mT
        variance = (query @ left * query).sum(-1).clamp_min(0) + self.noise**2
        return Gaussian((query @ effect.unsqueeze(-1)).squeeze(-1), variance.sqrt())


def _design(x: Tensor, degree: int) -> Tensor:
    return torch.stack([x.double() ** power for power in range(degree + 1)], -1)


def _columns(tasks: Tasks, x: str, y: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, output and which rows are real, (T, N) each, in the units of the tasks' own scaling."""
    scaled = tasks.scaled()
    values = scaled.data[y].double()
    mask = torch.ones_like(values, dtype=torch.bool) if scaled.mask is None else scaled.mask
    return scaled.data[x], values, mask


def predict_pooled(train: Tasks, query: Tasks, x: str, y: str, degree: int = 2) -> Gaussian:
    """One polynomial for all tasks, least squares over the training tasks; what a task showed is ignored.

    Args:
        train: Training tasks.
        query: What is predicted, standardised like `train`.
        x: The input.
        y: The output.
        degree: Of the polynomial.
    """
    time, value, mask = _columns(train, x, y)
    design = _design(time[mask], degree)
    coefficients = torch.linalg.lstsq(design, value[mask].unsqueeze(-1)).solution.squeeze(-1)
    residual = value[mask] - design @ coefficients
    noise = (residual.square().sum() / (len(residual) - degree - 1)).sqrt()
    mean = _design(_columns(query, x, y)[0], degree) @ coefficients
    return Gaussian(mean, noise.expand_as(mean))


def predict_by_task(train: Tasks, support: Tasks, query: Tasks, x: str, y: str, degree: int = 2) -> Gaussian:
    r"""One polynomial for each new task, least squares on its own few observations alone.

    As many observations as coefficients leave no residual to tell the noise from, so that its standard
    deviation comes from the training tasks: the residuals of each task's own polynomial, with their degrees
    of freedom. The prediction is the textbook one, :math:`\sigma^2 (1 + x^T (X^T X)^{-1} x)`: far from the
    observations it is as uncertain as it should be.

    Args:
        train: Training tasks: they give the noise and nothing else.
        support: Observations of the new tasks, as many in each.
        query: What is predicted, standardised like `train`.
        x: The input.
        y: The output.
        degree: Of the polynomial.
    """
    squares, freedom = 0.0, 0
    for time, value, real in zip(*_columns(train, x, y), strict=True):
        design = _design(time[real], degree)
        fit = torch.linalg.lstsq(design, value[real].unsqueeze(-1)).solution.squeeze(-1)
        squares += (value[real] - design @ fit).square().sum().item()
        freedom += int(real.sum()) - degree - 1
    time, value, _ = _columns(support, x, y)
    inverse = torch.linalg.pinv(_design(time, degree))
    new = _design(_columns(query, x, y)[0], degree)
    mean = (new @ inverse @ value.unsqueeze(-1)).squeeze(-1)
    spread = (new @ inverse).square().sum(-1)
    return Gaussian(mean, (squares / freedom * (1 + spread)).sqrt())


def fit_mixed_model(train: Tasks, x: str, y: str, degree: int = 2) -> MixedModel:
    """Fits a linear mixed model with statsmodels by restricted maximum likelihood.

    All coefficients vary between tasks where that converges; else the highest powers become fixed.

    Args:
        train: Training tasks.
        x: The input.
        y: The output.
        degree: Of the polynomial.

    Raises:
        ImportError: If statsmodels is not installed.
        RuntimeError: If not even a random intercept converges.
    """
    time, value, mask = _columns(train, x, y)
    design = _design(time[mask], degree).numpy()
    groups = torch.arange(len(train))[:, None].expand_as(mask)[mask].numpy()
    for num_random in range(degree + 1, 0, -1):
        result = _fit(value[mask].numpy(), design, groups, num_random)
        if result is not None:
            covariance = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)
            covariance[:num_random, :num_random] = torch.as_tensor(result.cov_re)
            return MixedModel(torch.as_tensor(result.fe_params), covariance, float(result.scale) ** 0.5)
    raise RuntimeError("the mixed model did not converge, not even with a random intercept only")


def _fit(outcome: Any, design: Any, groups: Any, num_random: int) -> Any:
    """The fitted model, or None where it did not converge."""
    try:
        from statsmodels.regression.mixed_linear_model import MixedLM
    except ImportError as error:
        raise ImportError('the mixed model needs statsmodels; write: pip install "bmaml-ppl[data]"') from error
    model = MixedLM(outcome, design, groups, exog_re=design[:, :num_random])
    with warnings.catch_warnings():
        # Of convergence, which is asked for below, and of a singular covariance, which is a valid answer.
        warnings.simplefilter("ignore")
        # Near a singular covariance gradients fail, where a search without them may still arrive.
        for method in (["bfgs", "lbfgs", "cg"], ["powell"]):
            with suppress(np.linalg.LinAlgError):
                result = model.fit(reml=True, method=method)
                if result.converged:
                    return result
    return None


def predict_mixed(train: Tasks, support: Tasks, query: Tasks, x: str, y: str, degree: int = 2) -> Gaussian:
    """Fits `fit_mixed_model` and predicts the new tasks from their own few observations.

    Args:
        train: Training tasks.
        support: Observations of the new tasks, as many in each, standardised like `train`.
        query: What is predicted.
        x: The input.
        y: The output.
        degree: Of the polynomial.
    """
    model = fit_mixed_model(train, x, y, degree)
    time, value, _ = _columns(support, x, y)
    return model.predict(_design(time, degree), value, _design(_columns(query, x, y)[0], degree))
