"""Recording and compilation of a step: Pyro's handlers and `torch.func`'s interpreters run once, plain tensor code
after, or machine code made from it."""

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bmaml_ppl.graph_passes import share_gram_gradients, spare_eigenvectors

__all__ = [
    "Compile",
    "CompileFailed",
    "Mode",
    "Recorded",
    "choose_adapting",
    "choose_mode",
    "describe_layout",
    "difference",
    "lower",
    "record_graph",
    "refill",
    "tolerance",
    "warn_of_failure",
]

Compile = Literal["auto"] | bool
Mode = Literal["eager", "recorded", "compiled"]

_WORTH_RECORDING = 20
"""Meta-steps from which recording (about as long as ten eager ones) earns its time back."""

_WORTH_COMPILING = 20_000
"""Adaptation steps of a batch from which compilation earns its time back: it takes as long as some thousand recorded
steps the first time, and a tenth of that once the machine has compiled the same before."""

_WORTH_COMPILING_PARTS = 2000
"""The same where a step is one of as many tasks as memory allows, without gradients."""

_OPTIONS = {"fallback_random": True, "realize_opcount_threshold": 8, "cpp.enable_loop_tail_vec": False}
"""Of torch's inductor: draws from torch's own generators; no long expressions written out wherever they are used, which
compiles a whitened SVGD step in 8 seconds instead of 39, and runs as fast; and no vectors along dimensions shorter than
one, for which it starts its threads anew for each short sum, so that HMC of 4 latents takes 12 times as long."""


class CompileFailed(UserWarning):
    """A recorded step could not be compiled, or computed something else when it was, and runs as it was recorded."""


def choose_mode(compile: Compile, num_steps: int, num_inner_steps: int) -> Mode:
    """How a run of so many meta-steps, of so many adaptation steps each, computes."""
    if compile not in ("auto", True, False):
        raise ValueError(f'compile={compile!r} is not known; choose "auto", True or False')
    if compile != "auto":
        return "compiled" if compile else "eager"
    if num_steps < _WORTH_RECORDING:
        return "eager"
    return "compiled" if num_steps * max(num_inner_steps, 1) >= _WORTH_COMPILING else "recorded"


def choose_adapting(compile: Compile, num_steps: int) -> Mode | None:
    """How an adaptation of so many steps of parts of tasks computes; None is recorded where it pays."""
    if compile == "auto":
        return "compiled" if num_steps >= _WORTH_COMPILING_PARTS else None
    return choose_mode(compile, 0, 0)


