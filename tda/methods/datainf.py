"""DataInf: the mean of the inverses in place of the inverse of the mean (Kwon et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor

from tda.attributed import Attributed
from tda.blocks import Block, Pair, example_gradients
from tda.curvature.inverse import HEURISTIC, Damping
from tda.data import batches
from tda.directions import Dense, Direction, dense
from tda.methods.options import SaneDamping
from tda.methods.shortened import Shortened
from tda.methods.work import Made, Work
from tda.products import Products, fast_float32, matmul
from tda.self_products import GRADIENT_BYTES, gradient_squares, part_of


class DataInf(Shortened):
    """influence[q, i] = -(1/N) g_q^T M g_i per layer, M = (1/N) sum_j (g_j g_j^T + lambda I)^-1.

    By Sherman and Morrison M v = (1/lambda) (v - (1/N) sum_j g_j (g_j . v) / (lambda + |g_j|^2)): a pass over the training gradients for
    each block of queries is all it takes. damping: lambda > 0, or "heuristic" as in the paper, 0.1 x the layer's mean squared gradient,
    sum_j |g_j|^2 / (N d) with d the layer's parameters, for which one more pass is made.
    """

    name: Literal["datainf"] = "datainf"
    damping: SaneDamping = "heuristic"

    @field_validator("damping")
    @classmethod
    def _damping_is_not_zero(cls, value: Damping) -> Damping:
        if value == 0:
            raise ValueError('damping must be above 0, or "heuristic": the inverse of a single example\'s g g^T does not exist')
        return value

    @property
    def shares_passes(self) -> bool:
        """One, and one for a damping that is found."""
        return True

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_q = -M g_q in every layer; told: the damping of each."""
        with fast_float32():
            queries = [dense(gradient) for gradient in gradients]
            dampings = self._dampings(work)
            sums = [torch.zeros_like(matrix, dtype=torch.float64) for matrix in queries]
            for block, b, pairs in _pairs(work.attributed, work.train, work.batch_size):
                if dampings[b] > 0:
                    _add(sums[b], queries[b], block, pairs, dampings[b], work.products)
        made: list[Direction] = []
        for v, total, damping in zip(queries, sums, dampings, strict=True):
            # A layer in which no example has a gradient has no damping either, and scores nothing.
            made.append(Dense(((total / len(work.train) - v) / (damping or 1.0)).to(v.dtype)))
        return Made([made], {"damping": dampings})

    def _dampings(self, work: Work) -> list[float]:
        """lambda of every layer."""
        blocks = work.attributed.blocks
        if self.damping != "heuristic":
            return [float(self.damping)] * len(blocks)
        sums = [0.0] * len(blocks)
        for block, b, pairs in _pairs(work.attributed, work.train, work.batch_size):
            sums[b] += float(gradient_squares(block, pairs).sum())
        return [HEURISTIC * total / (len(work.train) * block.size) for block, total in zip(blocks, sums, strict=True)]


def _pairs(attributed: Attributed, dataset: Sequence[object], batch_size: int) -> Iterator[tuple[Block, int, list[Pair]]]:
    """The training gradients batch by batch: every block that the batch uses, its number, its pairs."""
    for part in batches(range(len(dataset)), batch_size):
        tape = attributed.tape(attributed.load(dataset, part), part)
        every = zip(attributed.blocks, tape.pairs(tape.seed(attributed.problem.likelihood.loss)), strict=True)
        yield from ((block, b, pairs) for b, (block, pairs) in enumerate(every) if pairs)


def _add(total: Tensor, queries: Tensor, block: Block, pairs: Sequence[Pair], damping: float, products: Products) -> None:
    """Add sum_j g_j (g_j . v) / (lambda + |g_j|^2) of a batch to (query, groups, out, in), in pieces that bound the memory."""
    step = max(1, GRADIENT_BYTES // (4 * block.size))
    for start in range(0, pairs[0].left.shape[1], step):
        some = example_gradients(block, [part_of(pair, start, start + step) for pair in pairs]).flatten(1)
        weight = (1 / (damping + some.double().square().sum(1))).to(some.dtype)
        shares = matmul(queries.flatten(1), some.T, products) * weight
        total += matmul(shares, some, products).view(total.shape)
