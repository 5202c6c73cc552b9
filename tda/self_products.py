"""Each training example's influence on its own loss: g_i^T C^-1 g_i, without making a direction of every training gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tda.blocks import Block, Pair, example_gradients
from tda.costs import gram_form
from tda.curvature.eigen import Factor, merged_embedding, rotate_rows, rotated_gradients
from tda.products import Products, matmul

if TYPE_CHECKING:
    from tda.curvature.spectrum import Spectrum
    from tda.projection import Projection

#: Per-example gradients of one block are made for at most this many bytes at a time.
GRADIENT_BYTES = 32 << 20


@dataclass(frozen=True)
class Plain:
    """g^T g, times a weight."""

    weight: float = 1.0


@dataclass(frozen=True)
class Kronecker:
    """g^T (F + lambda I)^-1 g by blocks: factors, and the inverse eigenvalues (groups, out, in) of each."""

    factors: Sequence[Factor]
    inverses: Sequence[Tensor]


@dataclass(frozen=True)
class WholeSpectra:
    """g^T C^-1 g over whole diagonal blocks of a curvature matrix: spectra, and the inverse eigenvalues (n,) of each."""

    spectra: Sequence[Spectrum]
    inverses: Sequence[Tensor]


@dataclass(frozen=True)
class Projected:
    """g^T P^T C^-1 P g with a curvature C of projected gradients: its spectra, and the inverse eigenvalues (k,) of each."""

    projection: Projection
    spectra: Sequence[Spectrum]
    inverses: Sequence[Tensor]


Own = Plain | Kronecker | WholeSpectra | Projected


def block_products(own: Plain | Kronecker, b: int, block: Block, pairs: Sequence[Pair], products: Products = "full") -> Tensor:
    """The share of block number b, for a batch: (batch,)."""
    if isinstance(own, Plain):
        return own.weight * gradient_squares(block, pairs)
    factor, inverse = own.factors[b], own.inverses[b]
    if len(pairs) == 1 and pairs[0].positions == 1 and not pairs[0].one_hot:
        left, right = (side[:, :, 0].square() for side in rotate_rows(factor, pairs[0], products))
        return (matmul(left, inverse, products) * right).sum((0, 2))
    if block.form == "embedding":
        merged = merged_embedding(factor, pairs, products)
        return torch.stack([(rows.square() * inverse[0][:, ids].T).sum() for rows, ids in merged])
    return torch.cat([(g.square() * inverse).flatten(1).sum(1) for g in rotated_gradients(block, factor, pairs, products)])


def whole_products(own: WholeSpectra, gradients: Sequence[Tensor]) -> Tensor:
    """g^T C^-1 g for a batch, (batch,), from its gradients (batch, size) of every block."""
    return projected_products(own, [torch.cat([gradients[b].double() for b in spectrum.blocks], 1) for spectrum in own.spectra])


def projected_products(own: WholeSpectra | Projected, coordinates: Sequence[Tensor]) -> Tensor:
    """The same, from the gradients in the coordinates of each spectrum, (batch, k)."""
    total = coordinates[0].new_zeros(len(coordinates[0]), dtype=torch.float64)
    for rows, spectrum, inverse in zip(coordinates, own.spectra, own.inverses, strict=True):
        step = max(1, GRADIENT_BYTES // (8 * len(inverse)))
        for start in range(0, len(total), step):
            some = slice(start, start + step)
            total[some] += (rows[some].double() @ spectrum.vectors).square() @ inverse
    return total


def gradient_squares(block: Block, pairs: Sequence[Pair]) -> Tensor:
    """||D_b||^2 of a batch, (batch,), in float64; in Gram form where that is cheaper (see `tda.costs`)."""
    positions = sum(pair.positions for pair in pairs)
    if block.form == "embedding":
        plain = Factor(None, None, torch.empty(0), torch.empty(0))
        return torch.stack([rows.double().square().sum() for rows, _ in merged_embedding(plain, pairs)])
    if not gram_form(positions, positions, block.out, block.in_):
        step = max(1, GRADIENT_BYTES // (8 * block.size))
        starts = range(0, pairs[0].left.shape[1], step)
        parts = [example_gradients(block, [part_of(pair, k, k + step) for pair in pairs]) for k in starts]
        return torch.cat([part.flatten(1).double().square().sum(1) for part in parts])
    left, right = (torch.cat([getattr(pair, side) for pair in pairs], 2).double() for side in ("left", "right"))
    return ((left @ left.transpose(2, 3)) * (right @ right.transpose(2, 3))).sum((0, 2, 3))


def part_of(pair: Pair, start: int, stop: int) -> Pair:
    """Examples start..stop of a batch's pair."""
    right = pair.right[start:stop] if pair.one_hot else pair.right[:, start:stop]
    return Pair(pair.left[:, start:stop], right, pair.gradient, None if pair.mask is None else pair.mask[start:stop])
