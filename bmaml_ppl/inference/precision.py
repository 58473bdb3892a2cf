"""Representations of a Gaussian's precision matrix that never need it whole: solve, draw, log det.

All are for one D-dimensional Gaussian; `vmap` batches them.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Dense", "Diagonal", "Dual", "Kronecker", "Precision", "mahalanobis"]


class Precision(Protocol):
    """A positive definite precision matrix H."""

    def multiply(self, v: Tensor) -> Tensor:
        """H v, (D,)."""

    def solve(self, v: Tensor) -> Tensor:
        """H^-1 v, (D,)."""

    def colour(self, noise: Tensor) -> Tensor:
        """A draw from N(0, H^-1), (D,), from standard normal noise of `noise_dim` entries."""

    def log_det(self) -> Tensor:
        """Log determinant of H, a scalar."""

    @property
    def noise_dim(self) -> int:
        """Entries of the noise that a draw takes."""


def mahalanobis(precision: Precision, v: Tensor) -> Tensor:
    """v^T H v, a scalar."""
    return v @ precision.multiply(v)


class Dense(NamedTuple):
    """H = L L^T.

    Attributes:
        factor: L, lower triangular, (D, D).
    """

    factor: Tensor

    @property
    def noise_dim(self) -> int:
        """Entries of the noise that a draw takes."""
        return self.factor.shape[-1]

    def multiply(self, v: Tensor) -> Tensor:
        """H v, (D,)."""
        return self.factor @ (self.factor.mT @ v)

    def solve(self, v: Tensor) -> Tensor:
        """H^-1 v, (D,)."""
        return torch.cholesky_solve(v.unsqueeze(-1), self.factor).squeeze(-1)

    def colour(self, noise: Tensor) -> Tensor:
        """A draw from N(0, H^-1), (D,), from standard normal noise."""
        return torch.linalg.solve_triangular(self.factor.mT, noise.unsqueeze(-1), upper=True).squeeze(-1)

    def log_det(self) -> Tensor:
        """Log determinant of H, a scalar."""
        return 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class Diagonal(NamedTuple):
    """H = diag(d).

    Attributes:
        diagonal: d, (D,).
    """

    diagonal: Tensor

    @property
    def noise_dim(self) -> int:
        """Entries of the noise that a draw takes."""
        return self.diagonal.shape[-1]

    def multiply(self, v: Tensor) -> Tensor:
        """H v, (D,)."""
        return self.diagonal * v

    def solve(self, v: Tensor) -> Tensor:
        """H^-1 v, (D,)."""
        return v / self.diagonal

    def colour(self, noise: Tensor) -> Tensor:
        """A draw from N(0, H^-1), (D,), from standard normal noise."""
        return noise * self.diagonal.rsqrt()

    def log_det(self) -> Tensor:
        """Log determinant of H, a scalar."""
        return self.diagonal.log().sum(-1)


class Dual(NamedTuple):
    r"""A diagonal plus R rows, in R x R matrices, with a few coordinates that couple to all others.

    .. math:: H = \begin{pmatrix} G & K \\ K^T & A \end{pmatrix}, \quad G = \mathrm{diag}(c) + J^T J

    on many coordinates w and s few u. G is solved by the Woodbury identity, its determinant is that of R x R by the
    determinant lemma, and u is left to its s x s Schur complement S = A - K^T G^-1 K: O(R^2 D + R s D) time and
    O((R + s) D) memory. It may be kept in higher precision than the vectors that it multiplies. All tensors have D
    coordinates, with zeros (ones in c) at those that are not theirs.

    Attributes:
        diagonal: c, (D,); 1 at u.
        rows: J, (R, D); 0 at u.
        factor: Cholesky factor of I + J diag(c)^-1 J^T, (R, R).
        select: Ones that select u, (D, s).
        couple: G^-1 K, (D, s); 0 at u.
        schur: Cholesky factor of S, (s, s).

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, appendix A.3; Immer, Korzepa and
        Bauer (2021), Improving predictions of Bayesian neural nets via local linearization, section 3, for the
        network as its dual Gaussian process.
    """

    diagonal: Tensor
    rows: Tensor
    factor: Tensor
    select: Tensor
    couple: Tensor
    schur: Tensor

    @classmethod
    def of(cls, diagonal: Tensor, rows: Tensor) -> "Dual":
        """diag(c) + J^T J alone, without coordinates that couple to all."""
        inner = torch.eye(len(rows), dtype=rows.dtype, device=rows.device) + (rows / diagonal) @ rows.mT
        none = diagonal.new_zeros(len(diagonal), 0)
        return cls(diagonal, rows, torch.linalg.cholesky_ex(inner).L, none, none, diagonal.new_zeros(0, 0))

    @property
    def noise_dim(self) -> int:
        """Entries of the noise that a draw takes."""
        return self.rows.shape[-1] + self.rows.shape[-2]

    def _others(self, v: Tensor) -> Tensor:
        return v - self.select @ (self.select.mT @ v)

    def solve_large(self, v: Tensor) -> Tensor:
        """G^-1 v for v without entries at u, (D,) or (D, k)."""
        wide = v if v.dim() == 2 else v.unsqueeze(-1)
        scaled = wide / self.diagonal.unsqueeze(-1)
        inner = torch.cholesky_solve(self.rows @ scaled, self.factor)
        solved = scaled - (self.rows.mT @ inner) / self.diagonal.unsqueeze(-1)
        return solved if v.dim() == 2 else solved.squeeze(-1)

    def multiply(self, v: Tensor) -> Tensor:
        """H v, (D,)."""
        given, v = v, v.to(self.rows)
        u, w = self.select.mT @ v, self._others(v)
        # In terms of what is kept: K = G (G^-1 K), A = S + K^T G^-1 K.
        lifted = w + self.couple @ u
        large = self.diagonal * lifted + self.rows.mT @ (self.rows @ lifted)
        small = self.schur @ (self.schur.mT @ u) + self.couple.mT @ large
        return (large + self.select @ small).to(given)

    def solve(self, v: Tensor) -> Tensor:
        """H^-1 v, (D,)."""
        given, v = v, v.to(self.rows)
        base = self.solve_large(self._others(v))
        u = self._solve_small(self.select.mT @ v - self.couple.mT @ self._others(v))
        return (base + self.select @ u - self.couple @ u).to(given)

    def _solve_small(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v.unsqueeze(-1), self.schur).squeeze(-1) if len(v) else v

    def colour(self, noise: Tensor) -> Tensor:
        """A draw from N(0, H^-1), (D,), from standard normal noise."""
        dim = self.rows.shape[-1]
        given, noise = noise, noise.to(self.rows)
        first, second = noise[:dim], noise[dim:]
        # Matheron's rule: a draw from the diagonal Gaussian, corrected by its own error at the rows.
        free = self._others(first) * self.diagonal.rsqrt()
        inner = torch.cholesky_solve((self.rows @ free + second).unsqueeze(-1), self.factor).squeeze(-1)
        w = free - (self.rows.mT @ inner) / self.diagonal
        small = (self.select.mT @ first).unsqueeze(-1)
        u = torch.linalg.solve_triangular(self.schur.mT, small, upper=True).squeeze(-1) if len(small) else small[:, 0]
        return (w + self.select @ u - self.couple @ u).to(given)

    def log_det(self) -> Tensor:
        """Log determinant of H, a scalar."""
        return (
            self.diagonal.log().sum(-1)
            + 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            + 2 * self.schur.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        )


class Kronecker(NamedTuple):
    """A block-diagonal matrix whose blocks are Kronecker products, one after another in z.

    Attributes:
        left: Cholesky factor of each block's left matrix, (a, a).
        right: Of its right matrix, (b, b); the block, of a * b coordinates in row-major order, is their product.

    Reference:
        Martens and Grosse (2015), Optimizing Neural Networks with Kronecker-factored Approximate Curvature, section
        6.6; Ritter, Botev and Barber (2018), A Scalable Laplace Approximation for Neural Networks.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]

    @property
    def noise_dim(self) -> int:
        """Entries of the noise that a draw takes."""
        return sum(a.shape[-1] * b.shape[-1] for a, b in zip(self.left, self.right, strict=True))

    def _blocks(self, v: Tensor) -> list[Tensor]:
        sizes = [(a.shape[-1], b.shape[-1]) for a, b in zip(self.left, self.right, strict=True)]
        parts = v.split([a * b for a, b in sizes])
        return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]

    def multiply(self, v: Tensor) -> Tensor:
        """H v, (D,)."""
        blocks = zip(self.left, self.right, self._blocks(v), strict=True)
        return torch.cat([(a @ (a.mT @ x) @ b @ b.mT).reshape(-1) for a, b, x in blocks])

    def solve(self, v: Tensor) -> Tensor:
        """H^-1 v, (D,)."""
        blocks = zip(self.left, self.right, self._blocks(v), strict=True)
        solved = [torch.cholesky_solve(torch.cholesky_solve(x, a).mT, b).mT for a, b, x in blocks]
        return torch.cat([x.reshape(-1) for x in solved])

    def colour(self, noise: Tensor) -> Tensor:
        """A draw from N(0, H^-1), (D,), from standard normal noise."""
        drawn = []
        for a, b, x in zip(self.left, self.right, self._blocks(noise), strict=True):
            half = torch.linalg.solve_triangular(a.mT, x, upper=True)
            drawn.append(torch.linalg.solve_triangular(b.mT, half.mT, upper=True).mT.reshape(-1))
        return torch.cat(drawn)

    def log_det(self) -> Tensor:
        """Log determinant of H, a scalar."""
        total = [
            2 * b.shape[-1] * a.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            + 2 * a.shape[-1] * b.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            for a, b in zip(self.left, self.right, strict=True)
        ]
        return torch.stack(total).sum(0)
