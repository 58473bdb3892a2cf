"""What models ask of their inputs and outcomes."""

import torch
from torch import Tensor

__all__ = ["as_columns", "as_floating", "check_output"]


def as_floating(x: Tensor) -> Tensor:
    """Whole numbers as numbers of the default precision; others as they are."""
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def as_columns(x: Tensor, width: int) -> Tensor:
    """Inputs of a network as floating columns, (N, width); a vector counts as one column.

    Raises:
        ValueError: If x has another shape.
    """
    columns = x.unsqueeze(-1) if x.ndim == 1 else x
    if columns.ndim != 2 or columns.shape[1] != width:
        allowed = f"(N, {width})" + (" or (N,)" if width == 1 else "")
        raise ValueError(f"x has shape {tuple(x.shape)}, but the network takes {allowed}")
    return as_floating(columns)


def check_output(mean: Tensor, y: Tensor | None) -> None:
    """Refuses an outcome y that has another shape than its mean, and would broadcast.

    Raises:
        ValueError: Says both shapes.
    """
    if y is not None and y.shape != mean.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}, but the network's output is {tuple(mean.shape)}; give that")
