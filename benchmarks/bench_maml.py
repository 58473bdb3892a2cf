"""Second-order MAML beside higher, TorchOpt, torch.func and jax by hand.

25 sinusoid tasks of K = 10 support and 10 query points, network 1-40-40-1 (D = 1761), 5 full-batch inner steps of 0.01
on the mean squared error, gradient of the mean query error. In the library the same is `map_estimate` and
`query_nll("mean")` of a Pyro model with a flat prior and unit noise: its log-likelihood is the squared error times
-K / 2, so that its step size is 0.01 * 2 / K and its gradient K / 2 times the others', which is divided out. All
variants must return the same gradient. Their runs are interleaved; ratios are medians of ratios within a round.

    python -m benchmarks.bench_maml [--rounds 15] [--quick] [--out benchmarks/results/maml.json]
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional

from benchmarks.frame import describe, interleave, make_parser, start, summarise, write
from benchmarks.paper_job import SEED, Ours
from benchmarks.peers_jax import maml
from benchmarks.peers_torch import higher_maml, torch_func_maml, torchopt_maml
from bmaml_ppl.adaptation import Adapter
from bmaml_ppl.compile import Mode
from bmaml_ppl.datasets.sinusoid import sinusoid
from bmaml_ppl.density import from_model
from bmaml_ppl.inference import map_estimate
from bmaml_ppl.objectives import query_nll
from bmaml_ppl.outer import Views, episode_views

SIZES, NUM_TASKS, NUM_SUPPORT, NUM_STEPS, STEP_SIZE = (1, 40, 40, 1), 25, 10, 5, 0.01
SHAPES = [shape for d_in, d_out in pairwise(SIZES) for shape in ((d_out, d_in), (d_out,))]
LENGTHS = [torch.Size(shape).numel() for shape in SHAPES]
OURS, BASE = "bmaml_ppl compiled", "jax by hand"


def network(x: Tensor, y: Tensor | None = None) -> None:
    """A task whose latents are a network's weights, under a flat prior."""
    flat = dist.ImproperUniform(constraints.real_vector, (), (sum(LENGTHS),))
    parts = iter(pyro.sample("weights", flat).split(LENGTHS))
    hidden = x[:, None]
    for layer, (d_in, d_out) in enumerate(pairwise(SIZES)):
        hidden = functional.linear(hidden, next(parts).reshape(d_out, d_in), next(parts))
        hidden = hidden.relu() if layer + 2 < len(SIZES) else hidden
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(hidden[:, 0], 1.0), obs=y)


def ours(mode: Mode, weights: Tensor, views: Views) -> Ours:
    density = from_model(network, {key: value[0] for key, value in views[0].data.items()})
    units = NUM_SUPPORT / 2
    inference = map_estimate(num_steps=NUM_STEPS, step_size=STEP_SIZE / units, preconditioner="none", init="free")
    adapter = Adapter(density, inference, "free", mode=mode)
    return Ours(adapter, query_nll("mean"), weights[None], views, scale=1 / units)


def make_variants() -> dict[str, Callable[[], Any]]:
    tasks = sinusoid(NUM_TASKS, 2 * NUM_SUPPORT, seed=SEED).tasks
    views = episode_views(tasks.split_observations(NUM_SUPPORT))
    data = [view.data[key] for view in views[:2] for key in ("x", "y")]
    weights = 0.2 * torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(SEED))
    job = (SIZES, NUM_STEPS, STEP_SIZE, weights)
    return {
        "higher": higher_maml(*job, *data),
        "TorchOpt": torchopt_maml(*job, *data),
        "torch.func by hand": torch_func_maml(*job, *data),
        BASE: maml(*job, *data),
        "bmaml_ppl eager": ours("eager", weights, views),
        "bmaml_ppl recorded": ours("recorded", weights, views),
        OURS: ours("compiled", weights, views),
    }


def main() -> None:
    options = make_parser(__doc__, "maml", rounds=15).parse_args()
    rounds = 3 if options.quick else options.rounds
    variants = make_variants()
    first = start(variants, BASE)
    rows = summarise(interleave(variants, rounds, repeats=5), OURS)
    write(options.out, describe(seed=SEED, rounds=rounds, quick=options.quick), [r | first[r["variant"]] for r in rows])


if __name__ == "__main__":
    main()
