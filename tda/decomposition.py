"""The ladder of curvatures, H -> GGN -> block-diagonal GGN -> EK-FAC -> K-FAC, and how far each rung is from a better one.

A rung is a block-diagonal matrix of which every block is eigendecomposed. Two rungs R = V diag(s) V^T and A = W diag(t) W^T meet in
their squared overlaps O = (V^T W)^2, elementwise. Whatever one makes of the eigenvalues, a and c,

    || V diag(a) V^T  -  V diag(b) V^T W diag(c) W^T ||_F^2  =  sum_ij (a_i - b_i c_j)^2 O_ij

so that O, computed once and streamed in chunks of rows, serves every inverse (damping or threshold), both definitions of the error and
the overlap of the bases. The sum has no cancellation: an error of 1e-12 is measured as that.

Better Hessians Matter (Hong et al. 2025, arXiv 2509.23437) defines the ladder, the error of a step and the overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tda.blocks import Block
from tda.curvature.eigen import Factor, rotate
from tda.curvature.inverse import spectrum
from tda.curvature.spectrum import Inverse, Spectrum, damping_of, inverse_values

RungName = Literal["hessian", "ggn", "block_ggn", "ekfac", "kfac"]

#: The ladder from the exact matrix down.
RUNGS: tuple[RungName, ...] = ("hessian", "ggn", "block_ggn", "ekfac", "kfac")
#: The rungs whose eigenvectors are explicit matrices; the others are compared with them.
REFERENCES: tuple[RungName, ...] = ("hessian", "ggn", "block_ggn")
#: Entries of O that are held at a time: 8 MiB, so that what is made of them stays near the caches.
CHUNK = 1 << 20


@dataclass(frozen=True)
class Piece:
    """One diagonal block, V diag(values) V^T, of the coordinates from `start` on.

    values: (n,) float64. vectors: (n, n), eigenvectors in columns; or the factor of a block whose eigenvectors are U_S (x) U_A, and
    whose eigenvalues (groups, out, in) are `values` row by row.
    """

    start: int
    values: Tensor
    vectors: Tensor | Factor

    @property
    def stop(self) -> int:
        """The first coordinate after it."""
        return self.start + len(self.values)

    def rotated(self, rows: Tensor) -> Tensor:
        """Rows (m, n) in the eigenbasis: rows V, (m, n)."""
        if isinstance(self.vectors, Tensor):
            return rows @ self.vectors
        matrices = rows.view(len(rows), *self.vectors.kronecker.shape)
        return rotate(self.vectors, matrices).reshape(len(rows), -1)

    def back(self, rows: Tensor) -> Tensor:
        """Rows (m, n) of the eigenbasis in the coordinates again: rows V^T, (m, n)."""
        if isinstance(self.vectors, Tensor):
            return rows @ self.vectors.T
        matrices = rows.view(len(rows), *self.vectors.kronecker.shape)
        return rotate(self.vectors, matrices, back=True).reshape(len(rows), -1)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of V, counted in the coordinates of the whole: (stop - start, n)."""
        if isinstance(self.vectors, Tensor):
            return self.vectors[start - self.start : stop - self.start]
        unit = torch.zeros(stop - start, len(self.values), dtype=self.values.dtype)
        unit[:, start - self.start : stop - self.start].fill_diagonal_(1.0)
        return self.rotated(unit)


@dataclass(frozen=True)
class Rung:
    """A symmetric matrix (D, D) by its diagonal blocks, in the order of the coordinates. psd: whether negative eigenvalues are rounding."""

    name: RungName
    pieces: tuple[Piece, ...]
    psd: bool

    @property
    def values(self) -> Tensor:
        """All eigenvalues (D,), piece by piece."""
        return torch.cat([piece.values for piece in self.pieces])

    def inverted(self, inverse: Inverse) -> Tensor:
        """The eigenvalues (D,) of its inverse, piece by piece: each diagonal block is inverted as a method inverts it."""
        return torch.cat([inverse_values(piece.values, inverse, psd=self.psd) for piece in self.pieces])

    def only(self, piece: int) -> Rung:
        """One diagonal block as a matrix of its own."""
        return replace(self, pieces=(replace(self.pieces[piece], start=0),))


def alike(inverse: Inverse, reference: Rung) -> Inverse:
    """An inverse whose lambda and threshold are numbers: those that it has for a reference of one piece, and so the same for every rung.

    "heuristic" and `relative` go by the eigenvalues of what is inverted. Were they taken anew for every rung, and there for every layer,
    then errors would be those of different dampings too, even between a block-diagonal matrix and itself.
    """
    (piece,) = reference.pieces
    damping, pinv = damping_of(piece.values, inverse, psd=reference.psd), inverse.pinv
    if pinv is not None and inverse.relative:
        pinv = pinv * float(piece.values.abs().max()) or None  # nothing is below a share of 0
    return replace(inverse, damping=damping, pinv=pinv, relative=False)


def from_spectra(name: RungName, blocks: Sequence[Block], spectra: Sequence[Spectrum]) -> Rung:
    """The rung of a dense curvature; each spectrum covers blocks that follow each other."""
    edges = [0]
    for block in blocks:
        edges.append(edges[-1] + block.size)
    pieces = [Piece(edges[found.blocks[0]], found.values, found.vectors) for found in spectra]
    return Rung(name, tuple(pieces), psd=name != "hessian")


