"""A bridge to Pyro's No-U-Turn sampler: reference chains of one task, leaving Pyro's global state as it was."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import pyro
import torch
from pyro.infer import NUTS
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from bmaml_ppl.adaptation import TaskData, one_task
from bmaml_ppl.checks import check_count
from bmaml_ppl.compile import Recorded
from bmaml_ppl.generators import seeded
from bmaml_ppl.handlers import isolated_store
from bmaml_ppl.inference import chains
from bmaml_ppl.inference.chains import ChainState
from bmaml_ppl.posterior import Posterior
from bmaml_ppl.task_density import TaskDensity
from bmaml_ppl.types import Inference, LogDensity

if TYPE_CHECKING:
    from bmaml_ppl.learned import LearnedPrior
    from bmaml_ppl.tasks import Tasks

__all__ = ["check_sampler", "keep_finite", "nuts", "run_nuts"]

_CANDIDATES = 8


def nuts(
    prior: "LearnedPrior",
    tasks: "Tasks | None" = None,
    /,
    *,
    num_warmup: int = 500,
    num_draws: int = 1000,
    num_chains: int = 1,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    seed: int | None = None,
    **data: Any,
) -> "Posterior":
    """Adapts to one task with `pyro.infer.NUTS` on our density of it.

    For reference: no gradient passes through it, and it serves one task at a time; `hmc` serves many. Chains run one
    after another, each from its own start: a draw from the prior, or a site's own `infer={"init": draw}`. The mass
    matrix is diagonal. It computes in the prior's dtype; `prior.to(dtype=torch.float64)` asks for more.

    Args:
        prior: A learned prior; its parameters stay fixed.
        tasks: Tasks that hold one task, in the user's units, or None.
        num_warmup: Transitions a chain that adapt step size and mass matrix, and are dropped.
        num_draws: S, transitions a chain that are kept.
        num_chains: M.
        target_accept: Mean acceptance that the step size aims at, in (0, 1): higher takes shorter steps.
        max_tree_depth: A trajectory has at most 2^max_tree_depth steps.
        seed: Seed of starts and transitions; None takes the prior's.
        **data: The task's observations as keyword tensors, (N, ...).

    Returns:
        The posterior of this one task; its `state` is a `ChainState`, and `sites(M * S)` gives every draw once, one
        chain after another.

    Raises:
        TypeError: If a number is not an integer, or data are not numbers.
        ValueError: If an option is out of range, data hold several tasks or cannot be, or too few starts have a
            finite density.

    Reference:
        Hoffman and Gelman (2014), The No-U-Turn Sampler; Betancourt (2017), A Conceptual Introduction to Hamiltonian
        Monte Carlo, appendix A, as in Pyro's `pyro/infer/mcmc/nuts.py`.
    """
    counts = {"num_warmup": num_warmup, "num_draws": num_draws, "num_chains": num_chains}
    settings: dict[str, Any] = {**counts, "target_accept": target_accept, "max_tree_depth": max_tree_depth}
    check_sampler(**settings)
    given, batch, single = prior.prepare_tasks(tasks, data)
    if len(given) != 1:
        raise ValueError(f"got {len(given)} tasks, but nuts serves one; write tasks[{given.names[0]!r}], or use hmc")
    seed = prior.seed if seed is None else seed
    task = one_task(batch)
    log_density = TaskDensity(prior.density, prior.params, task.data, task.mask)
    starts = _choose_starts(prior, task, log_density, num_chains, seed)
    state = run_nuts(log_density, starts, **settings, seed=seed)
    return Posterior(
        prior,
        _as_inference(settings, prior),
        tree_map(lambda value: value.unsqueeze(0), state),
        given,
        single,
        seed,
    )


def run_nuts(
    log_density: LogDensity,
    starts: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    num_chains: int,
    target_accept: float,
    max_tree_depth: int,
    seed: int,
    progress: bool = False,
) -> ChainState:
    """Runs Pyro's NUTS on any log density, one chain after another.

    Args:
        log_density: (D,) -> scalar, up to a constant.
        starts: Start of each chain, (M, D), of finite density.
        num_warmup: As in `nuts`.
        num_draws: As in `nuts`.
        num_chains: M.
        target_accept: As in `nuts`.
        max_tree_depth: As in `nuts`.
        seed: Seed of the transitions.
        progress: Whether to show a progress bar a chain.

    Returns:
        The chains.
    """
    potential = _Potential(log_density)
    with _isolated(seed, starts.device):
        found = []
        for chain in range(num_chains):
            kernel = _Kernel(potential_fn=potential, target_accept_prob=target_accept, max_tree_depth=max_tree_depth)
            kernel.initial_params = {"z": starts[chain].detach().clone()}
            kernel.setup(num_warmup)
            transitions = tqdm(range(num_warmup + num_draws), disable=not progress, desc=f"NUTS, chain {chain + 1}")
            found.append(_run_chain(kernel, transitions, num_warmup))
            kernel.cleanup()
    return ChainState(*(torch.stack(values) for values in zip(*found, strict=True)))


def check_sampler(
    *, num_warmup: int, num_draws: int, num_chains: int, target_accept: float, max_tree_depth: int
) -> None:
    """Refuses settings of the sampler that are out of range."""
    check_count("num_warmup", num_warmup, least=0)
    check_count("num_draws", num_draws, least=1)
    check_count("num_chains", num_chains, least=1)
    check_count("max_tree_depth", max_tree_depth, least=1)
    if not 0 < target_accept < 1:
        raise ValueError(f"target_accept={target_accept!r} is a probability in (0, 1); write 0.8")


class _Kernel(NUTS):
    """Pyro's kernel, which also remembers the energy at which each transition started."""

    def _sample_r(self, name: str) -> Any:
        momenta: Any = super()._sample_r(name)
        self.energy = self._kinetic_energy(momenta[1]) + self._potential_energy_last
        return momenta


