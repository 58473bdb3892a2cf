"""Pictures of what adaptation does: functions that adapt to a curve, and how particles and chains find a density."""

from collections.abc import Callable, Sequence
from functools import partial
from math import erf, log, pi, sqrt
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Normal
from torch.func import vmap

from bmaml_ppl.datasets.sinusoid import sine_offset
from bmaml_ppl.diagnostics.mixing import ess
from bmaml_ppl.evaluation import run_jobs
from bmaml_ppl.experiments.sinusoid.cells import Cell, learn_cell
from bmaml_ppl.experiments.sinusoid.recipes import PICTURES
from bmaml_ppl.experiments.sinusoid.scoring import TEST_SEED, TestTasks, predict_curves, score_prior
from bmaml_ppl.experiments.sinusoid.settings import SinusoidSettings
from bmaml_ppl.generators import seeded
from bmaml_ppl.inference import ALGORITHMS, hmc, map_estimate, svgd
from bmaml_ppl.inference.chains import thin
from bmaml_ppl.learned import LearnedPrior
from bmaml_ppl.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, lighten
from bmaml_ppl.tasks import Tasks
from bmaml_ppl.types import Inference, LogDensity

__all__ = ["Drawn", "draw_adaptation", "draw_banana", "draw_mixture", "draw_pictures"]

Drawn = tuple[Figure, dict[str, Any]]
"""A figure, and the numbers behind it as JSON values."""

_COLUMNS = ("offset_maml", "offset_pretraining", "offset_bmaml")
_STEPS = (0, 1, 10)
_STEP_LINES = ((GREY, ":"), (ORANGE, "--"), (BLUE, "-"))
_LEVEL = 0.9

_WEIGHTS, _MEANS = (1 / 3, 2 / 3), (-2.0, 2.0)
_FAR = -10.0
_KERNEL_WIDTH = 0.4

_BEND, _NARROW = 0.5, 0.35
_CONTAINED = (0.99, 0.9, 0.5)
_OUTSIDE, _START_SD = (2.0, -2.0), 0.5
_NUM_CHAINS, _NUM_SHOWN = 20, 500
_DESCENTS = ((-2.6, -0.5), (-1.6, 3.5), (1.2, 3.8), (2.0, -2.0))
_SVGD: dict[str, dict[str, Any]] = {
    "SVGD, one kernel": {"preconditioner": "adaptive", "step_size": 0.05, "structure": "joint"},
    "SVGD, one kernel, whitened": {"preconditioner": "curvature", "structure": "joint", "bandwidth": "median"},
    "SVGD, the library's default": {},
}
_SVGD_COLORS = (GREEN, BLUE, PURPLE)
_SPREAD_STEPS = 200


