"""EK-FAC as a preconditioner in flat coordinates: (F_ekfac + damping)^-1 v, block by block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tda import flat
from tda.blocks import Block
from tda.curvature.eigen import Factor, rotate
from tda.curvature.inverse import Damping, damping_value, inverse_eigenvalues
from tda.solvers.system import Precondition


def ekfac_preconditioner(blocks: Sequence[Block], factors: Sequence[Factor], damping: Damping | Sequence[float]) -> Precondition:
    """v (query, D) -> (F_ekfac + damping)^-1 v, (query, D).

    damping: one number for every block, one per block, or "heuristic", 0.1 x the block's mean eigenvalue.
    """
    each = [damping] * len(blocks) if isinstance(damping, float | int | str) else list(damping)
    inverses = [inverse_eigenvalues(f, "ekfac", lam) for f, lam in zip(factors, each, strict=True)]

    def apply(vectors: Tensor) -> Tensor:
        matrices = flat.unflatten(blocks, vectors)
        rows = [rotate(f, rotate(f, m.to(i)) * i, back=True) for f, m, i in zip(factors, matrices, inverses, strict=True)]
        return flat.flatten(blocks, rows).to(vectors)

    return apply


def flat_damping(blocks: Sequence[Block], factors: Sequence[Factor], damping: Damping) -> Tensor:
    """The damping of every coordinate, (D,): "heuristic" gives each block 0.1 x its mean eigenvalue."""
    return flat.flatten(
        blocks,
        [
            factor.kfac_out.new_full((1, block.groups, block.out, block.in_), damping_value(factor, "ekfac", damping))
            for block, factor in zip(blocks, factors, strict=True)
        ],
    )[0]
