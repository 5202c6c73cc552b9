"""Random projections of gradients (Johnson & Lindenstrauss): few numbers per example whose inner products are nearly the gradients'.

    phi = P g / sqrt(k),   P (k, D) of signs +-1,   E[phi . phi'] = g . g'

Row r of the signs of block b is the stream of bits that Philox gives for the key (seed, b, r): the same on any device, in any batch and
for any k. Where P would have more than DENSE entries its rows are outer products, for each block and group of a left (out,) and a right
(in,) row of signs: phi_r = left_r^T D right_r, the same in expectation and with more spread. Where k is no less than what is projected,
nothing is: phi = g.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tda.blocks import Block, Pair, example_gradients
from tda.directions import Dense, Direction, dense, take
from tda.flat import total
from tda.self_products import GRADIENT_BYTES, part_of

#: Entries of a projection's matrix up to which it is written out: 256 MiB in float32.
DENSE = 1 << 26


@dataclass(frozen=True)
class Projection:
    """dim: rows k. seed: of the signs. per_layer: whether every block is projected by itself, and keeps its own curvature."""

    dim: int
    seed: int
    per_layer: bool = False

    @property
    def name(self) -> str:
        """All but the seed, as text."""
        return f"{self.dim} per layer" if self.per_layer else str(self.dim)

    @staticmethod
    def named(name: str, seed: int) -> Projection:
        """The projection of that name."""
        return Projection(int(name.split(maxsplit=1)[0]), seed, name.endswith("per layer"))

    def parts(self, blocks: Sequence[Block]) -> list[tuple[int, ...]]:
        """The numbers of the blocks that are projected together."""
        return [(b,) for b in range(len(blocks))] if self.per_layer else [tuple(range(len(blocks)))]

    def kind(self, blocks: Sequence[Block], part: Sequence[int]) -> str:
        """How the gradients of some blocks are projected: "none", "dense" or "outer"."""
        size = total([blocks[b] for b in part])
        if size <= self.dim:
            return "none"
        return "dense" if self.dim * total(blocks) <= DENSE else "outer"


def project_examples(projection: Projection, blocks: Sequence[Block], pairs: Iterable[Sequence[Pair]], batch: int) -> list[Tensor]:
    """Features (batch, k) of a batch of gradients for each part; pairs: of every block in order, which may be a generator."""
    found: dict[int, Tensor] = {}
    for b, each in enumerate(pairs):
        if each:
            add_block(projection, blocks, b, each, found)
    return features_of(projection, blocks, found, batch)


def add_block(projection: Projection, blocks: Sequence[Block], b: int, pairs: Sequence[Pair], found: dict[int, Tensor]) -> None:
    """Project a batch's gradients of block number b, and add them to what the blocks before it gave: see `features_of`."""
    block, batch = blocks[b], pairs[0].left.shape[1]
    part = next(part for part in projection.parts(blocks) if b in part)
    kind = projection.kind(blocks, part)
    if kind == "outer":
        signs = _signs(projection, b, block, pairs[0].left)
        step = _step(block.groups * max(pair.positions for pair in pairs) * projection.dim)
        some = [[part_of(pair, k, k + step) for pair in pairs] for k in range(0, batch, step)]
        rows = torch.cat([torch.stack([_outer_rows(signs, pair) for pair in p]).sum(0) for p in some])
    else:
        step = _step(block.size)
        some = [[part_of(pair, k, k + step) for pair in pairs] for k in range(0, batch, step)]
        rows = torch.cat([_flat_rows(projection, b, block, kind, example_gradients(block, p).flatten(1)) for p in some])
    place = b if kind == "none" else part[0]  # sums of a part lie under its first block
    found[place] = found[place] + rows if place in found else rows


def features_of(projection: Projection, blocks: Sequence[Block], found: dict[int, Tensor], batch: int) -> list[Tensor]:
    """Features (batch, k) of each part, from what `add_block` found for all blocks."""
    return [_joined(projection, blocks, part, found, batch) for part in projection.parts(blocks)]


def project(projection: Projection, blocks: Sequence[Block], gradients: Sequence[Direction]) -> list[Tensor]:
    """Features (query, k) of query gradients for each part."""
    parts, found = projection.parts(blocks), dict[int, Tensor]()
    kinds = {b: projection.kind(blocks, part) for part in parts for b in part}
    first = gradients[0]
    queries = len(first.matrix if isinstance(first, Dense) else first.left)
    for b, (block, gradient) in enumerate(zip(blocks, gradients, strict=True)):
        step = _step(max(block.size, block.groups * block.out * projection.dim) if kinds[b] == "outer" else block.size)
        each = [dense(take(gradient, slice(k, k + step))) for k in range(0, queries, step)]
        if kinds[b] == "outer":
            signs = _signs(projection, b, block, each[0])
            found[b] = torch.cat([torch.einsum("qgoi,rgi,rgo->qr", m, signs[1], signs[0]) for m in each])
        else:
            found[b] = torch.cat([_flat_rows(projection, b, block, kinds[b], m.flatten(1)) for m in each])
    return [_joined(projection, blocks, part, found, queries) for part in parts]