class Recorded:
    """A pure function of nested tensors that is recorded as a graph on its first call with each layout.

    The graph computes what the function does, operation by operation; random draws are recorded as draws. It can be
    differentiated once. A function that cannot be recorded runs as it is, after one warning.

    Args:
        function: Takes and returns nested containers of tensors.
        mode: "recorded", or "compiled" to machine code, once for each layout and each choice of the arguments
            that need gradients. A graph that cannot be compiled, or that has other values or gradients when it was,
            runs as it was recorded, after one warning.

    Attributes:
        graphs: Graph and layout of the result by layout of the arguments, None where recording failed.
        interpreted: Whether a recorded graph, where no gradient is taken and all is on the CPU, runs in
            TorchScript's interpreter, which calls small operations about four times as fast as Python does.
        num_nodes: Operations that graphs have run so far; where gradients are taken they count three times.
    """

    def __init__(self, function: Callable[..., Any], mode: Mode = "recorded") -> None:
        self.function, self.mode = function, mode
        self.graphs: dict[Any, tuple[GraphModule, Any] | None] = {}
        self.interpreted = mode == "recorded"
        self.num_nodes = 0
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns for these arguments."""
        leaves, layout = tree_flatten(arguments)
        # A graph holds for the strides it was recorded with.
        leaves = [None if x is None else x.contiguous() for x in leaves]
        key = describe_layout(leaves, layout)
        if key not in self.graphs:
            self.graphs[key] = self._record(leaves, layout)
        recorded = self.graphs[key]
        if recorded is None:
            return self.function(*arguments)
        graph, result_layout = recorded
        given = [x for x in leaves if x is not None]
        program = self._choose_program(key, graph, given)
        return tree_unflatten(program(*given), result_layout)

    def _choose_program(self, key: Any, graph: GraphModule, given: list[Tensor]) -> Callable[..., Any]:
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        self.num_nodes += len(graph.graph.nodes) * (3 if differentiable else 1)
        if self.mode == "compiled":
            key = (key, tuple(x.requires_grad for x in given) if differentiable else ())
            if key not in self._programs:
                self._programs[key] = _lower_or_warn(graph, given)
        elif self.interpreted and not torch.is_grad_enabled() and all(x.device.type == "cpu" for x in given):
            if key not in self._programs:
                self._programs[key] = _interpret(graph, given)
        else:
            return graph
        return self._programs[key]

    def _record(self, leaves: list[Tensor | None], layout: Any) -> tuple[GraphModule, Any] | None:
        found: list[Any] = []

        def flat(*values: Tensor) -> list[Tensor]:
            results, result_layout = tree_flatten(self.function(*refill(values, leaves, layout)))
            found.append(result_layout)
            return results

        try:
            return record_graph(flat, _distinct(leaves)), found[0]
        except Exception as error:  # any failure to record must leave the eager result standing
            warnings.warn(
                f"a step could not be recorded and runs eagerly ({type(error).__name__}: {error}); "
                "write compile=False to silence this",
                stacklevel=4,
            )
            return None


def describe_layout(leaves: Sequence[Tensor | None], layout: TreeSpec) -> Any:
    """What calls with flat arguments must have in common to share a recording."""
    return layout, tuple(None if x is None else (x.shape, x.dtype, x.device) for x in leaves)


def refill(values: Iterable[Tensor], leaves: Sequence[Tensor | None], layout: TreeSpec) -> Any:
    """Nested arguments of these tensors, laid out as others that were flattened to `leaves`."""
    given = iter(values)
    return tree_unflatten([None if x is None else next(given) for x in leaves], layout)


def record_graph(function: Callable[..., Any], given: list[Tensor]) -> GraphModule:
    """Records a function of tensors, which returns a list of tensors, as a graph of aten operations."""
    # The run that is recorded must not use up draws: the graph's first run is to draw what it drew.
    with _quiet(given):
        graph = make_fx(function)(*given)
    graph.graph.eliminate_dead_code()
    share_gram_gradients(graph.graph)
    graph.recompile()
    return graph


def lower(graph: GraphModule, given: list[Tensor]) -> Callable[..., list[Tensor]]:
    """Compiles a graph by torch's inductor, with its gradient where some arguments need one.

    Draws come from torch's generators in the same order as in the graph itself. What was compiled before, in
    this process or another, is found in inductor's cache.

    Raises:
        Exception: Whatever the compiler raises; a missing C++ compiler is the usual one.
    """
    from torch._inductor import compile as compile_graph
    from torch._inductor import config

    given = [x.detach().requires_grad_(x.requires_grad and torch.is_grad_enabled()) for x in given]
    differentiable = any(x.requires_grad for x in given)
    with _quiet(given), config.patch({k: v for k, v in _OPTIONS.items() if _is_known(config, k)}):
        try:
            program = compile_graph(_copy(graph, differentiable), [*given])
        except Exception as error:
            # A process that was killed while it compiled leaves an empty file in inductor's cache, for ever.
            cut_short = re.findall(r"(/\S+\.so): file too short", str(error))
            if not cut_short:
                raise
            Path(cut_short[0]).unlink(missing_ok=True)
            program = compile_graph(_copy(graph, differentiable), [*given])
        # The gradient is compiled when it is first asked for: now, so that its failure is met here.
        if sources := [x for x in given if x.requires_grad]:
            results = [x for x in program(*given) if x.requires_grad]
            torch.autograd.grad(results, sources, [torch.zeros_like(x) for x in results], allow_unused=True)

    def run(*values: Tensor) -> list[Tensor]:
        return list(program(*values))

    return run


def _is_known(config: Any, option: str) -> bool:
    """Whether this torch has an option; those it has not are for speed alone."""
    try:
        attrgetter(option)(config)
    except AttributeError:
        return False
    return True


def _copy(graph: GraphModule, differentiable: bool) -> GraphModule:
    """A graph to be rewritten, without what recordings of their own said of its values."""
    copied = copy.deepcopy(graph)
    for node in copied.graph.nodes:
        node.meta.clear()
    if not differentiable and spare_eigenvectors(copied.graph):
        copied.recompile()
    return copied


def _lower_or_warn(graph: GraphModule, given: list[Tensor]) -> Callable[..., Any]:
    """The compiled graph, or the graph itself where compilation fails or makes something else of it."""
    try:
        program = lower(graph, given)
        (values, slopes), (wanted, wanted_slopes) = (_try_out(each, given) for each in (program, graph))
        # A step may magnify rounding errors, and its gradient more so.
        apart = max(difference(values, wanted), difference(slopes, wanted_slopes) / 5)
        if not apart <= tolerance(wanted):
            warn_of_failure(f"what was compiled differs by {apart:.1e}")
            return graph
    except Exception as error:  # any failure to compile must leave the recorded result standing
        warn_of_failure(error)
        return graph
    return program


def _try_out(function: Callable[..., Sequence[Tensor]], given: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a function of tensors returns for these, and the gradients of a weighted sum of that, where needed."""
    given = [x.detach().requires_grad_(x.requires_grad and torch.is_grad_enabled()) for x in given]
    sources = [x for x in given if x.requires_grad]
    with _quiet(given):
        values = list(function(*given))
    results = [x for x in values if x.requires_grad] if sources else []
    if not results:
        return values, []
    weights = [torch.arange(x.numel(), device=x.device).cos().reshape(x.shape).to(x.dtype) for x in results]
    return values, list(torch.autograd.grad(results, sources, weights, materialize_grads=True, allow_unused=True))


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Norm of the difference over that of what is wanted, or the share of whole numbers that differ if that is more.

    What is not finite in the wanted numbers is left out; infinite where another number found is not.
    """
    whole = [(got != want).double().mean().item() for got, want in _pairs(found, wanted, False) if want.numel()]
    real = _pairs(found, wanted, True)
    if not real:
        return max(whole, default=0.0)
    got, want = (torch.cat([x.flatten() for x in xs]) for xs in zip(*real, strict=True))
    fine = want.isfinite()
    got, want = got[fine], want[fine]
    if not got.isfinite().all():
        return inf
    size = want.norm().clamp_min(torch.finfo(want.dtype).eps ** 0.5)
    return max([((got - want).norm() / size).item(), *whole])


def _pairs(found: Sequence[Tensor], wanted: Sequence[Tensor], floating: bool) -> list[tuple[Tensor, Tensor]]:
    return [(x, y) for x, y in zip(found, wanted, strict=True) if y.is_floating_point() == floating]


def tolerance(wanted: Sequence[Tensor]) -> float:
    """Difference that rounding may make between two programs for the same numbers."""
    return 1e-7 if all(x.dtype == torch.float64 for x in wanted if x.is_floating_point()) else 2e-3


def warn_of_failure(error: Exception | str) -> None:
    """Says once that what was to be compiled runs as it was recorded."""
    if isinstance(error, CompileFailed):
        warnings.warn(error, stacklevel=3)
        return
    lines = str(error).strip().splitlines() or [""]
    needs = "Compilation needs a C++ compiler (g++ or clang), and Triton on a GPU. "
    why = f"{lines[0]}. " if isinstance(error, str) else f"{type(error).__name__}: {lines[0]}. {needs}"
    warnings.warn(
        f"what was to be compiled runs slower, as it was recorded: {why}To silence this, write "
        'warnings.filterwarnings("ignore", category=bmaml_ppl.compile.CompileFailed)',
        CompileFailed,
        stacklevel=2,
    )


@contextmanager
def _quiet(given: list[Tensor]) -> Iterator[None]:
    """Leaves generators as they were, and keeps torch's own warnings back."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=list({x.device for x in given if x.device.type == "cuda"})))
        yield


def _distinct(leaves: list[Tensor | None]) -> list[Tensor]:
    """The tensors, with a copy for each that is there twice: recording tells its inputs apart by identity alone."""
    seen: set[int] = set()
    found = []
    for leaf in leaves:
        if leaf is not None:
            found.append(leaf.clone() if id(leaf) in seen else leaf)
            seen.add(id(leaf))
    return found


def _interpret(graph: GraphModule, given: list[Tensor]) -> Callable[..., Any]:
    """The graph in TorchScript, or as it is where that fails or there is nothing to trace."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            program: Callable[..., Any] = torch.jit.trace(graph, tuple(given), check_trace=False)
    except Exception:  # an aid to speed alone: the graph is as good
        return graph
    return program
