"""Eigenbases of the Kronecker factors, and the eigenvalues that K-FAC and EK-FAC give in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tda.attributed import Attributed
from tda.blocks import Block, Pair
from tda.costs import rows_first
from tda.curvature.covariances import Covariance
from tda.curvature.fisher import Fisher, seeds
from tda.data import Batching, batches
from tda.products import Products, fast_float32, matmul

#: Rotated gradients are made for so many entries at a time: a megabyte in float32.
CACHED = 1 << 18
#: Matrices with at least this many entries are multiplied from the left one by one; smaller ones are laid side by side first.
LARGE = 1 << 14


@dataclass(frozen=True)
class Factor:
    """Curvature of one block.

    basis_out (groups, out, out) and basis_in (groups, in, in): eigenvectors as columns, or None where the basis is the identity.
    kfac_out (groups, out), kfac_in (groups, in): eigenvalues of S = E_i[sum_t s s^T] and of A, a mean over positions, so that their
    products are on the scale of eigenvalues (groups, out, in): EK-FAC's Lambda = E_i[(U_S^T D_i U_A)^2] (George et al. 2018).
    """

    basis_out: Tensor | None
    basis_in: Tensor | None
    kfac_out: Tensor
    kfac_in: Tensor
    eigenvalues: Tensor | None = None

    @property
    def kronecker(self) -> Tensor:
        """K-FAC's eigenvalues (groups, out, in)."""
        return self.kfac_out[:, :, None] * self.kfac_in[:, None, :]


def decompose(block: Block, covariance: Covariance, examples: int, dtype: torch.dtype) -> Factor:
    """Eigendecomposition in float64 of A = (sum a a^T) / positions and S = (sum s s^T) / examples; negative eigenvalues become 0."""
    kfac_out, basis_out = _eigh(covariance.out.double() / examples, block.rotates_out)
    kfac_in, basis_in = _eigh(covariance.in_.double() / covariance.positions.clamp(min=1), block.rotates_in)
    cast = [None if t is None else t.to(dtype) for t in (basis_out, basis_in)]
    return Factor(cast[0], cast[1], kfac_out.to(dtype), kfac_in.to(dtype))


def _eigh(matrix: Tensor, rotated: bool) -> tuple[Tensor, Tensor | None]:
    if not rotated:
        return matrix.clamp(min=0), None
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0), vectors


def eigenvalue_sums(  # noqa: PLR0913  (the options of every pass over the data)
    attributed: Attributed,
    factors: Sequence[Factor],
    dataset: Any,
    ids: Sequence[int],
    *,
    fisher: Fisher,
    seed: int,
    batch_size: Batching,
    products: Products = "full",
    layers: slice | None = None,
) -> list[Tensor]:
    """Sums over examples of (U_S^T D_i U_A)^2, (groups, out, in) for every block; divided by the number of examples they are Lambda.

    layers: for these blocks alone, whose factors are given; no sum depends on which are taken together.
    The labels are the same as in `covariance_sums`. The form is chosen from shapes, see `tda.costs`.
    """
    blocks = attributed.blocks if layers is None else attributed.blocks[layers]
    sums = [torch.zeros(b.groups, b.out, b.in_, dtype=attributed.dtype, device=attributed.device) for b in blocks]
    bases = [replace(f, basis_out=_cast(f.basis_out, products), basis_in=_cast(f.basis_in, products)) for f in factors]
    with fast_float32():
        for part in batches(ids, batch_size):
            batch = attributed.load(dataset, part)
            tape = attributed.tape(batch, part)
            for output_gradient, _, last in seeds(attributed.problem, tape, batch, part, fisher, seed):
                found = tape.pairs(output_gradient, last=last, layers=layers)
                for block, factor, total, pairs in zip(blocks, bases, sums, found, strict=True):
                    _add_squares(block, factor, total, pairs, products)
    return sums


def _cast(basis: Tensor | None, products: Products) -> Tensor | None:
    return basis if basis is None or products == "full" else basis.bfloat16()


