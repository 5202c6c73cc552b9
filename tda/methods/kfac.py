"""K-FAC influence: the inverse of a Kronecker product of covariances, layer by layer (Martens & Grosse 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tda.blocks import Block
from tda.curvature.eigen import Factor
from tda.curvature.fisher import Fisher
from tda.curvature.inverse import damping_value, inverse_eigenvalues
from tda.directions import Dense, Direction, count, take
from tda.lowrank import Short, joined, keeps_full, stated
from tda.methods.options import SaneDamping
from tda.methods.precondition import precondition, precondition_short
from tda.methods.shortened import Shortened
from tda.methods.work import Fit, Made, Work
from tda.products import Products, fast_float32
from tda.self_products import Kronecker, Own

#: Entries of query gradients preconditioned at a time: bounds the temporary matrices.
CHUNK = 1 << 22


class KFAC(Shortened):
    """influence[q, i] = -(1/N) g_q^T (S (x) A + lambda I)^-1 g_i per layer.

    fisher: "exact" (expectation over labels; few classes or a Gaussian likelihood), "sampled" (labels drawn per example id) or
    "empirical" (the data's labels). damping: an absolute lambda for every layer, or "heuristic", 0.1 x the layer's mean eigenvalue.
    """

    name: Literal["kfac"] = "kfac"
    fisher: Fisher = "sampled"
    damping: SaneDamping = "heuristic"
    #: Which eigenvalues it takes.
    spectrum: ClassVar[Literal["kfac", "ekfac"]] = "kfac"

    @property
    def fits(self) -> tuple[Fit, ...]:
        """Its Fisher's factors."""
        return (Fit("kronecker", self.fisher),)

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_q = -(F + lambda I)^-1 g_q in the Kronecker eigenbasis, block by block."""
        (factors,) = work.curvature
        each = list(zip(work.attributed.blocks, factors, gradients, strict=True))
        with fast_float32():
            if self.query_rank is None:
                return Made([[self.direction(block, factor, g, work.products) for block, factor, g in each]])
            made: list[Direction] = []
            errors: list[Tensor | None] = []
            for block, factor, gradient in each:
                if keeps_full(block, self.query_rank):
                    made.append(self.direction(block, factor, gradient, work.products))
                    errors.append(None)
                else:
                    short = self._short(block, factor, gradient, self.query_rank, work.products)
                    made.append(short.direction)
                    errors.append(short.error)
        return Made([made], {"low_rank": stated(work.attributed.blocks, self.query_rank, errors)})

    def _short(self, block: Block, factor: Factor, gradient: Direction, rank: int, products: Products) -> Short:
        """V_q of one block in `rank` terms."""
        inverse = -inverse_eigenvalues(factor, self.spectrum, self.damping)
        step = max(1, CHUNK // block.size)
        some = (take(gradient, slice(k, k + step)) for k in range(0, count(gradient), step))
        return joined([precondition_short(factor, each, inverse, rank, products) for each in some])

    def direction(self, block: Block, factor: Factor, gradient: Direction, products: Products) -> Direction:
        """V_q of one block."""
        inverse = -inverse_eigenvalues(factor, self.spectrum, self.damping)
        queries = count(gradient)
        dtype = torch.bfloat16 if products == "bfloat16" else inverse.dtype
        matrix = inverse.new_empty(queries, *inverse.shape, dtype=dtype)
        step = max(1, CHUNK // block.size)
        for k in range(0, queries, step):
            some = slice(k, k + step)
            matrix[some] = precondition(factor, take(gradient, some), inverse, products)
        return Dense(matrix)

    def damping_of(self, curvature: Sequence[Any]) -> list[float]:
        """lambda of every block."""
        return [damping_value(factor, self.spectrum, self.damping) for factor in curvature[0]]

    def own(self, curvature: Sequence[Any]) -> Own:
        """g^T (F + lambda I)^-1 g."""
        return Kronecker(curvature[0], [inverse_eigenvalues(factor, self.spectrum, self.damping) for factor in curvature[0]])
