"""Curvatures of a task's log joint density at one point, and how each becomes a positive definite precision.

Those of Gauss-Newton kind split the likelihood into the parameters that the model gives each observation and the
family of distributions: H = -hessian(log prior) + J^T J, with one row of J for each parameter of each observation.
In few-shot learning there are far fewer rows than coordinates, so that `dual` keeps the rows as they are.
"""

from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

from bmaml_ppl.inference.derivatives import equilibrate
from bmaml_ppl.inference.precision import Dense, Diagonal, Dual, Kronecker
from bmaml_ppl.types import LogDensity, Observations, SiteLayout, TaskLogDensity

__all__ = [
    "Arrow",
    "Curvature",
    "Form",
    "Measured",
    "Rows",
    "arrow_prior",
    "diagonal",
    "dual",
    "exact_hessian",
    "few_coordinates",
    "kronecker",
    "likelihood_rows",
    "matrix_shapes",
    "observation_slopes",
    "observed_blocks",
    "measure_curvature",
    "prior_hessian",
    "repair_dense",
    "resolve_curvature",
]

Curvature = Literal["auto", "exact", "ggn", "fisher", "empirical_fisher", "diagonal", "kronecker"]
Form = Literal["auto", "dense", "dual"]
Rows = Literal["ggn", "fisher", "empirical_fisher"]

_DENSE_LIMIT = 128
_SMALL_SITE = 32
_LARGEST_VECTOR = 512
_LARGEST_SCALE = 1e12


class Measured(NamedTuple):
    """A precision at a point, and what had to be done to make it positive definite.

    Attributes:
        precision: One of `bmaml_ppl.inference.precision`.
        repair: By how much the lowest curvature was raised, relative to the scale of its coordinates; 0 where it was
            positive definite.
        flat: A coordinate along which the density does not curve, or -1.
    """

    precision: Any
    repair: Tensor
    flat: Tensor


class Arrow(NamedTuple):
    """Negative Hessian of a log prior whose many coordinates are independent given a few.

    Attributes:
        diagonal: Of the many, (D,); 0 at the few.
        select: Ones that select the few, (D, s).
        couple: Between the many and the few, (D, s); 0 at the few.
        small: Of the few, (s, s).
    """

    diagonal: Tensor
    select: Tensor
    couple: Tensor
    small: Tensor


def exact_hessian(log_density: LogDensity, z: Tensor) -> Tensor:
    """Negative Hessian of the log joint density: (D,) -> (D, D)."""
    return -jacrev(grad(log_density))(z)


def prior_hessian(log_density: TaskLogDensity, z: Tensor) -> Tensor:
    """Negative Hessian of the log prior density: (D,) -> (D, D)."""
    return -jacrev(grad(log_density.log_prior))(z)


def observation_slopes(log_density: TaskLogDensity, z: Tensor) -> dict[str, Tensor]:
    """How each parameter of each row varies with z: observed site -> (R, P, D)."""
    slopes: dict[str, Tensor] = jacrev(
        lambda at: {name: site.eta for name, site in log_density.observations(at).items()}
    )(z)
    return slopes


def likelihood_rows(log_density: TaskLogDensity, z: Tensor, kind: Rows) -> tuple[Tensor, Tensor]:
    """J, (R, D), with J^T J the curvature that the observations add.

    Args:
        log_density: Of one task.
        z: (D,).
        kind: "ggn" takes the Hessian of each observation's negative log-likelihood in the parameters of its family,
            raised to be positive semidefinite where it is not; "fisher" its expectation under the model;
            "empirical_fisher" the outer product of each observation's score.

    Returns:
        J, and by how much a Gauss-Newton block was raised, relative to its size.

    References:
        Martens (2020), New Insights and Perspectives on the Natural Gradient Method, sections 8 and 9; Kunstner,
        Balles and Hennig (2019) on what the empirical Fisher is not.
    """
    slopes = observation_slopes(log_density, z)
    rows, raised = [], [z.new_zeros(())]
    for name, site in log_density.observations(z).items():
        slope = slopes[name]
        if kind == "empirical_fisher":
            rows.append(torch.einsum("rp,rpd->rd", grad(lambda eta: site.log_prob(eta).sum())(site.eta), slope))  # noqa: B023
            continue
        if kind == "fisher":
            root = site.information_root(site.eta)
        else:
            root, excess = _observed_root(site, (slope != 0).any(-1).any(0))
            raised.append(excess)
        rows.append(torch.einsum("rpq,rpd->rqd", root, slope).reshape(-1, len(z)))
    return torch.cat(rows), torch.stack(raised).amax()