def _add_squares(block: Block, factor: Factor, total: Tensor, pairs: Sequence[Pair], products: Products) -> None:
    if not pairs:
        return
    if len(pairs) == 1 and pairs[0].positions == 1 and not pairs[0].one_hot:
        left, right = rotate_rows(factor, pairs[0], products)
        total += matmul(left[:, :, 0].square().transpose(1, 2), right[:, :, 0].square(), products)
    elif block.form == "embedding":
        for rows, ids in merged_embedding(factor, pairs, products):
            total[0].index_add_(1, ids, rows.square().T)
    else:
        for rotated in rotated_gradients(block, factor, pairs, products):
            if len(rotated) == 1:
                total.addcmul_(rotated[0], rotated[0])
            else:
                total += rotated.square_().sum(0)


def rotate_rows(factor: Factor, pair: Pair, products: Products = "full") -> tuple[Tensor, Tensor]:
    """left U_S and right U_A of a pair, same shapes."""
    right = pair.right if pair.one_hot else times(pair.right, factor.basis_in, products)
    return times(pair.left, factor.basis_out, products), right


def times(rows: Tensor, basis: Tensor | None, products: Products) -> Tensor:
    """Rows (groups, batch, positions, n) times a basis (groups, n, n), or as they are where there is none."""
    # Flattened, because a basis broadcast over the batch would be multiplied once per example.
    return rows if basis is None else matmul(rows.flatten(1, 2), basis, products).view(*rows.shape[:3], -1)


def rotate(factor: Factor, matrix: Tensor, *, back: bool = False, products: Products = "full") -> Tensor:
    """U_S^T M U_A for matrices (batch, groups, out, in); with `back`, U_S M U_A^T."""
    if factor.basis_in is not None:
        matrix = _right(matrix, factor.basis_in.transpose(1, 2) if back else factor.basis_in, products)
    if factor.basis_out is not None:
        matrix = _left(factor.basis_out if back else factor.basis_out.transpose(1, 2), matrix, products)
    return matrix


def _right(matrix: Tensor, basis: Tensor, products: Products) -> Tensor:
    """M W for each group: one product of all rows."""
    batch, groups, out, in_ = matrix.shape
    rows = matrix.transpose(0, 1).reshape(groups, batch * out, in_)
    return matmul(rows, basis, products).view(groups, batch, out, in_).transpose(0, 1)


def _left(basis: Tensor, matrix: Tensor, products: Products) -> Tensor:
    """W M for each group. A basis broadcast over a batch runs at an eighth of the speed of plain products."""
    batch, groups, out, in_ = matrix.shape
    basis = basis.contiguous()
    if out * in_ < LARGE:
        columns = matrix.permute(1, 2, 0, 3).reshape(groups, out, batch * in_)
        return matmul(basis, columns, products).view(groups, out, batch, in_).permute(2, 0, 1, 3)
    result = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for b in range(batch):
        for g in range(groups):
            result[b, g] = matmul(basis[g], matrix[b, g], products)
    return result


def rotated_gradients(block: Block, factor: Factor, pairs: Sequence[Pair], products: Products = "full") -> Iterator[Tensor]:
    """U_S^T D_i U_A, (examples, groups, out, in), as many examples at a time as stay in the cache while they are used."""
    positions = sum(pair.positions for pair in pairs)
    early = rows_first(positions, block.out, block.in_)
    rows = [rotate_rows(factor, pair, products) if early else (pair.left, pair.right) for pair in pairs]
    if products == "bfloat16":
        rows = [(left.bfloat16(), right.bfloat16()) for left, right in rows]
    step = max(1, CACHED // block.size)
    for start in range(0, pairs[0].left.shape[1], step):
        some = slice(start, start + step)
        parts = [matmul(left[:, some].transpose(2, 3), right[:, some], products).transpose(0, 1) for left, right in rows]
        gradient = sum(parts[1:], start=parts[0])
        yield gradient if early else rotate(factor, gradient, products=products)


def merged_embedding(factor: Factor, pairs: Sequence[Pair], products: Products = "full") -> Iterator[tuple[Tensor, Tensor]]:
    """For each example of an embedding's pairs: the rotated rows (distinct ids, out) summed over its equal ids, and these ids."""
    rotated = [rotate_rows(factor, pair, products)[0][0] for pair in pairs]
    rows, ids = torch.cat(rotated, 1), torch.cat([pair.right for pair in pairs], 1)
    for b in range(len(ids)):
        distinct, place = ids[b].unique(return_inverse=True)
        yield rows.new_zeros(len(distinct), rows.shape[-1]).index_add_(0, place, rows[b]), distinct
