"""Standardisation that travels beside the data and is applied at the model's door."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Scaling"]

Value = TypeVar("Value", Tensor, Tensor | None)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Affine units of named tensors: `scaled = (raw - loc) / scale`.

    Args:
        loc: Name to centre, in raw units, of the column's trailing component shape `(...)` (no task, no
            observation dims).
        scale: Name to strictly positive width, in raw units, same names and shapes as `loc`.

    Raises:
        ValueError: The names or shapes of `loc` and `scale` differ, or a value is not finite, or a scale is
            not positive.
    """

    loc: dict[str, Tensor]
    scale: dict[str, Tensor]

    def __post_init__(self) -> None:
        if set(self.loc) != set(self.scale):
            raise ValueError(
                f"loc and scale must name the same columns, got {sorted(self.loc)} and {sorted(self.scale)}"
            )
        for name, loc in self.loc.items():
            scale = self.scale[name]
            if loc.shape != scale.shape:
                raise ValueError(
                    f"column {name!r}: loc has shape {tuple(loc.shape)} but scale {tuple(scale.shape)}; give "
                    "equal shapes"
                )
            if not (bool(torch.isfinite(loc).all()) and bool((torch.isfinite(scale) & (scale > 0)).all())):
                raise ValueError(
                    f"column {name!r}: loc must be finite and scale positive; write 1 for a constant column"
                )

    def apply(self, tensors: Mapping[str, Value]) -> dict[str, Value]:
        """Standardises the known names; other names and None values pass through unchanged.

        Args:
            tensors: Name to raw tensor `(..., *components)` with any leading dims.

        Returns:
            Name to tensor of the same shape and device, in units of the column's standard deviation.

        Raises:
            ValueError: The trailing dims of a known tensor are not those the scaling was fitted on.
        """
        return {
            name: self._scale(name, tensor) if tensor is not None and name in self.loc else tensor
            for name, tensor in tensors.items()
        }

    def undo(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a standardised tensor `(..., *components)` of a column to raw units; unknown names pass.

        Raises:
            ValueError: The trailing dims of the tensor are not those the scaling was fitted on.
        """
        if name not in self.loc:
            return tensor
        loc, scale = self._fit_to(name, tensor)
        return tensor * scale + loc

    def log_factor(self, name: str, shape: torch.Size, like: Tensor, batch_shape: torch.Size) -> Tensor:
        """Log of the factor by which standardisation raised the densities of a column's values; 0 for unknown names.

        Args:
            name: Of the column.
            shape: Of the column's values in one task.
            like: A tensor of the wanted dtype and device.
            batch_shape: Of the densities in one task: each belongs to as many values as make up the rest of `shape`.

        Returns:
            Of shape `batch_shape`, or a scalar.
        """
        if name not in self.scale:
            return like.new_zeros(())
        every = self.scale[name].to(like).log().expand(shape)
        return every.reshape(*batch_shape, -1).sum(-1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Scaling":
        """Returns a copy on another device and / or in another floating dtype."""
        return Scaling(
            {name: value.to(device=device, dtype=dtype) for name, value in self.loc.items()},
            {name: value.to(device=device, dtype=dtype) for name, value in self.scale.items()},
        )

    def state(self) -> dict[str, Tensor]:
        """Returns one flat dict `loc.NAME`, `scale.NAME` of tensors, ready for safetensors."""
        return {
            **{f"loc.{name}": value for name, value in self.loc.items()},
            **{f"scale.{name}": value for name, value in self.scale.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Scaling":
        """Rebuilds a scaling from what `state` returned.

        Raises:
            ValueError: A key is neither `loc.NAME` nor `scale.NAME`, or one of the two is missing.
        """
        fields: dict[str, dict[str, Tensor]] = {"loc": {}, "scale": {}}
        for key, value in state.items():
            field, dot, name = key.partition(".")
            if not dot or field not in fields:
                raise ValueError(f"got key {key!r} in a scaling's state; allowed are 'loc.NAME' and 'scale.NAME'")
            fields[field][name] = value
        return cls(**fields)

    def _scale(self, name: str, tensor: Tensor) -> Tensor:
        loc, scale = self._fit_to(name, tensor)
        return (tensor - loc) / scale

    def _fit_to(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.loc[name], self.scale[name]
        if tensor.shape[max(tensor.ndim - loc.ndim, 0) :] != loc.shape:
            raise ValueError(
                f"column {name!r} was standardised with trailing shape {tuple(loc.shape)}, got a tensor of "
                "shape "
                f"{tuple(tensor.shape)}; give the same components in the last dims"
            )
        dtype = tensor.dtype if tensor.is_floating_point() else loc.dtype
        return loc.to(tensor.device, dtype), scale.to(tensor.device, dtype)