def observed_blocks(site: Observations) -> Tensor:
    """Hessian of each row's negative log-likelihood in the parameters of its family, (R, P, P)."""
    score = grad(lambda eta: -site.log_prob(eta).sum())
    # Rows do not mix, so that the slope of the sum over rows holds each row's block.
    blocks = jacrev(lambda eta: score(eta).sum(0))(site.eta).transpose(0, 1)
    return 0.5 * (blocks + blocks.mT)


def _observed_root(site: Observations, active: Tensor) -> tuple[Tensor, Tensor]:
    """S with S S^T the Hessian of each row's negative log-likelihood in the parameters that vary with z, (R, P, P).

    A block with a negative eigenvalue is raised by its size, a multiple of I.
    """
    varies = active.to(site.eta)
    blocks = observed_blocks(site) * varies.unsqueeze(-1) * varies
    size = blocks.detach().abs().amax((-2, -1)).clamp_min(torch.finfo(blocks.dtype).tiny ** 0.5)
    rest = size[:, None, None] * torch.diag(1 - varies)
    lowest = torch.linalg.eigvalsh(torch.nan_to_num(blocks.detach() + rest))[:, 0]
    # Twice, so that what is left of the lowest eigenvalue is its own size and not rounding error.
    shift = torch.where(lowest < 0, -2 * lowest, 0.0) + 4 * torch.finfo(blocks.dtype).eps * size
    padded = blocks + shift[:, None, None] * torch.diag(varies) + torch.diag(1 - varies)
    counts = (site.weight > 0).to(blocks)
    root = torch.linalg.cholesky_ex(padded).L * varies.unsqueeze(-1) * varies
    excess = torch.where(lowest < -1e-6 * size, -lowest / size, 0.0)
    return root * counts[:, None, None], (excess * counts).amax()


def arrow_prior(log_prior: LogDensity, z: Tensor, few: Sequence[int]) -> Arrow:
    """Negative Hessian of the log prior, with few coordinates that all others may depend on: O((s + 1) D)."""
    index = torch.tensor(few, dtype=torch.long, device=z.device)
    select = (torch.arange(len(z), device=z.device).unsqueeze(1) == index).to(z)
    pull = vjp(grad(log_prior), z)[1]
    many = 1 - select.sum(1)
    along = many * pull(-many)[0]
    if not len(few):
        return Arrow(along, select, select, z.new_zeros(0, 0))
    columns = vmap(lambda e: pull(-e)[0])(select.mT)
    small = columns @ select
    return Arrow(along, select, columns.mT - select @ small.mT, small)


def repair_dense(hessian: Tensor, eps: float | None = None) -> Measured:
    """Cholesky factor of a matrix, (D, D), whose eigenvalues at or below a floor are raised to their absolute value.

    Eigenvalues are those in coordinates of equal curvature; the floor, of rounding error's size, is the least that an
    eigenvalue becomes. What is added is a constant to gradients.

    Args:
        hessian: (D, D).
        eps: Relative rounding error of its entries; None is that of its dtype.
    """
    scale = equilibrate(hessian.detach(), _LARGEST_SCALE)
    scaled = scale.unsqueeze(-1) * hessian.detach() * scale
    values, vectors = torch.linalg.eigh(torch.nan_to_num(0.5 * (scaled + scaled.mT)))
    floor = 10 * len(scale) * (torch.finfo(hessian.dtype).eps if eps is None else eps)
    raise_by = torch.where(values < floor, values.abs().clamp_min(floor) - values, 0.0)
    added = (vectors * raise_by) @ vectors.mT / scale.unsqueeze(-1) / scale
    factor = torch.linalg.cholesky_ex(0.5 * (hessian + hessian.mT) + added).L
    lowest = values.abs().argmin()
    direction = vectors.index_select(1, lowest.reshape(1)).squeeze(1)
    flat = torch.where(values.abs().amin() < floor, direction.abs().argmax(), -1)
    return Measured(Dense(factor), raise_by.amax(), flat)


