"""Directions: what a gradient method makes of the query gradients, so that its scores are inner products with training gradients.

A direction of a block is either a matrix per query, or a short sum of outer products per query:

    Dense:    V_q                                   matrix (query, groups, out, in)
    Factored: V_q = sum_r left_qr right_qr^T        left (query, rank, groups, out), right (query, rank, groups, in)

Query gradients are kept factored (rank = positions) where that takes less memory than the matrices; what is scored is factored only
where that is also fewer multiplications (see `tda.costs`), as it always is for GradDot with one position per example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda.attributed import Attributed
from tda.blocks import Block, Pair, example_gradients
from tda.capture import Tape
from tda.costs import gram_form, rows_smaller
from tda.data import batches
from tda.errors import InputError
from tda.problem import Batch
from tda.products import Products, fast_float32, matmul


@dataclass(frozen=True)
class Dense:
    """One matrix per query: (query, groups, out, in)."""

    matrix: Tensor


@dataclass(frozen=True)
class Factored:
    """A sum of `rank` outer products per query: left (query, rank, groups, out), right (query, rank, groups, in)."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number of outer products."""
        return int(self.left.shape[1])


Direction = Dense | Factored


def dense(direction: Direction) -> Tensor:
    """The matrices (query, groups, out, in) of a direction."""
    if isinstance(direction, Dense):
        return direction.matrix
    return direction.left.permute(0, 2, 3, 1) @ direction.right.transpose(1, 2)


def count(direction: Direction) -> int:
    """The number of queries."""
    return len(direction.matrix) if isinstance(direction, Dense) else len(direction.left)


def take(direction: Direction, queries: slice) -> Direction:
    """The directions of some queries."""
    if isinstance(direction, Dense):
        return Dense(direction.matrix[queries])
    return Factored(direction.left[queries], direction.right[queries])


def scorable(direction: Direction, block: Block) -> Direction:
    """The direction in the cheaper form for scoring examples of this block."""
    if isinstance(direction, Factored) and not gram_form(direction.rank, block.positions, block.out, block.in_):
        return Dense(dense(direction))
    return direction


def scaled(direction: Direction, by: float | Tensor) -> Direction:
    """The direction times a number, or a number per query (query,)."""
    by = torch.as_tensor(by)
    if isinstance(direction, Dense):
        return Dense(direction.matrix * by.to(direction.matrix).view(-1, 1, 1, 1))
    return Factored(direction.left * by.to(direction.left).view(-1, 1, 1, 1), direction.right)


def inner(direction: Direction, block: Block, pairs: Sequence[Pair], gradients: Tensor | None, products: Products = "full") -> Tensor:
    """<V_q, D_b> for every query and example of a batch: (query, batch).

    gradients: the batch's per-example gradients (batch, groups, out, in), needed by a dense direction unless the block is an embedding.
    """
    if isinstance(direction, Factored):
        return sum((_factored_inner(direction, pair, products) for pair in pairs[1:]), start=_factored_inner(direction, pairs[0], products))
    if block.form == "embedding":
        return sum((_embedding_inner(direction.matrix, pair) for pair in pairs[1:]), start=_embedding_inner(direction.matrix, pairs[0]))
    assert gradients is not None
    return matmul(direction.matrix.flatten(1), gradients.flatten(1).T, products).to(gradients.dtype)


def _factored_inner(direction: Factored, pair: Pair, products: Products) -> Tensor:
    groups, batch, positions, _ = pair.left.shape
    total = pair.left.new_zeros(len(direction.left), batch)
    left, right = pair.left.flatten(1, 2), pair.right.flatten(1, 2)
    for g in range(groups):
        for r in range(direction.rank):
            a = matmul(direction.left[:, r, g], left[g].T, products)
            b = matmul(direction.right[:, r, g], right[g].T, products)
            if positions == 1:
                total.addcmul_(a, b)
            else:
                total += (a * b).view(len(a), batch, positions).sum(2)
    return total


def _embedding_inner(matrix: Tensor, pair: Pair) -> Tensor:
    """Only the columns of the tokens that an example has are touched."""
    columns = matrix[:, 0]
    each = [torch.einsum("qdt,td->q", columns[:, :, ids], rows) for rows, ids in zip(pair.left[0], pair.right, strict=True)]
    return torch.stack(each, 1)


def query_measurements(attributed: Attributed, dataset: Any, ids: Sequence[int], *, batch_size: int) -> Tensor:
    """The measurements (query,) of `query_gradients`, by forward passes alone; InputError as there."""
    values = []
    with fast_float32(), torch.no_grad():
        for part in batches(ids, batch_size):
            batch = attributed.load(dataset, part)
            tape = attributed.tape(batch)
            values.append(_measured(attributed, tape, batch, part))
    return torch.cat(values)


def _measured(attributed: Attributed, tape: Tape, batch: Batch, ids: Sequence[int]) -> Tensor:
    measured = tape.measurement(tape.precise, batch.targets).to(attributed.dtype)
    check_finite(measured, ids, "measurement of query")
    return measured


def query_gradients(attributed: Attributed, dataset: Any, ids: Sequence[int], *, batch_size: int) -> tuple[list[Direction], Tensor]:
    """Gradients of the measurement at the queries, block by block, and the measurements (query,).

    Raises InputError naming the query whose measurement is not finite.
    """
    found: list[list[Direction]] = []
    values = []
    with fast_float32():
        for part in batches(ids, batch_size):
            batch = attributed.load(dataset, part)
            tape = attributed.tape(batch)
            values.append(_measured(attributed, tape, batch, part))
            pairs = tape.pairs(tape.seed(tape.measurement))
            found.append([_gradient(block, p) for block, p in zip(attributed.blocks, pairs, strict=True)])
    # Parts are let go as they are joined: both together would be twice the memory.
    return [join([part.pop(0) for part in found]) for _ in attributed.blocks], torch.cat(values)


def check_finite(values: Tensor, ids: Sequence[int], what: str) -> None:
    """InputError naming the first id whose value is NaN or infinite."""
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise InputError(f"the {what} {ids[first]} is {float(values[first])}; mend the example or the model's outputs")


def _gradient(block: Block, pairs: Sequence[Pair]) -> Direction:
    positions = sum(pair.positions for pair in pairs)
    if any(pair.one_hot for pair in pairs) or not rows_smaller(positions, block.out, block.in_):
        return Dense(example_gradients(block, pairs))
    left, right = (torch.cat([getattr(pair, side) for pair in pairs], 2).permute(1, 2, 0, 3) for side in ("left", "right"))
    return Factored(left, right)


def join(parts: Sequence[Direction]) -> Direction:
    """The directions of several groups of queries as those of one."""
    if any(isinstance(part, Dense) for part in parts):
        return Dense(torch.cat([dense(part) for part in parts]))
    rank = max(part.rank for part in parts if isinstance(part, Factored))

    def padded(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(len(rows), rank - rows.shape[1], *rows.shape[2:])], 1)

    factored = [part for part in parts if isinstance(part, Factored)]
    return Factored(torch.cat([padded(p.left) for p in factored]), torch.cat([padded(p.right) for p in factored]))


def squared_norms(direction: Direction) -> Tensor:
    """||V_q||^2, (query,), in float64: squares of small gradients would underflow in float32."""
    each = (take(direction, slice(q, q + 1)) for q in range(count(direction)))
    return torch.stack([dense(one).double().square().sum() for one in each])
