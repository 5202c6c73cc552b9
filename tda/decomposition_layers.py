"""The ladder layer by layer: diagonal blocks of the rungs' inverses, and the mass of the blocks between layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tda.curvature.spectrum import Inverse
from tda.decomposition import Rung


def layer_errors(rungs: Sequence[Rung], references: int, edges: Sequence[int], inverse: Inverse) -> Tensor:
    """||(R+)_ll - (A+)_ll||_F / ||(R+)_ll||_F, (reference, rung, layer): diagonal blocks of the whole inverses, layer by layer.

    Args:
        rungs: the ladder; its first `references` are the references.
        references: how many.
        edges: the layers' first coordinates, and D.
        inverse: how every rung is inverted.

    Returns:
        float64; 0 on the diagonal, not a number where a rung is above its reference or (R+)_ll is 0.
    """
    inverted = [rung.inverted(inverse) for rung in rungs]
    found = torch.full((references, len(rungs), len(edges) - 1), torch.nan, dtype=torch.float64)
    for layer, (start, stop) in enumerate(pairwise(edges)):
        blocks = [block_between(rung, values, (start, stop), (start, stop)) for rung, values in zip(rungs, inverted, strict=True)]
        for r in range(references):
            norm = blocks[r].norm()
            for k in range(r, len(rungs)):
                found[r, k, layer] = (blocks[r] - blocks[k]).norm() / norm
    return found


def layer_masses(rung: Rung, edges: Sequence[int]) -> Tensor:
    """||M_lm||_F for every pair of layers, (layer, layer) float64."""
    count, values = len(edges) - 1, rung.values
    found = torch.zeros(count, count, dtype=torch.float64)
    spans = list(pairwise(edges))
    for row in range(count):
        for column in range(row, count):
            norm = block_between(rung, values, spans[row], spans[column]).norm()
            found[row, column] = found[column, row] = norm
    return found


def off_block_mass(masses: Tensor) -> float:
    """||M - blk(M)||_F / ||M||_F from the norms of the blocks (layer, layer): 0 for a block-diagonal matrix."""
    return float(masses.clone().fill_diagonal_(0.0).norm() / masses.norm())


def block_between(rung: Rung, values: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """One block of V diag(values) V^T for values (D,), piece by piece: rows x columns; both lie within one piece, or the block is 0."""
    for piece in rung.pieces:
        if piece.start <= rows[0] and rows[1] <= piece.stop:
            if not (piece.start <= columns[0] and columns[1] <= piece.stop):
                break
            left = piece.rows(*rows)
            right = left if rows == columns else piece.rows(*columns)
            return (left * values[piece.start : piece.stop]) @ right.T
    return torch.zeros(rows[1] - rows[0], columns[1] - columns[0], dtype=torch.float64)