def draw_pictures(folder: Path, settings: SinusoidSettings) -> dict[str, Any]:
    """Writes `adaptation.png`, `mixture.png` and `banana.png` to the folder.

    Args:
        folder: For the pictures, and for the priors that the first is drawn with.
        settings: Of the study; the last two pictures do not depend on them.

    Returns:
        The numbers behind each, as JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adaptation = partial(draw_adaptation, folder, settings, num_tasks=min(200, settings.num_test_tasks))
    pictures: dict[str, Callable[[], Drawn]]
    pictures = {"adaptation": adaptation, "mixture": draw_mixture, "banana": draw_banana}
    numbers = {}
    for name, draw in pictures.items():
        figure, numbers[name] = draw()
        figure.savefig(folder / f"{name}.png", dpi=110)
    return numbers


def draw_adaptation(
    folder: Path,
    settings: SinusoidSettings,
    *,
    shots: Sequence[int] = (10, 5),
    num_tasks: int = 200,
    task: int | None = None,
) -> Drawn:
    """What MAML, multi-task pretraining and BMAML have learned on y = a sin(b x) + c, and how it adapts to one task.

    Args:
        folder: Where priors are kept.
        settings: Of the study.
        shots: K, a row each.
        num_tasks: Test tasks that errors are means over.
        task: Which of them is shown; None takes the one at the median distance from the means of a, b, c.

    Returns:
        The figure, and by K, recipe and number of steps the scores against the clean curves at 101 points on [-5, 5];
            see `Scores`.

    References:
        Finn, Abbeel and Levine (2017), Model-Agnostic Meta-Learning, figure 2.
    """
    cells = [Cell(name, count) for count in shots for name in _COLUMNS]
    for _ in run_jobs(_learn, [(folder, cell, settings) for cell in cells], settings.workers):
        pass
    tests, typical = _draw_offset_tests(num_tasks, max(shots))
    shown = typical if task is None else task
    x, clean, support = tests.x[shown], tests.clean[shown], {count: tests.support(count)[shown] for count in shots}
    figure = Figure(figsize=(13, 1 + 3.6 * len(shots)), layout="constrained")
    axes = figure.subplots(len(shots), len(_COLUMNS), sharex=True, sharey=True, squeeze=False)
    numbers: dict[str, Any] = {f"{count} shots": {} for count in shots}
    for ax, cell in zip(axes.flat, cells, strict=True):
        prior, inference = learn_cell(folder, cell, settings)[0], _choose_inference(cell)
        own = inference.num_steps
        scores = {n: _score(prior, _with_steps(inference, n), tests, cell.shots) for n in sorted({*_STEPS, own})}
        numbers[f"{cell.shots} shots"][cell.recipe] = {_name_steps(n): found for n, found in scores.items()}
        curves = partial(_find_curves, prior, inference, support[cell.shots], x)
        _draw_functions(ax, x, curves, inference.num_particles, own)
        ax.plot(x, clean, color=BLACK, lw=1, label="true curve")
        seen = (support[cell.shots].data[name][0] for name in ("x", "y"))
        ax.plot(*seen, "o", color=BLACK, ms=5, label="observations adapted to")
        errors = ", ".join(f"{n}: {found['mse']:.3g}" for n, found in scores.items())
        ax.set_title(f"{PICTURES[cell.recipe].title}, K = {cell.shots}\nMSE by steps: {errors}", fontsize=10)
    figure.suptitle(f"one task adapted to; MSE against the true curves of {num_tasks} tasks", fontsize=11)
    _label(figure, axes, "x", "y")
    return figure, numbers


def _learn(folder: Path, cell: Cell, settings: SinusoidSettings) -> None:
    learn_cell(folder, cell, settings)


def _draw_offset_tests(num_tasks: int, num_observations: int) -> tuple[TestTasks, int]:
    """Tasks of this family, and which is as far from the mean of their parameters as half of them."""
    made = sine_offset(num_tasks, num_observations, seed=TEST_SEED)
    x = torch.linspace(-5, 5, 101).expand(num_tasks, -1)
    clean = made.curve(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(TEST_SEED + 1))
    parameters = torch.stack(list(made.parameters.values()))
    away = (parameters - parameters.mean(1, keepdim=True)) / parameters.std(1, correction=0, keepdim=True)
    return TestTasks(made.tasks, x, clean, clean + 0.1 * noise), int(away.norm(dim=0).argsort()[num_tasks // 2])


def _choose_inference(cell: Cell) -> Inference:
    recipe = PICTURES[cell.recipe]
    return (recipe.inference if recipe.at_test is None else recipe.at_test)(cell.shots)


def _with_steps(inference: Inference, num_steps: int) -> Inference:
    return ALGORITHMS[inference.name](**{**inference.config, "num_steps": num_steps})


def _name_steps(num: int) -> str:
    return f"{num} step{'' if num == 1 else 's'}"


def _score(prior: LearnedPrior, inference: Inference, tests: TestTasks, shots: int) -> dict[str, float]:
    scores = score_prior(prior, inference, tests, shots, None)._asdict()
    del scores["adapt_seconds"]
    return scores


def _find_curves(
    prior: LearnedPrior, inference: Inference, support: Tasks, x: Tensor, num_steps: int
) -> tuple[Tensor, Tensor]:
    """Means and standard deviations that each particle predicts for one task at x (N,), (M, N)."""
    posterior = prior.adapt(support, inference=inference, num_steps=num_steps)
    mean, sd = predict_curves(posterior, x[None])
    return mean[:, 0].cpu(), sd[:, 0].cpu()


def _draw_functions(
    ax: Axes, x: Tensor, curves: Callable[[int], tuple[Tensor, Tensor]], num_particles: int, num_steps: int
) -> None:
    """One particle after several numbers of steps, or all of them after their own."""
    if num_particles == 1:
        for num, (color, style) in zip(_STEPS, _STEP_LINES, strict=True):
            ax.plot(x, curves(num)[0][0], color=color, ls=style, lw=2, label=_name_steps(num))
        return
    mean, sd = curves(num_steps)
    low, high = (_mixture_quantile(mean, sd, level) for level in ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    after = f"after {_name_steps(num_steps)}"
    ax.fill_between(x, low, high, color=lighten(GREEN, 0.3), lw=0, label=f"{_LEVEL:.0%} of new observations, {after}")
    lines = ax.plot(x, mean.T, color=GREEN, lw=0.8)
    lines[0].set_label(f"each of {num_particles} particles, {after}")


def _mixture_quantile(mean: Tensor, sd: Tensor, level: float) -> Tensor:
    """Quantiles of equally weighted mixtures of normals, by bisection: (M, N) -> (N,)."""
    normal = Normal(mean, sd)
    low, high = (mean - 8 * sd).amin(0), (mean + 8 * sd).amax(0)
    for _ in range(40):
        middle = 0.5 * (low + high)
        below = normal.cdf(middle).mean(0) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


def draw_mixture(
    *,
    num_particles: int = 100,
    iterations: Sequence[int] = (0, 50, 75, 100, 150, 500),
    step_size: float = 0.1,
    seed: int = 0,
) -> Drawn:
    """SVGD's particles on their way from N(-10, 1) to the mixture 1/3 N(-2, 1) + 2/3 N(2, 1).

    Args:
        num_particles: M.
        iterations: At which they are shown, ascending.
        step_size: Of steps scaled by AdaGrad with decay.
        seed: Of the start.

    Returns:
        The figure, and by iteration the particles' mean, standard deviation and share right of 0,
            beside the exact ones.

    References:
        Liu and Wang (2016), Stein Variational Gradient Descent, figure 1.
    """
    inference = svgd(
        num_particles=num_particles,
        num_steps=max(iterations),
        step_size=step_size,
        preconditioner="adaptive",
        structure="joint",
    )
    start = _FAR + torch.randn(num_particles, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    visited = _walk(inference, start, _log_mixture, seed)[:, :, 0]
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, -(-len(iterations) // 2), sharex=True, sharey=True, squeeze=False)
    numbers: dict[str, Any] = {"exact": _exact_mixture()}
    for ax, at in zip(axes.flat, iterations, strict=False):
        numbers[f"iteration {at}"] = found = _describe_mixture(visited[at])
        _draw_line_of_particles(ax, visited[at])
        ax.set_title(f"iteration {at}: mean {found['mean']:.2f}, sd {found['sd']:.2f}", fontsize=10)
    exact = f"the target: mean {2 / 3:.2f}, sd {sqrt(1 + 32 / 9):.2f}"
    figure.suptitle(f"SVGD, {num_particles} particles, adaptive steps of {step_size:g}; {exact}", fontsize=11)
    _label(figure, axes, "z", "density")
    return figure, numbers


def _walk(inference: Inference, start: Tensor, log_density: LogDensity, seed: int) -> Tensor:
    """Positions of all particles before the first step and after each, (n + 1, M, D)."""
    with seeded(seed, start.device):
        state = inference.init({"particles": start})
        visited = [state.particles]
        for _ in range(inference.num_steps):
            state = inference.update(state, log_density)
            visited.append(state.particles)
    return torch.stack(visited)


def _log_mixture(z: Tensor) -> Tensor:
    """Log density up to a constant: (1,) -> scalar."""
    return (z.new_tensor(_WEIGHTS).log() - 0.5 * (z - z.new_tensor(_MEANS)).square()).logsumexp(0)


def _exact_mixture() -> dict[str, float]:
    right = [0.5 * (1 + erf(mean / sqrt(2))) for mean in _MEANS]
    share = sum(weight * part for weight, part in zip(_WEIGHTS, right, strict=True))
    return {"mean": 2 / 3, "sd": sqrt(1 + 32 / 9), "right_of_0": share}


def _describe_mixture(particles: Tensor) -> dict[str, float]:
    share = (particles > 0).double().mean().item()
    return {"mean": particles.mean().item(), "sd": particles.std(correction=0).item(), "right_of_0": share}


def _draw_line_of_particles(ax: Axes, particles: Tensor) -> None:
    z = torch.linspace(-14, 7, 421, dtype=particles.dtype)
    target = torch.stack([_log_mixture(at) for at in z[:, None]]).exp() / sqrt(2 * pi)
    smooth = Normal(particles, _KERNEL_WIDTH).log_prob(z[:, None]).exp().mean(1)
    ax.fill_between(z, target, color=lighten(GREY, 0.4), lw=0, label="target")
    ax.plot(z, smooth, color=BLUE, lw=2, label=f"particles, kernel density of width {_KERNEL_WIDTH}")
    ax.plot(particles, torch.full_like(particles, -0.015), "|", color=BLUE, ms=6, mew=0.7, label="each particle")


def _label(figure: Figure, axes: Any, x: str, y: str) -> None:
    """Labels of the outer axes, and one legend of all panels below them."""
    for ax in axes[-1]:
        ax.set_xlabel(x)
    for ax in axes[:, 0]:
        ax.set_ylabel(y)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)


def draw_banana(*, num_particles: int = 100, num_steps: int = 500, num_draws: int = 500, seed: int = 0) -> Drawn:
    """Gradient descent, HMC and SVGD on a bent density: z1 ~ N(0, 1), z2 ~ N((z1^2 - 1) / 2, 0.35^2).

    SVGD runs as Liu and Wang's (one kernel, steps scaled by AdaGrad with decay), the same in coordinates whitened by a
    Hessian that all particles share, and as `svgd` chooses by itself for two coordinates: whitened, with a kernel a
    coordinate and a linear one.

    Args:
        num_particles: M of SVGD.
        num_steps: Of SVGD and of gradient descent.
        num_draws: S of each of HMC's 20 chains; as many transitions come before them.
        seed: Of the starts, N((2, -2), 0.5^2 I), and of HMC.

    Returns:
        The figure, and by method the mean and standard deviation of each coordinate and the share inside the smallest
            region of probability 0.9, beside the exact ones.
    """
    figure = Figure(figsize=(11.5, 8.8), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax in (*axes[0, :2], *axes[1]):
        _draw_contours(ax, axes[0, 0])
    descent = map_estimate(num_particles=len(_DESCENTS), num_steps=num_steps, step_size=0.02, preconditioner="none")
    paths = _walk(descent, torch.tensor(_DESCENTS, dtype=torch.float64), _log_banana, seed)
    _draw_paths(axes[0, 0], paths)
    chains = hmc(num_chains=_NUM_CHAINS, num_warmup=num_draws, num_draws=num_draws, num_leapfrog=12)
    draws = _walk(chains, _draw_start(_NUM_CHAINS, seed), _log_banana, seed)[-num_draws:].transpose(0, 1)
    _draw_cloud(axes[0, 1], thin(draws, _NUM_SHOWN), f"{_NUM_SHOWN} of {_NUM_CHAINS * num_draws:,} draws", BLACK)
    numbers: dict[str, Any] = {"exact": _exact_banana(), "gradient descent": _describe_banana(paths[-1])}
    numbers["HMC"] = {**_describe_banana(draws.flatten(0, 1)), "effective_draws": ess(draws).tolist()}
    spreads = {}
    for ax, (name, options), color in zip(axes[1], _SVGD.items(), _SVGD_COLORS, strict=True):
        inference = svgd(num_particles=num_particles, num_steps=num_steps, **options)
        visited = _walk(inference, _draw_start(num_particles, seed), _log_banana, seed)
        ax.plot(*visited[0].T, "o", mfc="none", mec=GREY, mew=0.8, ms=4, label="start")
        _draw_cloud(ax, visited[-1], f"{num_particles} particles", color)
        spreads[name] = visited[:, :, 0].std(1, correction=0)
        later = spreads[name][num_steps // 2 :]
        numbers[name] = {**_describe_banana(visited[-1]), "sd_of_z1_later": [later.min().item(), later.max().item()]}
    _draw_spreads(axes[0, 2], spreads)
    _finish_banana(figure, axes, numbers, num_steps)
    return figure, numbers


def _draw_start(num: int, seed: int) -> Tensor:
    """Positions aside of the density, (num, 2)."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(num, 2, generator=generator, dtype=torch.float64)
    return spread.new_tensor(_OUTSIDE) + _START_SD * spread


