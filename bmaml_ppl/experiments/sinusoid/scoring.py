"""How predictions of test curves are scored: exactly, from the Gaussian that each draw of a task's latents predicts."""

from collections.abc import Iterator
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.diagnostics.scores import calibration_error_of_cdf
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.posterior import Posterior
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference

__all__ = ["TEST_SEED", "Scores", "TestTasks", "draw_test_tasks", "predict_curves", "score_prior"]

TEST_SEED = 1_000_003
"""Of the test tasks; training tasks have the cells' small seeds."""

_MOST_SHOTS = 20
_CHUNK = 2**24


class TestTasks(NamedTuple):
    """Curves that nothing has been learned from.

    Attributes:
        observed: Their observations, of which the first K are a test's support: (T, 20).
        x: Where they are predicted, (T, N).
        clean: The curves there.
        y: What is observed there, with noise.
    """

    observed: Tasks
    x: Tensor
    clean: Tensor
    y: Tensor

    def support(self, shots: int) -> Tasks:
        """The first K observations of each."""
        return Tasks({k: v[:, :shots] for k, v in self.observed.data.items()}, outputs=("y",))


class Scores(NamedTuple):
    """Scores of a method, means over test tasks and points.

    Attributes:
        mse: Of the mean of all draws' curves against the clean curve, as published.
        mse_error: Standard error of that over the test tasks.
        median_mse: Median over the test tasks.
        member_mse: Mean over draws of each one's squared error against the clean curve.
        nll: Negative log density of a noisy observation under the mixture of all draws, in nats.
        calibration: PACOH's calibration error, a task at a time.
        coverage90: Share of noisy observations inside the central 90 % interval.
        adapt_seconds: For all test tasks together.
    """

    mse: float
    mse_error: float
    median_mse: float
    member_mse: float
    nll: float
    calibration: float
    coverage90: float
    adapt_seconds: float


def draw_test_tasks(num_tasks: int, num_query: int) -> TestTasks:
    """The test tasks: one seed gives the same to every method and number of shots."""
    made = sinusoid(num_tasks, _MOST_SHOTS + num_query, seed=TEST_SEED)
    x, y = made.tasks.data["x"], made.tasks.data["y"]
    later = slice(_MOST_SHOTS, None)
    observed = Tasks({"x": x[:, :_MOST_SHOTS], "y": y[:, :_MOST_SHOTS]}, outputs=("y",))
    return TestTasks(observed, x[:, later], made.curve(x[:, later]), y[:, later])


def score_prior(
    prior: LearnedPrior, inference: Inference | None, tests: TestTasks, shots: int, num_draws: int | None
) -> Scores:
    """Adapts a prior to the test tasks and scores its predictions.

    Args:
        prior: Learned.
        inference: At test; None takes the prior's own.
        tests: Test tasks.
        shots: K.
        num_draws: Of each posterior; None takes each particle once.
    """
    start = perf_counter()
    posterior = prior.adapt(tests.support(shots), inference=inference)
    seconds = perf_counter() - start
    parts = [_score_part(mean, sd, tests, rows) for rows, mean, sd in _predict(posterior, tests.x, num_draws)]
    mse, member, nll, cdf = (torch.cat(values) for values in zip(*parts, strict=True))
    calibration = vmap(calibration_error_of_cdf)(cdf)
    return Scores(
        mse=mse.mean().item(),
        mse_error=(mse.std() / len(mse) ** 0.5).item(),
        median_mse=mse.median().item(),
        member_mse=member.mean().item(),
        nll=nll.mean().item(),
        calibration=calibration.mean().item(),
        coverage90=((cdf > 0.05) & (cdf < 0.95)).double().mean().item(),
        adapt_seconds=seconds,
    )


def _score_part(mean: Tensor, sd: Tensor, tests: TestTasks, rows: slice) -> tuple[Tensor, ...]:
    """Squared errors of the ensemble and of its members, negative log densities, and the predictive CDF: (t, ...)."""
    clean, y = tests.clean[rows].to(mean), tests.y[rows].to(mean)
    error, member = (mean.mean(0) - clean).square().mean(1), (mean - clean).square().mean((0, 2))
    normal = torch.distributions.Normal(mean, sd, validate_args=False)
    log_density = normal.log_prob(y).logsumexp(0) - torch.tensor(float(len(mean))).log()
    return error.cpu(), member.cpu(), -log_density.cpu(), normal.cdf(y).mean(0).cpu()


def predict_curves(posterior: Posterior, x: Tensor, num_draws: int | None = None) -> tuple[Tensor, Tensor]:
    """The Gaussian that each draw predicts: means and standard deviations at x (T, N), (S, T, N) each."""
    parts = [(mean, sd) for _, mean, sd in _predict(posterior, x, num_draws)]
    means, deviations = zip(*parts, strict=True)
    return torch.cat(means, 1), torch.cat(deviations, 1)


def _predict(posterior: Posterior, x: Tensor, num_draws: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some tasks at a time: which, and means and standard deviations of each draw's predictions, (S, t, N)."""
    z = posterior.draws(num_draws)
    prior = posterior.prior
    x = x.to(z)
    size = max(_CHUNK // (z.shape[0] * x.shape[1]), 1)

    def evaluate(z: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        fn = prior.density.observe(z, prior.params, data)["obs"].fn
        return fn.mean, fn.stddev.expand(fn.mean.shape)

    for begin in range(0, len(x), size):
        rows = slice(begin, begin + size)
        data = {"x": x[rows], "y": torch.zeros_like(x[rows])}
        with torch.no_grad():
            mean, sd = vmap(vmap(evaluate, (0, None)), (1, 0))(z[:, rows], data)
        yield rows, mean.transpose(0, 1), sd.transpose(0, 1)
