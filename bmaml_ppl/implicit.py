"""Gradients of an optimum with respect to what it depends on, by the implicit function theorem."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["conjugate_gradients", "implicit_optimum"]

Solve = Callable[[Tensor], Tensor]


def implicit_optimum(optimum: Tensor, score: Tensor, solve: Solve) -> Tensor:
    r"""The optimum itself, with the gradient that it has as a function of the meta-parameters.

    .. math:: \frac{d\hat z}{d\theta} = H^{-1} \frac{\partial}{\partial \theta} \nabla_z \log p(\hat z; \theta)

    Args:
        optimum: Where the score vanishes, (..., D), without gradient.
        score: The score there, (..., D), as a differentiable function of the meta-parameters.
        solve: v -> H^-1 v for v of the optimum's shape, H the negative Hessian; called in the backward pass.

    Reference:
        Rajeswaran et al. (2019), Meta-Learning with Implicit Gradients, lemma 1.
    """
    result: Tensor = _Implicit.apply(optimum, score, solve)
    return result


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, optimum: Tensor, score: Tensor, solve: Solve) -> Tensor:
        ctx.solve = solve
        return optimum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, ctx.solve(gradients[0]), None


def conjugate_gradients(multiply: Solve, target: Tensor, precondition: Solve, num_steps: int = 100) -> Tensor:
    """Solves H x = b for a batch of positive definite systems, (..., D), by products with H.

    Args:
        multiply: v -> H v.
        target: b.
        precondition: v -> P^-1 v with P near H.
        num_steps: At most; it stops where every residual is at rounding error.

    Reference:
        Nocedal and Wright (2006), Numerical Optimization, algorithm 5.3.
    """
    tolerance = 100 * torch.finfo(target.dtype).eps
    size = target.norm(dim=-1, keepdim=True)
    x, residual = torch.zeros_like(target), target
    search = guess = precondition(residual)
    gain = (residual * guess).sum(-1, keepdim=True)
    for _ in range(num_steps):
        if bool((residual.norm(dim=-1, keepdim=True) <= tolerance * size).all()):
            break
        product = multiply(search)
        curve = (search * product).sum(-1, keepdim=True)
        step = torch.where(curve > 0, gain / curve, 0.0)
        x, residual = x + step * search, residual - step * product
        guess = precondition(residual)
        before, gain = gain, (residual * guess).sum(-1, keepdim=True)
        search = guess + torch.where(before > 0, gain / before, 0.0) * search
    return x
