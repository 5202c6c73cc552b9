"""(F + lambda I)^-1 applied to query gradients."""

from __future__ import annotations

from torch import Tensor

from tda.costs import rows_first
from tda.curvature.eigen import Factor, rotate, times
from tda.directions import Direction, Factored, dense
from tda.products import Products, matmul


def precondition(factor: Factor, gradient: Direction, inverse: Tensor, products: Products = "full") -> Tensor:
    """U_S [(U_S^T g_q U_A) o inverse] U_A^T, matrices (query, groups, out, in); inverse (groups, out, in) is 1 / (Lambda + lambda).

    A factored gradient's rows are rotated before they are multiplied where that is cheaper.
    """
    if isinstance(gradient, Factored) and rows_first(gradient.rank, *inverse.shape[1:]):
        # (query, rank, groups, n) -> (groups, query, rank, n): one product for all rows.
        left = times(gradient.left.permute(2, 0, 1, 3), factor.basis_out, products)
        right = times(gradient.right.permute(2, 0, 1, 3), factor.basis_in, products)
        rotated = matmul(left.transpose(2, 3), right, products).transpose(0, 1)
    else:
        rotated = rotate(factor, dense(gradient), products=products)
    return rotate(factor, rotated * inverse, back=True, products=products)
