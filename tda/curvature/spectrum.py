"""The eigendecomposition of a curvature matrix, or of each of its diagonal blocks: one for every damping, threshold and query.

    C = V diag(s) V^T,    C^-1 v = V (f(s) o (V^T v)),    f(s) = 1 / (s + lambda), or 0 where an eigenvalue is left out

A spectrum covers blocks that follow each other in the flat coordinates of `tda.flat`: all of them for the Hessian and the GGN, one
layer (weight and bias together) for the block-diagonal GGN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import scipy.linalg
import torch
from torch import Tensor

from tda.blocks import Block
from tda.curvature.inverse import HEURISTIC, Damping
from tda.errors import InputError

if TYPE_CHECKING:
    from tda.solvers.operator import Curvature

Negative = Literal["drop", "abs", "keep"]
NEGATIVES: tuple[Negative, ...] = ("drop", "abs", "keep")

#: LAPACK's divide and conquer asks for 2 n^2 numbers of workspace, whose count must fit in 32 bits.
_WIDEST_DIVIDED = 32_000
_TILE = 512


@dataclass(frozen=True)
class Spectrum:
    """One diagonal block of a curvature matrix: of `attributed.blocks[b] for b in blocks`, which follow each other.

    values: (n,) float64, ascending, in nats per parameter^2. vectors: (n, n) float64, eigenvectors in columns.
    """

    blocks: tuple[int, ...]
    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Inverse:
    """What is made of the eigenvalues of a curvature matrix.

    damping: lambda, added to every eigenvalue; "heuristic": 0.1 x the mean |s| of the diagonal block. pinv: eigenvalues with |s| below
    it are left out (`relative`: below it x the largest |s| of the diagonal block). negative: what becomes of the Hessian's negative
    eigenvalues: "drop" leaves them out, "abs" takes 1 / (|s| + lambda), "keep" takes 1 / (s + lambda), the inverse of the matrix as it is.

    Raises InputError where a value is out of range.
    """

    damping: Damping = "heuristic"
    pinv: float | None = None
    relative: bool = False
    negative: Negative = "drop"

    def __post_init__(self) -> None:
        if self.damping != "heuristic" and not (_is_number(self.damping) and self.damping >= 0):
            raise InputError(f'damping must be a finite number >= 0 or "heuristic", got {self.damping!r}')
        if self.pinv is not None and not (_is_number(self.pinv) and self.pinv > 0):
            raise InputError(f"pinv must be a finite number > 0, the |eigenvalue| below which is left out, got {self.pinv!r}")
        if self.relative and self.pinv is None:
            raise InputError("relative = true needs pinv, the share of the largest |eigenvalue| below which is left out, e.g. pinv = 1e-4")
        if self.relative and self.pinv is not None and self.pinv >= 1:
            raise InputError(f"pinv = {self.pinv} with relative = true leaves every eigenvalue out; give a share below 1, e.g. 1e-4")
        if self.negative not in NEGATIVES:
            raise InputError(f'negative must be "drop", "abs" or "keep", got {self.negative!r}')


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_psd(kind: Curvature) -> bool:
    """Whether a curvature has no negative eigenvalues but by rounding: the GGN, for the losses of all likelihoods here."""
    return kind != "hessian"


def diagonals(blocks: Sequence[Block], kind: Curvature) -> list[tuple[int, ...]]:
    """The numbers of the blocks that share a diagonal block of the matrix: one tuple per Spectrum."""
    return [(b,) for b in range(len(blocks))] if kind == "block_ggn" else [tuple(range(len(blocks)))]


def rounding(values: Tensor) -> float:
    """What an eigenvalue of `values` (n,) is off by in float64: n x epsilon x the largest |s|."""
    return float(values.abs().max()) * len(values) * torch.finfo(torch.float64).eps


def damping_of(values: Tensor, inverse: Inverse, *, psd: bool) -> float:
    """lambda of one diagonal block with eigenvalues (n,)."""
    if inverse.damping != "heuristic":
        return float(inverse.damping)
    return HEURISTIC * float((values.clamp(min=0) if psd else values.abs()).mean())


def inverse_values(values: Tensor, inverse: Inverse, *, psd: bool) -> Tensor:
    """f(s), (n,) float64, such that the inverse is V diag(f(s)) V^T.

    psd: negative eigenvalues are rounding, and are 0. An eigenvalue that is 0 up to rounding has the inverse 1 / lambda, and without
    damping 0, as in the pseudo-inverse.

    Raises InputError where a kept negative eigenvalue and the damping cancel.
    """
    values = values.clamp(min=0) if psd else values
    damping, noise = damping_of(values, inverse, psd=psd), rounding(values)
    magnitude = values.abs()
    null = magnitude <= noise
    damped = torch.where(null, 0.0, magnitude if inverse.negative == "abs" else values) + damping
    kept = ~null if damping == 0 else torch.ones_like(null)
    if inverse.pinv is not None:
        kept &= magnitude >= inverse.pinv * (float(magnitude.max()) if inverse.relative else 1.0)
    if inverse.negative == "drop":
        kept &= (values >= 0) | null
    cancelled = kept & (damped.abs() <= noise)
    if bool(cancelled.any()):
        value = float(values[cancelled][0])
        raise InputError(
            f'damping = {damping:g} cancels the eigenvalue {value:g} of the Hessian with negative = "keep"; '
            'take more damping, or negative = "drop" or "abs"'
        )
    return torch.where(kept, 1 / torch.where(kept, damped, 1.0), 0.0)


def solve(spectra: Sequence[Spectrum], inverses: Sequence[Tensor], flat: Tensor, blocks: Sequence[Block]) -> Tensor:
    """C^-1 applied to vectors `flat` (query, D): (query, D) float64.

    inverses: f(s), (n,), for each spectrum. Coordinates that no spectrum covers become 0.
    """
    solved = torch.zeros(flat.shape, dtype=torch.float64, device=flat.device)
    for spectrum, inverse in zip(spectra, inverses, strict=True):
        some = columns(spectrum, blocks)
        rotated = (flat[:, some].double() @ spectrum.vectors).mul_(inverse)
        solved[:, some] = rotated @ spectrum.vectors.T
    return solved


def columns(spectrum: Spectrum, blocks: Sequence[Block]) -> slice:
    """Where a spectrum lies in flat coordinates."""
    first, last = spectrum.blocks[0], spectrum.blocks[-1]
    assert spectrum.blocks == tuple(range(first, last + 1))
    start = sum(block.size for block in blocks[:first])
    return slice(start, start + len(spectrum.values))


def decompose(matrix: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) in columns, float64, of (M + M^T) / 2.

    overwrite: the memory of a float64 matrix is used for the vectors; else M stays as it is.
    """
    own = matrix.to(torch.float64, memory_format=torch.contiguous_format, copy=not overwrite)
    _symmetrise(own)
    # The transpose of a symmetric matrix is the matrix, in the order of memory that LAPACK works on in place. Its divide and conquer is
    # some 1.6 times as fast as the one that torch links against, with smaller residuals.
    driver = "evd" if len(own) <= _WIDEST_DIVIDED else "evr"
    values, vectors = scipy.linalg.eigh(own.numpy().T, overwrite_a=True, check_finite=False, driver=driver)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _symmetrise(matrix: Tensor) -> None:
    """In place and tile by tile, so that it takes no second matrix."""
    n = len(matrix)
    for i in range(0, n, _TILE):
        for j in range(i, n, _TILE):
            upper, lower = matrix[i : i + _TILE, j : j + _TILE], matrix[j : j + _TILE, i : i + _TILE]
            mean = (upper + lower.T) / 2
            upper.copy_(mean)
            lower.copy_(mean.T)


def projected_bytes(blocks: Sequence[Block], kind: Curvature) -> int:
    """Bytes that a worker holds at most: decomposing the largest diagonal block takes four matrices, using them all one each."""
    sizes = [8 * sum(blocks[b].size for b in some) ** 2 for some in diagonals(blocks, kind)]
    return max(4 * max(sizes), sum(sizes) + max(sizes))


def check_memory(blocks: Sequence[Block], kind: Curvature, limit: int) -> None:
    """InputError where the dense matrices of `kind` would take more than `limit` bytes; it names the bytes and what to use instead."""
    needed = projected_bytes(blocks, kind)
    if needed > limit:
        size = sum(block.size for block in blocks)
        other = {"block_ggn": 'name = "ekfac", or all layers together with name = "cg", curvature = "ggn"'}
        instead = other.get(kind, f'name = "cg", curvature = "{kind}"')
        raise InputError(
            f"{kind} of {size:,} parameters takes {_size(needed)} in dense matrices, above memory_limit = {_size(limit)}; "
            f"raise it, `exclude` layers, or, forming no such matrix, use {instead}"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