def _run_chain(kernel: _Kernel, transitions: Any, num_warmup: int) -> ChainState:
    """One chain's state, without a dimension of chains."""
    mean, kept = 0.0, []
    for step in transitions:
        kernel.sample(kernel.initial_params)  # it goes on from where it is
        if step < num_warmup:
            continue
        # Pyro keeps the mean of the acceptance so far; what each transition added is its own.
        count, before, mean = step - num_warmup + 1, mean, kernel._mean_accept_prob
        accepted = min(max(count * mean - (count - 1) * before, 0.0), 1.0)
        position, potential, _ = kernel._fetch_from_cache()
        z = position["z"].detach()
        kept.append(
            (z, -potential.detach(), z.new_tensor(accepted), kernel.energy.detach(), z.new_tensor(kernel.step_size))
        )
    draws, log_density, acceptance, energy, step_size = (torch.stack(values) for values in zip(*kept, strict=True))
    diverging = torch.zeros(len(draws), dtype=torch.bool, device=draws.device)
    diverging[kernel.diagnostics()["divergences"]] = True
    return ChainState(draws[-1], draws, log_density, acceptance, energy, diverging, step_size)


class _Potential:
    """Minus a log density as Pyro asks for it, its gradient by a recorded graph: Pyro's handlers run once."""

    def __init__(self, log_density: LogDensity) -> None:

        def potential(z: Tensor) -> Tensor:
            return -log_density(z)

        self.slope = Recorded(grad_and_value(potential))

    def __call__(self, params: dict[str, Tensor]) -> Tensor:
        return _Value.apply(params["z"], self.slope)


class _Value(torch.autograd.Function):
    """Value of a function whose gradient comes with it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, slope: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        gradient, value = slope(z.detach())
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None


@contextmanager
def _isolated(seed: int, device: torch.device) -> Iterator[None]:
    """A random stream, a parameter store and validation of the block's own; no handler of the user's sees it."""
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, device))
        stack.enter_context(isolated_store())
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(pyro.poutine.block())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="a step could not be recorded")
        yield


def _choose_starts(
    prior: "LearnedPrior", task: TaskData, log_density: LogDensity, num_chains: int, seed: int
) -> Tensor:
    """A start of finite density for each chain, (M, D), from the prior."""
    learned = {name: prior.params[name] for name in prior.density.prior}
    with torch.no_grad(), seeded(seed, prior.device):
        candidates = replace(prior.density, prior=learned).initial_particles(_CANDIDATES * num_chains, task.data)
    candidates = candidates.to(prior.like)
    return keep_finite(candidates, log_density, num_chains)


def keep_finite(candidates: Tensor, log_density: LogDensity, num_chains: int) -> Tensor:
    """The first M of some starts, (K, D), that have a finite log density and gradient."""
    slope, value = vmap(grad_and_value(log_density))(candidates)
    fine = candidates[value.isfinite() & slope.isfinite().all(1)]
    if len(fine) < num_chains:
        raise ValueError(
            f"only {len(fine)} of {len(candidates)} draws from the prior have a finite log density and gradient, and "
            f'{num_chains} chains need as many; standardise the data, or give sites starts: infer={{"init": draw}}'
        )
    return fine[:num_chains]


def _as_inference(settings: dict[str, Any], prior: "LearnedPrior") -> Inference:
    return Inference(
        init=_refuse_batches,
        update=_refuse_batches,
        sample=chains.sample,
        parameters=lambda dim: {},
        name="nuts",
        config=settings,
        num_particles=settings["num_chains"],
        num_steps=settings["num_warmup"] + settings["num_draws"],
        start=prior.start,
        num_draws=settings["num_draws"],
    )


def _refuse_batches(*arguments: Any) -> NoReturn:
    raise ValueError(
        "nuts runs one task at a time, outside the batch; write nuts(prior, ...) instead of prior.adapt, or "
        "inference=hmc() for many tasks"
    )
