"""Sums over examples of the second moments of each block's rows: the Kronecker factors before normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda.attributed import Attributed
from tda.blocks import Block, Pair
from tda.curvature.fisher import Fisher, seeds
from tda.data import Batching, batches
from tda.products import Products, fast_float32, matmul

#: Above this width only the upper triangle is computed, in tiles this wide: nearly half the products are saved.
TILE = 256


@dataclass(frozen=True)
class Covariance:
    """Raw sums for one block: out (groups, out, out) or (groups, out) where that side has no basis; in_ likewise; positions seen."""

    out: Tensor
    in_: Tensor
    positions: Tensor


def covariance_sums(
    attributed: Attributed,
    dataset: Any,
    ids: Sequence[int],
    *,
    fisher: Fisher,
    seed: int,
    batch_size: Batching,
    products: Products = "full",
    layers: slice | None = None,
) -> list[Covariance]:
    """Sums over examples `ids` of A = sum_t a_t a_t^T and S = E_y sum_t s_t s_t^T for every block (Grosse et al. 2023, eq. 17).

    layers: for these blocks alone; no sum depends on which are taken together.
    """
    blocks = attributed.blocks if layers is None else attributed.blocks[layers]
    sums = [_zeros(block, attributed.dtype, attributed.device) for block in blocks]
    with fast_float32():
        for part in batches(ids, batch_size):
            batch = attributed.load(dataset, part)
            tape = attributed.tape(batch, part)
            for output_gradient, first, last in seeds(attributed.problem, tape, batch, part, fisher, seed):
                for total, pairs in zip(sums, tape.pairs(output_gradient, last=last, layers=layers), strict=True):
                    for pair in pairs:
                        _add(total, pair, first, products)
    for block, total in zip(blocks, sums, strict=True):
        for matrix, rotated in ((total.out, block.rotates_out), (total.in_, block.rotates_in)):
            if rotated:
                _mirror(matrix)
    return sums


def _zeros(block: Block, dtype: torch.dtype, device: torch.device) -> Covariance:
    def side(n: int, rotated: bool) -> Tensor:
        return torch.zeros(block.groups, *([n, n] if rotated else [n]), dtype=dtype, device=device)

    positions = torch.zeros((), dtype=torch.float64, device=device)
    return Covariance(side(block.out, block.rotates_out), side(block.in_, block.rotates_in), positions)


def _add(total: Covariance, pair: Pair, first: bool, products: Products) -> None:
    if first or pair.gradient == "left":
        _add_side(total.out, pair.left, pair.mask, products)
    if first or pair.gradient == "right":
        if pair.one_hot:
            weight = torch.ones_like(pair.right, dtype=total.in_.dtype) if pair.mask is None else pair.mask.to(total.in_.dtype)
            total.in_[0].index_add_(0, pair.right.flatten(), weight.flatten())
        else:
            _add_side(total.in_, pair.right, pair.mask, products)
    if first:
        total.positions.add_(pair.left.shape[1] * pair.positions if pair.mask is None else pair.mask.sum())


def _add_side(total: Tensor, rows: Tensor, mask: Tensor | None, products: Products) -> None:
    if mask is not None:
        rows = rows * mask[None, :, :, None]
    flat = rows.flatten(1, 2)
    if total.ndim == 2:
        total.add_(flat.square().sum(1))
        return
    width = total.shape[-1]
    flat = flat.bfloat16() if products == "bfloat16" else flat
    tile = TILE if width > 2 * TILE else width
    for start in range(0, width, tile):
        left = flat[..., start : start + tile].transpose(1, 2)
        if products == "full" and total.shape[0] == 1:
            total[0, start : start + tile, start:].addmm_(left[0], flat[0, :, start:])
        else:
            total[:, start : start + tile, start:] += matmul(left, flat[..., start:], products)


def _mirror(matrix: Tensor) -> None:
    """Copy the upper triangle below the diagonal, in place."""
    upper = matrix.triu()
    matrix.copy_(upper + upper.triu(1).transpose(-1, -2))
