"""1 / (Lambda + lambda) as a short sum of outer products, so that a one-position layer is scored without making any gradient matrix.

With Lambda ~ sum_r u_r v_r^T in the eigenbasis, the direction of a query with rows (s, a) is sum_r (s' o u_r)(a' o v_r)^T, s' = U_S^T s,
a' = U_A^T a; a pair then costs rank (out + in) instead of out * in multiplications.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tda.blocks import Block
from tda.curvature.eigen import Factor
from tda.curvature.inverse import Damping, inverse_eigenvalues
from tda.directions import Direction, Factored


def separable_direction(block: Block, factor: Factor, gradient: Direction, damping: Damping, tolerance: float) -> Direction | None:
    """-(F + lambda I)^-1 g_q with an expected relative score error of at most `tolerance`, or None where the exact form is cheaper.

    Only for gradients of rank one (one position) in one group. The smallest sufficient rank is taken.
    """
    if not isinstance(gradient, Factored) or gradient.rank != 1 or block.groups != 1 or block.structure != "kronecker":
        return None
    assert factor.basis_out is not None
    assert factor.basis_in is not None
    assert factor.eigenvalues is not None
    left, right = gradient.left[:, 0, 0] @ factor.basis_out[0], gradient.right[:, 0, 0] @ factor.basis_in[0]
    inverse = inverse_eigenvalues(factor, "ekfac", damping)[0].double()
    # A score's error is sum_ab E_ab D'_q,ab D'_i,ab: E is weighed by the queries' and the training examples' second moments.
    weight = (left.double().square().T @ right.double().square()) * factor.eigenvalues[0].double()
    most = max((block.out * block.in_ - 1) // (block.out + block.in_), 0)
    u, v = _truncated(inverse, weight, tolerance, most)
    if u is None or v is None:
        return None
    u, v = u.to(left.dtype), v.to(left.dtype)
    rows_out = -(left[:, None, :] * u.T) @ factor.basis_out[0].T
    rows_in = (right[:, None, :] * v.T) @ factor.basis_in[0].T
    return Factored(rows_out[:, :, None, :], rows_in[:, :, None, :])


def _truncated(inverse: Tensor, weight: Tensor, tolerance: float, most: int) -> tuple[Tensor | None, Tensor | None]:
    """u (out, rank), v (in, rank) with u v^T ~ inverse; None where more than `most` terms are needed.

    The singular value decomposition is of the inverse scaled by the weights' marginals, which are nearly the K-FAC spectrum: it is this
    scaling that makes the matrix nearly low rank, and the truncation nearly the best one for the scores.
    """
    scale_out, scale_in = _root(weight.sum(1)), _root(weight.sum(0))
    left, values, right = torch.linalg.svd(scale_out[:, None] * inverse * scale_in, full_matrices=False)
    u, v = left * values / scale_out[:, None], right.T / scale_in[:, None]
    whole = (inverse.square() * weight).sum()
    residual = inverse.clone()
    for rank in range(1, min(most, len(values)) + 1):
        residual -= u[:, rank - 1 : rank] * v[:, rank - 1]
        if float((residual.square() * weight).sum()) <= tolerance**2 * float(whole):
            return u[:, :rank], v[:, :rank]
    return None, None


def _root(values: Tensor) -> Tensor:
    return values.clamp(min=float(values.max()) * 1e-16 + 1e-300).sqrt()
