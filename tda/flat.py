"""Flat coordinates: the matrices of all blocks, row by row and side by side, as one vector of D numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tda.blocks import Block


def total(blocks: Sequence[Block]) -> int:
    """D, the number of attributed parameters."""
    return sum(block.size for block in blocks)


def spans(blocks: Sequence[Block]) -> list[range]:
    """The coordinates of each block, in the order of `blocks`."""
    found, start = [], 0
    for block in blocks:
        found.append(range(start, start + block.size))
        start += block.size
    return found


def flatten(blocks: Sequence[Block], matrices: Sequence[Tensor]) -> Tensor:
    """Matrices (query, groups, out, in), one per block, as vectors (query, D)."""
    assert len(matrices) == len(blocks)
    return torch.cat([matrix.flatten(1) for matrix in matrices], 1)


def unflatten(blocks: Sequence[Block], flat: Tensor) -> list[Tensor]:
    """Vectors (query, D) as matrices (query, groups, out, in), one per block: views of `flat`."""
    assert flat.shape[1] == total(blocks)
    pieces = flat.split([block.size for block in blocks], 1)
    return [piece.view(len(flat), b.groups, b.out, b.in_) for piece, b in zip(pieces, blocks, strict=True)]
