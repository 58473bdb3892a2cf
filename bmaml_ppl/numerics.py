"""Precision of a run: where numbers of how many bits are used, and where they would not be safe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from bmaml_ppl.density import Density
from bmaml_ppl.types import Inference, Model

__all__ = ["Precision", "check_precision", "dtype_of", "reduce_matmuls", "tensor_cores"]

Precision = Literal["float32", "tf32", "bf16", "float64"]

_MATMULS: frozenset[Callable[..., Any]] = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, "matmul mm bmm mv einsum tensordot addmm addmv baddbmm addbmm conv1d conv2d conv3d bilinear"),
        (torch, "conv_transpose1d conv_transpose2d conv_transpose3d"),
        (Tensor, "matmul mm bmm mv addmm addmv baddbmm addbmm __matmul__ __rmatmul__"),
    )
    for name in names.split()
)
_LINEAR = torch.nn.functional.linear


def dtype_of(precision: Precision) -> torch.dtype | None:
    """What tasks and meta-parameters are cast to, None where they stay as they are.

    Raises:
        ValueError: If the precision is not known.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r} is not known; choose one of {list(get_args(Precision))}")
    return torch.float64 if precision == "float64" else None


def check_precision(
    precision: Precision, inference: Inference, dim: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuses a precision that the device does not have or with which an algorithm would go wrong.

    Args:
        precision: Asked for.
        inference: Adaptation.
        dim: D, latent coordinates.
        device: Where it runs.
        dtype: Of tasks and meta-parameters.

    Raises:
        ValueError: If the precision is unknown or unsafe here.
    """
    dtype_of(precision)
    if precision not in ("tf32", "bf16"):
        return
    if dtype != torch.float32:
        raise ValueError(
            f'precision="{precision}" is for float32 data, got {dtype}; write tasks.to(dtype=torch.float32), or '
            'precision="float64"'
        )
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f'precision="tf32" is a mode of NVIDIA GPUs, and this run is on {device}; write "float32" or "bf16"'
        )
    if why := _find_unsafe(inference, dim):
        raise ValueError(f'precision="{precision}" is unsafe for {inference.name}: {why}, or precision="float32"')


def _find_unsafe(inference: Inference, dim: int) -> str | None:
    """Why an algorithm needs a log density of more than about three digits, or None."""
    if inference.num_draws or inference.name == "smc":
        return "it accepts or refuses proposals by small differences of log densities; write another inference"
    if inference.implicit or inference.name == "laplace":
        return "it looks for the optimum itself, and rounding moves where the score vanishes; write another inference"
    # Measured with 9 latents in bfloat16: meta-gradients of 10 Newton steps had a cosine of -0.6 to 0.8 with the exact
    # ones, those of adaptive steps 1.0000.
    rule = getattr(inference.update, "keywords", {}).get("rule")
    if rule is not None and rule.kind(dim) in ("curvature", "gauss_newton"):
        return 'Newton\'s steps solve with second derivatives; write preconditioner="adaptive"'
    return None


@contextmanager
def tensor_cores(precision: Precision, device: torch.device) -> Iterator[None]:
    """Lets float32 products of matrices on a GPU run in TF32 (10 bits of mantissa) in the block, for "tf32" alone.

    torch's own setting is global: it is put back at the end, whatever happens. Not run on a GPU yet.
    """
    if precision != "tf32" or device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def reduce_matmuls(density: Density, precision: Precision) -> Density:
    """The same density with the products of matrices in the model itself in bfloat16, for "bf16" alone.

    Factors are rounded to 8 bits of mantissa, sums run in float32 on hardware that has such products, and results
    are float32 again. Log densities, kernels, factorisations and the optimiser stay float32.
    """
    if precision != "bf16":
        return density
    return replace(density, model=_Reduced(density.model))


@dataclass(frozen=True)
class _Reduced:
    """A model whose products of float32 matrices, outside its distributions, are in bfloat16."""

    model: Model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = _ReducedMatmuls()
        with mode, _ExactDistributions(mode):
            return self.model(*args, **kwargs)


class _ExactDistributions(Messenger):
    """Pauses the mode within sample statements, where log-probabilities and draws are computed."""

    def __init__(self, mode: "_ReducedMatmuls") -> None:
        super().__init__()
        self.mode = mode

    # Entered last, so that it sees a message before, and what became of it after, all other handlers.
    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        self.mode.paused += 1

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.mode.paused -= 1


class _ReducedMatmuls(TorchFunctionMode):
    """Casts factors of products down and the result back; gradients pass through the casts, and are reduced as well."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or (func not in _MATMULS and func is not _LINEAR):
            return func(*args, **kwargs)
        if func is _LINEAR:
            return _linear(*args, **kwargs)
        result = func(*tree_map(_down, args), **tree_map(_down, kwargs))
        return result.float() if result.dtype == torch.bfloat16 else result


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in bfloat16, the sum with the bias in float32."""
    product = torch.nn.functional.linear(_down(input), _down(weight))
    product = product.float() if product.dtype == torch.bfloat16 else product
    return product if bias is None else product + bias


def _down(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.to(torch.bfloat16)
    return value
