"""Directions: what a gradient method makes of the query gradients, so that its scores are inner products with training gradients.

A direction of a block is either a matrix per query, or a short sum of outer products per query:

    Dense:    V_q                                   matrix (query, groups, out, in)
    Factored: V_q = sum_r left_qr right_qr^T        left (query, rank, groups, out), right (query, rank, groups, in)

Query gradients are kept factored (rank = positions) where that takes less memory than the matrices; what is scored is factored where
that is also fewer multiplications (see `tda.costs`), as it always is for GradDot with one position per example, or where a low rank is
asked for (`tda.lowrank`). Its matrices are then made as they are needed, unless scoring term by term is cheaper.
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
from tda.costs import by_terms, gram_form, rows_smaller
from tda.data import Batching, batches, in_order
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

#: Matrices of factored directions are made for at most this many bytes at a time while they are scored.
MATRIX_BYTES = 32 << 20
#: Directions of more bytes than this, as matrices, are scored from a temporary file (`tda.spooled`).
HELD_BYTES = 256 << 20
#: A block of queries has no more bytes of directions in that file, and matrices are made of terms once for all batches up to it.
SPOOL_BYTES = 2 << 30
#: Examples of a batch, where what is made of the directions serves all batches.
ENDLESS = 1 << 30


def dense(direction: Direction) -> Tensor:
    """The matrices (query, groups, out, in) of a direction."""
    if isinstance(direction, Dense):
        return direction.matrix
    return direction.left.permute(0, 2, 3, 1) @ direction.right.transpose(1, 2)


def count(direction: Direction) -> int:
    """The number of queries."""
    return len(direction.matrix) if isinstance(direction, Dense) else len(direction.left)


def take(direction: Direction, queries: slice | Tensor) -> Direction:
    """The directions of some queries, by a slice or by their places."""
    if isinstance(direction, Dense):
        return Dense(direction.matrix[queries])
    return Factored(direction.left[queries], direction.right[queries])


def scorable(direction: Direction, block: Block) -> Direction:
    """The direction in the cheaper form for scoring examples of this block."""
    if isinstance(direction, Factored) and not gram_form(direction.rank, block.positions, block.out, block.in_):
        return Dense(dense(direction))
    return direction


def held(blocks: Sequence[Block], directions: Sequence[Direction], limit: int = HELD_BYTES) -> list[Direction]:
    """Directions as they are scored: the matrices of all that meet gradients are made at once, where they are within `limit` bytes.

    Embeddings' stay as they are, since only the columns of an example's tokens are needed.
    """
    each = list(zip(blocks, directions, strict=True))
    if sum((d.matrix if isinstance(d, Dense) else d.left).element_size() * count(d) * b.size for b, d in each) > limit:
        return list(directions)
    return [Dense(dense(d)) if meets_gradients(d, b, b.positions, ENDLESS) else d for b, d in each]


def scaled(direction: Direction, by: float | Tensor) -> Direction:
    """The direction times a number, or a number per query (query,)."""
    by = torch.as_tensor(by)
    if isinstance(direction, Dense):
        return Dense(direction.matrix * by.to(direction.matrix).view(-1, 1, 1, 1))
    return Factored(direction.left * by.to(direction.left).view(-1, 1, 1, 1), direction.right)


def meets_gradients(direction: Direction, block: Block, positions: int, batch: int) -> bool:
    """Whether a direction is multiplied with per-example gradients; else with their rows, for which none are made."""
    if block.form == "embedding":
        return False
    if isinstance(direction, Dense):
        return True
    return not by_terms(direction.rank, positions, count(direction), batch, block.out, block.in_)


def inner(direction: Direction, block: Block, pairs: Sequence[Pair], gradients: Tensor | None, products: Products = "full") -> Tensor:
    """<V_q, D_b> for every query and example of a batch: (query, batch).

    gradients: the batch's per-example gradients (batch, groups, out, in), where the direction meets them (`meets_gradients`); else None.
    """
    if gradients is not None:
        return _met(direction, gradients.flatten(1).T, products).to(gradients.dtype)
    if isinstance(direction, Factored):
        return sum((_factored_inner(direction, pair, products) for pair in pairs[1:]), start=_factored_inner(direction, pairs[0], products))
    assert block.form == "embedding"
    return sum((_embedding_inner(direction.matrix, pair) for pair in pairs[1:]), start=_embedding_inner(direction.matrix, pairs[0]))


def _met(direction: Direction, gradients: Tensor, products: Products) -> Tensor:
    """Of gradients (size, batch): (query, batch). Matrices of factored directions are made for as many queries as are bounded in memory."""
    if isinstance(direction, Dense):
        return matmul(direction.matrix.flatten(1), gradients, products)
    step = max(1, MATRIX_BYTES // (len(gradients) * direction.left.element_size()))
    each = [dense(take(direction, slice(k, k + step))).flatten(1) for k in range(0, count(direction), step)]
    return torch.cat([matmul(matrix, gradients, products) for matrix in each])


def _factored_inner(direction: Factored, pair: Pair, products: Products) -> Tensor:
    groups, batch, positions, _ = pair.left.shape
    total = pair.left.new_zeros(len(direction.left), batch)
    left, right = pair.left.flatten(1, 2), pair.right.flatten() if pair.one_hot else pair.right.flatten(1, 2)
    for g in range(groups):
        for r in range(direction.rank):
            a = matmul(direction.left[:, r, g], left[g].T, products)
            b = direction.right[:, r, g][:, right] if pair.one_hot else matmul(direction.right[:, r, g], right[g].T, products)
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


def query_measurements(attributed: Attributed, dataset: Any, ids: Sequence[int], *, batch_size: Batching) -> Tensor:
    """The measurements (query,) of `query_gradients`, by forward passes alone; InputError as there."""
    values, parts = [], list(batches(ids, batch_size))
    with fast_float32(), torch.no_grad():
        for part in parts:
            batch = attributed.load(dataset, part)
            tape = attributed.tape(batch, part)
            values.append(_measured(attributed, tape, batch, part))
    order = in_order(ids, parts)
    return torch.cat(values) if order is None else torch.cat(values)[order]


def _measured(attributed: Attributed, tape: Tape, batch: Batch, ids: Sequence[int]) -> Tensor:
    measured = tape.measurement(tape.precise, batch.targets).to(attributed.dtype)
    check_finite(measured, ids, "measurement of query")
    return measured


def query_gradients(attributed: Attributed, dataset: Any, ids: Sequence[int], *, batch_size: Batching) -> tuple[list[Direction], Tensor]:
    """Gradients of the measurement at the queries, block by block, and the measurements (query,).

    Raises InputError naming the query whose measurement is not finite.
    """
    found: list[list[Direction]] = []
    values, parts = [], list(batches(ids, batch_size))
    with fast_float32():
        for part in parts:
            batch = attributed.load(dataset, part)
            tape = attributed.tape(batch, part)
            values.append(_measured(attributed, tape, batch, part))
            pairs = tape.pairs(tape.seed(tape.measurement))
            found.append([_gradient(block, p) for block, p in zip(attributed.blocks, pairs, strict=True)])
    order = in_order(ids, parts)
    # Parts are let go as they are joined: both together would be twice the memory.
    each = (join([part.pop(0) for part in found]) for _ in attributed.blocks)
    if order is None:
        return list(each), torch.cat(values)
    return [take(direction, order) for direction in each], torch.cat(values)[order]


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
    factored = [padded(part, rank) for part in parts if isinstance(part, Factored)]
    return Factored(torch.cat([p.left for p in factored]), torch.cat([p.right for p in factored]))


def padded(direction: Factored, rank: int) -> Factored:
    """The same with terms of zeros up to `rank`."""

    def more(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(len(rows), rank - rows.shape[1], *rows.shape[2:])], 1)

    return direction if direction.rank == rank else Factored(more(direction.left), more(direction.right))


def extend(whole: Direction | None, part: Direction, start: int, queries: int) -> Direction:
    """`part` from place `start` on in `queries` directions, those before being in `whole`: so that parts are let go one by one."""
    if whole is not None and [t.shape[1:] for t in tensors(whole)] != [t.shape[1:] for t in tensors(part)]:
        part = join([take(whole, slice(start)), part])
        whole, start = None, 0
    if whole is None:
        whole = type(part)(*(t.new_empty(queries, *t.shape[1:]) for t in tensors(part)))
    for into, t in zip(tensors(whole), tensors(part), strict=True):
        into[start : start + len(t)] = t
    return whole


def tensors(direction: Direction) -> tuple[Tensor, ...]:
    """What a direction consists of; the queries are the first axis of each."""
    return (direction.matrix,) if isinstance(direction, Dense) else (direction.left, direction.right)


def squared_norms(direction: Direction) -> Tensor:
    """||V_q||^2, (query,), in float64: squares of small gradients would underflow in float32."""
    each = (take(direction, slice(q, q + 1)) for q in range(count(direction)))
    return torch.stack([dense(one).double().square().sum() for one in each])
