"""Directions of low rank: V_q ~ sum_r left_qr right_qr^T, in r (out + in) numbers a query and layer instead of out * in.

A truncated singular value decomposition: exact where the rank is near the matrix's own, else by a randomised range finder with power
iterations (Halko, Martinsson & Tropp 2011, algorithm 4.4), whose sketch is the same for every query, so that a query's direction does not
depend on the others. The error that it leaves is measured on the matrices themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda.blocks import Block
from tda.directions import Direction, Factored, count, dense, take

#: Columns of the sketch beyond the rank, and power iterations: with these the error is within a percent of the exact truncation's, also
#: where singular values fall slowly.
OVERSAMPLING, ITERATIONS = 8, 2
#: A rank above this share of the matrix's own is decomposed exactly.
NEARLY_FULL = 0.5
#: Numbers of matrices that are decomposed at a time.
CHUNK = 1 << 22
#: A mean relative error of a layer's directions above this is warned of.
ROUGH = 0.3


@dataclass(frozen=True)
class Short:
    """A block's directions in `rank` terms, and the relative Frobenius error of each query's matrix, (query,) float64."""

    direction: Factored
    error: Tensor


def keeps_full(block: Block, rank: int) -> bool:
    """Whether directions of this block are kept as matrices: the rank is no restriction, or the terms would take no less room."""
    return rank >= min(block.out, block.in_) or rank * (block.out + block.in_) >= block.out * block.in_


def low_rank(matrix: Tensor, rank: int, scale_out: Tensor | None = None, scale_in: Tensor | None = None) -> Short:
    """Matrices (query, groups, out, in) in `rank` terms.

    scale_out (groups, out), scale_in (groups, in), positive: what is truncated is diag(scale_out) M diag(scale_in), so that errors count
    as much as their rows and columns weigh; the error stated is that of M itself.
    """
    weighed = matrix if scale_out is None else matrix * scale_out[:, :, None]
    weighed = weighed if scale_in is None else weighed * scale_in[:, None, :]
    left, right = _factors(weighed, rank)
    left = left if scale_out is None else left / scale_out[:, :, None]
    right = right if scale_in is None else right / scale_in[:, :, None]
    whole = matrix.flatten(1).norm(dim=1).double()
    lost = torch.stack([(m - a @ b.mT).norm() for m, a, b in zip(matrix, left, right, strict=True)]).double()
    error = torch.where(whole > 0, lost / whole.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    # (query, groups, n, rank) -> (query, rank, groups, n)
    return Short(Factored(left.permute(0, 3, 1, 2).contiguous(), right.permute(0, 3, 1, 2).contiguous()), error)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (..., out, rank), right (..., in, rank) of the best approximation left right^T."""
    out, in_ = matrix.shape[-2:]
    width = rank + OVERSAMPLING
    if width >= NEARLY_FULL * min(out, in_):
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[..., :rank] * values[..., None, :rank], v.mT[..., :rank]
    if out > in_:  # the basis is that of the narrower side
        right, left = _factors(matrix.mT, rank)
        return left, right
    sketch = torch.randn(in_, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(matrix)
    basis = matrix @ sketch
    for _ in range(ITERATIONS):
        basis = matrix @ _levelled(matrix.mT @ _levelled(basis))
    basis = torch.linalg.qr(basis).Q
    inner = basis.mT @ matrix  # (..., width, in)
    # The leading terms of the small factor, by its Gram matrix: nothing is divided by a singular value, so small ones do no harm.
    vectors = torch.linalg.eigh(inner.double() @ inner.double().mT).eigenvectors.flip(-1)[..., :rank].to(matrix)
    return basis @ vectors, (vectors.mT @ inner).mT


def _levelled(basis: Tensor) -> Tensor:
    """Columns that span the same, of about one length and far from parallel, so that the next product keeps the small ones.

    By a Cholesky decomposition of their Gram matrix, in a tenth of the time of a QR decomposition; what is rounding stays small.
    """
    gram = (basis.mT @ basis).double()
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    shift = 4 * torch.finfo(basis.dtype).eps * size + torch.finfo(torch.float32).tiny
    lower = torch.linalg.cholesky(gram + shift * torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device))
    levelled: Tensor = basis @ torch.linalg.inv(lower).mT.to(basis)
    return levelled


def shorten(block: Block, direction: Direction, rank: int) -> Short | None:
    """A block's directions in `rank` terms; None where they are kept as they are (see `keeps_full`, or they have as few terms)."""
    if keeps_full(block, rank) or (isinstance(direction, Factored) and direction.rank <= rank):
        return None
    step = max(1, CHUNK // block.size)
    return joined([low_rank(dense(take(direction, slice(k, k + step))), rank) for k in range(0, count(direction), step)])


def joined(parts: Sequence[Short]) -> Short:
    """Those of several groups of queries as one."""
    left, right = (torch.cat([getattr(part.direction, side) for part in parts]) for side in ("left", "right"))
    return Short(Factored(left, right), torch.cat([part.error for part in parts]))


def stated(blocks: Sequence[Block], rank: int, errors: Sequence[Tensor | None]) -> dict[str, Any]:
    """What a reader should know, as JSON: the relative error of each layer's directions, largest and mean over queries.

    errors: (query,) by block, None where directions are kept in full: `full` names these layers.
    """
    found = {block.name: error for block, error in zip(blocks, errors, strict=True) if error is not None}
    return {
        "rank": rank,
        "queries": max((len(error) for error in found.values()), default=0),
        "largest": {name: float(error.max()) for name, error in found.items()},
        "mean": {name: float(error.mean()) for name, error in found.items()},
        "full": [block.name for block, error in zip(blocks, errors, strict=True) if error is None],
    }


def together(known: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """What is `stated` of two groups of queries, as of one."""
    if known is None or not more["queries"]:
        return known or more
    ours, theirs = (side["queries"] / (known["queries"] + more["queries"]) for side in (known, more))
    return {
        **known,
        "queries": known["queries"] + more["queries"],
        "largest": {name: max(value, more["largest"][name]) for name, value in known["largest"].items()},
        "mean": {name: ours * value + theirs * more["mean"][name] for name, value in known["mean"].items()},
    }


def summary(one: Mapping[str, Any]) -> str:
    """What is `stated`, in a line."""
    said = [f"rank {one['rank']}"]
    if one["mean"]:
        average = sum(one["mean"].values()) / len(one["mean"])
        said.append(f"relative error of directions {average:.2g} on average over layers, {max(one['largest'].values()):.2g} at most")
    if one["full"]:
        said.append(f"{len(one['full'])} of {len(one['full']) + len(one['mean'])} layers in full")
    return "; ".join(said)


def warnings(found: Mapping[str, dict[str, Any]]) -> list[str]:
    """A line for every method, by title, of whose directions some layer's keep too little."""
    said = []
    for title, one in found.items():
        worst = max(one["mean"], key=one["mean"].__getitem__, default="")
        if worst and one["mean"][worst] > ROUGH:
            said.append(
                f"{title}: query_rank = {one['rank']} keeps the directions of {worst} to a relative error of {one['mean'][worst]:.2g} on "
                f"average; a higher rank keeps more, and scores in full say what that changes"
            )
    return said