def _raise_diagonal(entries: Tensor, scale: Tensor, among: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries that are not positive raised, with what was added (relative to a scale), and a flat one or -1."""
    tiny = torch.finfo(entries.dtype).tiny
    low = among & (entries.detach() <= tiny)
    floor = torch.finfo(entries.dtype).eps * scale + tiny
    raised = torch.where(low, entries.detach().abs().maximum(floor), entries)
    added = torch.where(low, (raised - entries).detach(), 0.0).amax() / scale.clamp_min(tiny)
    size = torch.where(among, entries.detach().abs(), torch.inf)
    flat = torch.where((size <= tiny).any(), size.argmin(), -1)
    return raised, added, flat


def dual(prior: Arrow, rows: Tensor) -> Measured:
    """The prior's curvature plus J^T J in its dual form: O(R^2 D) time and O(R D) memory for R rows.

    In double precision throughout: the R x R matrix has the condition of the largest prediction over the noise.
    """
    eps = torch.finfo(rows.dtype).eps
    prior, rows = Arrow(*(part.double() for part in prior)), rows.double()
    many = prior.select.sum(1) == 0
    rows_small = rows @ prior.select
    rows_large = rows - rows_small @ prior.select.mT
    scale = (prior.diagonal.abs() + rows_large.square().sum(0)).detach().amax()
    along, added, flat = _raise_diagonal(prior.diagonal, scale, many)
    base = Dual.of(torch.where(many, along, 1.0), rows_large)
    if not prior.small.shape[0]:
        return Measured(base, added, flat)
    couple = prior.couple + rows_large.mT @ rows_small
    solved = base.solve_large(couple)
    schur = repair_dense(prior.small + rows_small.mT @ rows_small - couple.mT @ solved, eps)
    small_flat = prior.select.argmax(0)[schur.flat.clamp_min(0)]
    flat = torch.where(flat >= 0, flat, torch.where(schur.flat >= 0, small_flat, -1))
    precision = base._replace(select=prior.select, couple=solved, schur=schur.precision.factor)
    return Measured(precision, torch.maximum(added, schur.repair), flat)


def diagonal(prior: Arrow, rows: Tensor) -> Measured:
    """The diagonal of the prior's curvature plus J^T J."""
    entries = _prior_diagonal(prior) + rows.square().sum(0)
    return _measure_diagonal(entries)


def _measure_diagonal(entries: Tensor) -> Measured:
    scale = entries.detach().abs().amax()
    raised, added, flat = _raise_diagonal(entries, scale, torch.ones_like(entries, dtype=torch.bool))
    return Measured(Diagonal(raised), added, flat)


def _prior_diagonal(prior: Arrow) -> Tensor:
    return prior.diagonal + prior.select @ prior.small.diagonal() if prior.small.numel() else prior.diagonal


def kronecker(prior: Arrow, rows: Tensor, shapes: Sequence[tuple[int, int]]) -> Measured:
    r"""Block-diagonal Kronecker products, A (x) B for a matrix of parameters, with the prior as factored damping.

    .. math:: A = \sum_r V_r V_r^T / \sqrt t, \quad B = \sum_r V_r^T V_r / \sqrt t, \quad t = \sum_r \|V_r\|^2

    with V_r the r-th row in the parameters' shape. Where V_r is an outer product of a layer's output gradient and its
    input, as for linear layers, this is K-FAC; it needs no hooks in the network. A block that is a vector is whole.

    Args:
        prior: Curvature of the log prior; its mean over a block damps it.
        rows: J, (R, D).
        shapes: (a, b) of each block in the order of z; (a, 1) is a vector.

    References:
        Martens and Grosse (2015), Optimizing Neural Networks with Kronecker-factored Approximate Curvature, sections
        3 and 6.3; Morwani et al. (2024), A New Perspective on Shampoo's Preconditioner, for the sums.
    """
    entries = _prior_diagonal(prior)
    along, added, flat = _raise_diagonal(
        entries, entries.detach().abs().amax(), torch.ones_like(entries, dtype=torch.bool)
    )
    sizes = [a * b for a, b in shapes]
    left, right = [], []
    for (a, b), part, damping in zip(shapes, rows.split(sizes, dim=1), along.split(sizes), strict=True):
        blocks = part.reshape(-1, a, b)
        if b == 1:
            left.append(part.mT @ part + torch.diag(damping))
            right.append(part.new_ones(1, 1))
            continue
        total = (blocks.square().sum() + torch.finfo(part.dtype).tiny ** 0.5).sqrt()
        first = torch.einsum("rab,rcb->ac", blocks, blocks) / total
        second = torch.einsum("rab,rac->bc", blocks, blocks) / total
        balance = sqrt(b / a)
        root = damping.mean().sqrt()
        left.append(first + balance * root * torch.eye(a, dtype=part.dtype, device=part.device))
        right.append(second + root / balance * torch.eye(b, dtype=part.dtype, device=part.device))
    factors = [tuple(torch.linalg.cholesky_ex(block).L for block in side) for side in (left, right)]
    return Measured(Kronecker(*factors), added, flat)


def measure_curvature(
    log_density: LogDensity,
    z: Tensor,
    curvature: Curvature,
    form: Form = "auto",
    sites: Mapping[str, SiteLayout] | None = None,
) -> Measured:
    """The precision of a Laplace approximation at one point.

    Args:
        log_density: Of one task; all but "exact" (and "diagonal", then of the exact Hessian) need a `TaskLogDensity`.
        z: (D,).
        curvature: See `bmaml_ppl.inference.laplace`.
        form: How "ggn", "fisher" and "empirical_fisher" are kept.
        sites: Layout of z; None is one site.

    Raises:
        ValueError: If the log density does not show its observations, or a site has no matrices for "kronecker".
    """
    few = few_coordinates(sites)
    curvature, form = resolve_curvature(log_density, len(z), curvature, form, len(few))
    if curvature == "exact":
        return repair_dense(exact_hessian(log_density, z))
    if not _is_structured(log_density):
        if curvature == "diagonal":
            return _measure_diagonal(exact_hessian(log_density, z).diagonal())
        raise ValueError(f'curvature={curvature!r} needs a Pyro model\'s observations; write curvature="exact"')
    kind: Rows = curvature if curvature in ("ggn", "empirical_fisher") else "fisher"
    rows, raised = likelihood_rows(log_density, z, kind)  # type: ignore[arg-type]
    if curvature in ("ggn", "fisher", "empirical_fisher") and form == "dense":
        measured = repair_dense(prior_hessian(log_density, z) + rows.mT @ rows)  # type: ignore[arg-type]
    else:
        prior = arrow_prior(log_density.log_prior, z, few)  # type: ignore[attr-defined]
        if curvature == "diagonal":
            measured = diagonal(prior, rows)
        elif curvature == "kronecker":
            measured = kronecker(prior, rows, matrix_shapes(sites, len(z)))
        else:
            measured = dual(prior, rows)
    return measured._replace(repair=torch.maximum(measured.repair, raised))


def resolve_curvature(
    log_density: LogDensity, dim: int, curvature: Curvature, form: Form, num_few: int
) -> tuple[Curvature, Form]:
    """What "auto" stands for, for D latent coordinates of which some are of small sites."""
    if curvature == "auto":
        curvature = "exact" if dim <= _DENSE_LIMIT or not _is_structured(log_density) else "fisher"
    if form == "auto":
        form = "dual" if dim > _DENSE_LIMIT and num_few < dim else "dense"
    return curvature, form


def _is_structured(log_density: LogDensity) -> bool:
    return hasattr(log_density, "observations")


def few_coordinates(sites: Mapping[str, SiteLayout] | None) -> list[int]:
    """Coordinates of the small sites, on which the prior of the large ones may depend; none where all are small."""
    if sites is None:
        return []
    small = [site for site in sites.values() if site.stop - site.start <= _SMALL_SITE]
    return [i for site in small for i in range(site.start, site.stop)]


def matrix_shapes(sites: Mapping[str, SiteLayout] | None, dim: int) -> list[tuple[int, int]]:
    """(a, b) of each block of z for `kronecker`."""
    if sites is None:
        return [(dim, 1)]
    found = []
    for name, site in sites.items():
        for shape in site.shapes or ((site.stop - site.start,),):
            a, b = (shape[0], prod(shape[1:])) if len(shape) > 1 else (prod(shape), 1)
            if b == 1 and a > _LARGEST_VECTOR:
                raise ValueError(
                    f'curvature="kronecker" finds a vector of {a} at site {name!r}; say of which matrices it is made, '
                    'pyro.sample(..., infer={"shapes": [(40, 1), (40,), ...]}), or write curvature="fisher"'
                )
            found.append((a, b))
    return found