def _log_banana(z: Tensor) -> Tensor:
    """Log density up to a constant: (2,) -> scalar, 0 at the mode."""
    return -0.5 * (z[0].square() + ((z[1] - _BEND * (z[0].square() - 1)) / _NARROW).square())


def _exact_banana() -> dict[str, Any]:
    return {"mean": [0.0, 0.0], "sd": [1.0, sqrt(2 * _BEND**2 + _NARROW**2)], "inside_90": 0.9}


def _describe_banana(z: Tensor) -> dict[str, Any]:
    # Unbent, the density is a round normal: a region of probability p ends where it is 1 - p of its maximum.
    inside = vmap(_log_banana)(z) > log(1 - 0.9)
    return {
        "mean": z.mean(0).tolist(),
        "sd": z.std(0, correction=0).tolist(),
        "inside_90": inside.double().mean().item(),
    }


def _draw_contours(ax: Axes, first: Axes) -> None:
    """Smallest regions of given probabilities, on the limits of the first panel."""
    if ax is not first:
        ax.sharex(first)
        ax.sharey(first)
    z1, z2 = torch.linspace(-3.6, 3.6, 181), torch.linspace(-3.6, 5.0, 216)
    points = torch.cartesian_prod(z1, z2)
    density = vmap(_log_banana)(points).exp().reshape(len(z1), len(z2)).T
    shades = [lighten(GREY, strength) for strength in (0.15, 0.35, 0.55)]
    ax.contourf(z1, z2, density, [*(1 - p for p in _CONTAINED), 1.01], colors=shades)


