"""The log density of one task with its meta-parameters and data bound, and what it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bmaml_ppl.density import Density
from bmaml_ppl.families import Family, read_family
from bmaml_ppl.handlers import is_factor
from bmaml_ppl.types import Tensors

__all__ = ["TaskDensity"]


# Without a repr of its tensors: vmap writes out the name of what it maps at every call, which cannot be recorded.
@dataclass(frozen=True, eq=False, repr=False)
class TaskDensity:
    """A function of z, (D,), alone: what inference algorithms consume; see `bmaml_ppl.types.TaskLogDensity`.

    Attributes:
        density: Log density of a task.
        prior: Meta-parameters, constrained.
        data: One task's data as the model sees them; outputs may be None where no likelihood is asked for.
        mask: Real observations, or None where all are.
    """

    density: Density
    prior: Tensors
    data: Mapping[str, Tensor | None]
    mask: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Log joint density: (D,) -> scalar."""
        return self.density.log_joint(z, self.prior, self.data, self.mask)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log prior density with the log-Jacobian of the change of variables: (D,) -> scalar."""
        return self.density.log_prior(z, self.prior, self.data)

    def log_parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prior` and `log_likelihood` in one run of the model: (D,) -> two scalars."""
        return self.density.log_parts(z, self.prior, self.data, self.mask)

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log-likelihood of all observations: (D,) -> scalar."""
        sites = self.density.log_likelihood(z, self.prior, self.data, self.mask)
        return torch.stack([value.sum() for value in sites.values()]).sum()

    def observations(self, z: Tensor) -> dict[str, Family]:
        """The observed sites at z, each as a function of its rows' parameters."""
        records = self.density.observe(z, self.prior, self.data, self.mask)
        found = {}
        for name, record in records.items():
            if name not in self.density.sites:
                found[name] = read_family(name, record, self._weight(name, record.fn, z))
        return found

    def _weight(self, name: str, fn: object, like: Tensor) -> Tensor:
        """1 at real observations and 0 at padded ones, of the site's batch shape."""
        shape = torch.Size() if is_factor(fn) else fn.batch_shape  # type: ignore[attr-defined]
        dim = self.density.plate_dims[name]
        if self.mask is None or dim is None:
            return like.new_ones(shape)
        return self.mask.reshape(self.mask.shape + (1,) * (-1 - dim)).to(like).expand(shape)
