"""(F + lambda I)^-1 applied to query gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from tda.costs import rows_first
from tda.curvature.eigen import Factor, rotate, times
from tda.directions import Direction, Factored, dense
from tda.lowrank import Short, low_rank
from tda.products import Products, matmul

#: Of rows and columns, in the truncation to a low rank: float32 keeps what is divided by it.
LEAST_WEIGHT = 1e-2


def precondition(factor: Factor, gradient: Direction, inverse: Tensor, products: Products = "full") -> Tensor:
    """U_S [(U_S^T g_q U_A) o inverse] U_A^T, matrices (query, groups, out, in); inverse (groups, out, in) is 1 / (Lambda + lambda)."""
    return rotate(factor, damped(factor, gradient, inverse, products), back=True, products=products)


def damped(factor: Factor, gradient: Direction, inverse: Tensor, products: Products = "full") -> Tensor:
    """(U_S^T g_q U_A) o inverse, the same in the eigenbasis; the rows of a factored gradient are rotated first where that is cheaper."""
    if isinstance(gradient, Factored) and rows_first(gradient.rank, *inverse.shape[1:]):
        # (query, rank, groups, n) -> (groups, query, rank, n): one product for all rows.
        left = times(gradient.left.permute(2, 0, 1, 3), factor.basis_out, products)
        right = times(gradient.right.permute(2, 0, 1, 3), factor.basis_in, products)
        return matmul(left.transpose(2, 3), right, products).transpose(0, 1) * inverse
    return rotate(factor, dense(gradient), products=products) * inverse


def precondition_short(factor: Factor, gradient: Direction, inverse: Tensor, rank: int, products: Products = "full") -> Short:
    """The same in `rank` terms, which are found in the eigenbasis: only they are rotated back.

    Errors count there as training gradients meet them: rows and columns weigh as the roots of K-FAC's eigenvalues.
    """
    short = low_rank(damped(factor, gradient, inverse, products), rank, weights(factor.kfac_out), weights(factor.kfac_in))
    left, right = short.direction.left.permute(2, 0, 1, 3), short.direction.right.permute(2, 0, 1, 3)
    left, right = (
        times(rows, None if basis is None else basis.mT, "full") for rows, basis in ((left, factor.basis_out), (right, factor.basis_in))
    )
    return Short(Factored(left.permute(1, 2, 0, 3).contiguous(), right.permute(1, 2, 0, 3).contiguous()), short.error)


def weights(eigenvalues: Tensor) -> Tensor:
    """Roots of eigenvalues (groups, n), none below LEAST_WEIGHT of the largest: what no training gradient has is kept roughly."""
    most = eigenvalues.amax(1, keepdim=True).clamp(min=torch.finfo(eigenvalues.dtype).tiny)
    return (eigenvalues / most).sqrt().clamp(min=LEAST_WEIGHT)