def _draw_paths(ax: Axes, paths: Tensor) -> None:
    ax.plot(paths[:, :, 0], paths[:, :, 1], color=ORANGE, lw=1.5)
    ax.plot(*paths[0].T, "o", color=ORANGE, ms=5, mfc="white", label="start")
    ax.plot(*paths[-1].T, "*", color=ORANGE, ms=13, label="end: the mode")


def _draw_cloud(ax: Axes, z: Tensor, label: str, color: str) -> None:
    ax.plot(*z.T, "o", color=color, ms=3.5, mew=0, alpha=0.8, label=label)


def _draw_spreads(ax: Axes, spreads: dict[str, Tensor]) -> None:
    for (name, spread), color, order in zip(spreads.items(), _SVGD_COLORS, (3, 4, 2), strict=True):
        ax.plot(spread[: _SPREAD_STEPS + 1], color=color, lw=0.8 if order == 2 else 2, zorder=order, label=name)
    ax.axhline(1, color=BLACK, ls="--", lw=1, zorder=5, label="exact")
    ax.set(xlabel="steps", ylabel="standard deviation of z1", ylim=(0, 2))
    ax.set_title("spread of SVGD's particles\nafter each step", fontsize=10)
    ax.legend(frameon=False, fontsize="small", loc="upper right")


def _finish_banana(figure: Figure, axes: Any, numbers: dict[str, Any], num_steps: int) -> None:
    shown = [name for name in numbers if name != "exact"]
    for ax, name in zip((*axes[0, :2], *axes[1]), shown, strict=True):
        mean, sd = (", ".join(f"{value:z.2f}" for value in numbers[name][key]) for key in ("mean", "sd"))
        ax.set_title(f"{name}\nmean ({mean}), sd ({sd})", fontsize=10)
        ax.set(xlabel="z1", ylabel="z2", aspect="equal")
        ax.legend(frameon=False, fontsize="small", loc="lower left")
    exact = f"exact: mean (0, 0), sd (1, {numbers['exact']['sd'][1]:.2f})"
    regions = "grey regions hold 50, 90 and 99 % of the probability"
    figure.suptitle(f"{exact}; {regions}; {num_steps} steps of gradient descent and of SVGD", fontsize=11)
