"""The ladder layer by layer: diagonal blocks of the rungs' inverses, and the mass of the blocks between layers.

No block is ever held: the matrices V diag(a) V^T are formed a few rows at a time, so that all this takes little more than the rungs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tda import decomposition
from tda.curvature.spectrum import Inverse
from tda.decomposition import Piece, Rung


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
    for layer, (first, last) in enumerate(pairwise(edges)):
        squares, norms = torch.zeros(references, len(rungs), dtype=torch.float64), torch.zeros(references, dtype=torch.float64)
        for start, stop in _chunks(first, last, edges[-1]):
            rows = [_rows(rung, values, start, stop, (first, last)) for rung, values in zip(rungs, inverted, strict=True)]
            for r in range(references):
                norms[r] += rows[r].square().sum()
                for k in range(r, len(rungs)):
                    squares[r, k] += (rows[r] - rows[k]).square_().sum()
        for r in range(references):
            found[r, r:, layer] = (squares[r, r:] / norms[r]).sqrt()
    return found


def layer_masses(rung: Rung, edges: Sequence[int]) -> Tensor:
    """||M_lm||_F for every pair of layers, (layer, layer) float64."""
    found = torch.zeros(len(edges) - 1, len(edges) - 1, dtype=torch.float64)
    for row, (first, last) in enumerate(pairwise(edges)):
        for start, stop in _chunks(first, last, edges[-1]):
            squares = _rows(rung, rung.values, start, stop, (0, edges[-1])).square_().sum(0)
            found[row] += torch.stack([squares[a:b].sum() for a, b in pairwise(edges)])
    return found.sqrt()


def off_block_mass(masses: Tensor) -> float:
    """||M - blk(M)||_F / ||M||_F from the norms of the blocks (layer, layer): 0 for a block-diagonal matrix."""
    return float(masses.clone().fill_diagonal_(0.0).norm() / masses.norm())


def _chunks(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows first .. last - 1 of a matrix of so many columns in pieces of about CHUNK entries."""
    step = max(1, decomposition.CHUNK // width)
    for start in range(first, last, step):
        yield start, min(start + step, last)


def _rows(rung: Rung, values: Tensor, start: int, stop: int, columns: tuple[int, int]) -> Tensor:
    """Rows start .. stop - 1 of V diag(values) V^T for values (D,), piece by piece, in some columns; the rows lie within one piece."""
    found = torch.zeros(stop - start, columns[1] - columns[0], dtype=torch.float64)
    piece = _around(rung, start, stop)
    low, high = max(piece.start, columns[0]), min(piece.stop, columns[1])
    if low < high:
        scaled = piece.rows(start, stop) * values[piece.start : piece.stop]
        if isinstance(piece.vectors, Tensor):
            found[:, low - columns[0] : high - columns[0]] = scaled @ piece.rows(low, high).T
        else:
            found[:, low - columns[0] : high - columns[0]] = piece.back(scaled)[:, low - piece.start : high - piece.start]
    return found


def _around(rung: Rung, start: int, stop: int) -> Piece:
    return next(piece for piece in rung.pieces if piece.start <= start and stop <= piece.stop)