def lift(projection: Projection, blocks: Sequence[Block], features: Sequence[Tensor]) -> list[Tensor]:
    """P^T times features (query, k) of each part, back as matrices (query, groups, out, in) block by block: <lift(c), g> = c . phi."""
    found: list[Tensor] = [torch.empty(0)] * len(blocks)
    for part, rows in zip(projection.parts(blocks), features, strict=True):
        kind, start = projection.kind(blocks, part), 0
        for b in part:
            block = blocks[b]
            shape = (len(rows), block.groups, block.out, block.in_)
            if kind == "none":
                found[b] = rows[:, start : start + block.size].reshape(shape)
                start += block.size
            elif kind == "dense":
                found[b] = (rows / math.sqrt(projection.dim) @ _matrix(projection, b, block, rows)).view(shape)
            else:
                left, right = _signs(projection, b, block, rows)
                each = [torch.einsum("r,rgo,rgi->goi", row, left, right) for row in rows / math.sqrt(projection.dim)]
                found[b] = torch.stack(each)
    return found


def _step(numbers: int) -> int:
    """How many examples are taken at a time, with so many numbers of each in memory."""
    return max(1, GRADIENT_BYTES // (4 * numbers))


def _joined(projection: Projection, blocks: Sequence[Block], part: Sequence[int], found: dict[int, Tensor], count: int) -> Tensor:
    """What the blocks of a part give: side by side where nothing is projected, else their sum over sqrt(k)."""
    like = next(iter(found.values()))
    if projection.kind(blocks, part) == "none":
        return torch.cat([found[b] if b in found else like.new_zeros(count, blocks[b].size) for b in part], 1)
    summed: Tensor = sum((found[b] for b in part if b in found), start=like.new_zeros(count, projection.dim))
    return summed / math.sqrt(projection.dim)


def _flat_rows(projection: Projection, b: int, block: Block, kind: str, rows: Tensor) -> Tensor:
    return rows if kind == "none" else rows @ _matrix(projection, b, block, rows).T


def _outer_rows(signs: tuple[Tensor, Tensor], pair: Pair) -> Tensor:
    """sum_t (left_r . l_t) (right_r . r_t) over groups: (batch, k)."""
    left = torch.einsum("gbto,rgo->gbtr", pair.left, signs[0])
    right = signs[1][:, 0].T[pair.right][None] if pair.one_hot else torch.einsum("gbti,rgi->gbtr", pair.right, signs[1])
    return (left * right).sum((0, 2))


def _matrix(projection: Projection, b: int, block: Block, like: Tensor) -> Tensor:
    """The signs (k, size) of a block."""
    return _rows(projection, b, block.size, like)


def _signs(projection: Projection, b: int, block: Block, like: Tensor) -> tuple[Tensor, Tensor]:
    """The signs of a block whose rows are outer products: left (k, groups, out), right (k, groups, in)."""
    sizes = (block.groups * block.out, block.groups * block.in_)
    left, right = _rows(projection, b, sum(sizes), like).split(sizes, 1)
    return left.reshape(-1, block.groups, block.out), right.reshape(-1, block.groups, block.in_)


def _rows(projection: Projection, b: int, size: int, like: Tensor) -> Tensor:
    """Signs (k, size) of a block, of the dtype and on the device of `like`; drawn once for the projection that is at work."""
    kept = _kept(projection, like.dtype, like.device)
    if (b, size) not in kept:
        kept[b, size] = torch.stack([_row(projection.seed, b, r, size, like.dtype) for r in range(projection.dim)]).to(like.device)
    return kept[b, size]


@lru_cache(maxsize=1)
def _kept(projection: Projection, dtype: torch.dtype, device: torch.device) -> dict[tuple[int, int], Tensor]:  # noqa: ARG001  (its key)
    return {}


def _row(seed: int, b: int, r: int, size: int, dtype: torch.dtype) -> Tensor:
    """Signs (size,): bits of the Philox stream keyed by (seed, block, row)."""
    stream = np.random.Philox(key=[seed & (2**64 - 1), (b << 32) + r]).random_raw(-(-size // 64))
    bits = np.unpackbits(np.ascontiguousarray(stream, "<u8").view(np.uint8), count=size, bitorder="little")
    return torch.from_numpy(bits).to(dtype) * 2 - 1