def from_factors(name: Literal["ekfac", "kfac"], factors: Sequence[Factor]) -> Rung:
    """The rung of K-FAC or EK-FAC, computed in float64 whatever the factors are stored in."""
    pieces, start = [], 0
    for factor in factors:
        wide = _float64(factor)
        values = spectrum(wide, name).flatten()
        pieces.append(Piece(start, values, wide))
        start += len(values)
    return Rung(name, tuple(pieces), psd=True)


def _float64(factor: Factor) -> Factor:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    return Factor(
        cast(factor.basis_out), cast(factor.basis_in), factor.kfac_out.double(), factor.kfac_in.double(), cast(factor.eigenvalues)
    )


@dataclass(frozen=True)
class Comparison:
    """How far a rung A is from a reference R.

    matrix: ||R - A||_F / ||R||_F. inverse: (inverses,) ||R+ - A+||_F / ||R+||_F, where + is the inverse in question. product: (inverses,)
    ||R A+ - Pi||_F / ||Pi||_F with Pi the projection onto the directions that R's inverse keeps and R damped there as its inverse damps
    it. basis: (shares,) ||V_k^T W_k||_F^2 / k of the k largest eigenvalues' eigenvectors. spectrum: 1 - ||sorted s - sorted t|| / ||s||.
    Not a number where R or its inverse is 0.
    """

    matrix: float
    inverse: Tensor
    product: Tensor
    basis: Tensor
    spectrum: float


def compare(reference: Rung, rung: Rung, inverses: Sequence[Inverse], shares: Sequence[float] = ()) -> Comparison:
    """Compare a rung with a reference, whose pieces have explicit eigenvectors and are each a union of the rung's pieces.

    shares: ascending shares of D, the k of the basis overlap being max(1, round(share x D)).
    """
    s, t, one = reference.values, rung.values, torch.ones(len(rung.values), dtype=torch.float64)
    terms, norms = [(s, one, t)], [s.square().sum()]
    for inverse in inverses:
        f, h = reference.inverted(inverse), rung.inverted(inverse)
        kept = (f != 0).double()
        damped = torch.where(f != 0, 1 / torch.where(f != 0, f, 1.0), s)
        terms += [(f, one, h), (kept, damped, h)]
        norms += [f.square().sum(), kept.sum()]
    totals = torch.zeros(len(terms), dtype=torch.float64)
    left, right = _bins(s, shares), _bins(t, shares)
    common = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for i, j, overlap in overlaps(reference, rung):
        for k, (a, b, c) in enumerate(terms):
            totals[k] += (a[i, None] - b[i, None] * c[j]).square_().mul_(overlap).sum()
        if shares:
            common += left[i].T @ overlap @ right[j]
    errors = (totals / torch.stack(norms)).sqrt()  # 0 / 0 is not a number, as it should be
    return Comparison(float(errors[0]), errors[1::2], errors[2::2], _basis(common, len(s), shares), spectrum_overlap(s, t))


def overlaps(reference: Rung, rung: Rung) -> Iterator[tuple[slice, slice, Tensor]]:
    """O in chunks: (eigenvectors of the reference, eigenvectors of the rung, their squared inner products); what is left out is 0."""
    for outer in reference.pieces:
        for inner in rung.pieces:
            if inner.stop <= outer.start or inner.start >= outer.stop:
                continue
            assert outer.start <= inner.start, "a reference's piece is cut by a piece of the rung"
            assert inner.stop <= outer.stop, "a reference's piece is cut by a piece of the rung"
            step = max(1, CHUNK // len(inner.values))
            rows = outer.rows(inner.start, inner.stop)
            for start in range(0, rows.shape[1], step):
                part = rows[:, start : start + step].T.contiguous()
                squares = inner.rotated(part).square_()
                yield slice(outer.start + start, outer.start + start + len(part)), slice(inner.start, inner.stop), squares


def _bins(values: Tensor, shares: Sequence[float]) -> Tensor:
    """(D, shares) of 0 and 1: the first share of the largest eigenvalues to which each eigenvector belongs, if any."""
    found = torch.zeros(len(values), len(shares), dtype=torch.float64)
    order, start = values.argsort(descending=True, stable=True), 0
    for column, share in enumerate(shares):
        stop = top(share, len(values))
        found[order[start:stop], column] = 1.0
        start = stop
    return found


def _basis(common: Tensor, count: int, shares: Sequence[float]) -> Tensor:
    nested = common.cumsum(0).cumsum(1).diagonal()
    return nested / torch.tensor([top(share, count) for share in shares], dtype=torch.float64)


def top(share: float, count: int) -> int:
    """How many of `count` eigenvectors a share of them is, at least one."""
    return max(1, round(share * count))


def spectrum_overlap(reference: Tensor, values: Tensor) -> float:
    """1 - ||sorted difference|| / ||reference||: 1 for equal spectra (D,)."""
    return float(1 - (reference.sort()[0] - values.sort()[0]).norm() / reference.norm())


def shares_of_steps(errors: Tensor) -> Tensor:
    """Each step's share of the last rung's error: its increase / the total, (..., rungs) -> (..., rungs - 1).

    errors: of the rungs in order, the first being the reference's own, 0. A share is negative where a step brings the rung closer; shares
    sum to 1. Not a number where the last error is 0.
    """
    return errors.diff(dim=-1) / (errors[..., -1:] - errors[..., :1])
