"""Batch, shard and query-block sizes where the user gives none: functions of shapes alone, so that they never depend on the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tda.blocks import Block
from tda.directions import SPOOL_BYTES
from tda.lowrank import keeps_full

#: A batch's captured rows and their copies are kept below this.
BATCH_BYTES = 128 << 20
#: Directions of more bytes than this, beyond the caches, are streamed from memory for every batch.
STREAMED_BYTES = 64 << 20
#: What is held for the queries whose directions are made at a time is kept below this; where each step of their making is a pass over
#: the training set, which they share, below SHARED_BYTES.
MADE_BYTES, SHARED_BYTES = 256 << 20, 1 << 30
#: Scores of a shard are kept below this.
SCORE_BYTES = 128 << 20


def batch_size(blocks: Sequence[Block], outputs: int, *, itemsize: int) -> int:
    """Examples per forward pass: a power of two whose captured rows, graph and copies fit BATCH_BYTES.

    Measured with and without convolutions: a row costs about 1.5 times itself; a convolution's patches twice, its output six times; the
    model's `outputs` are held about four times in float64.
    """
    fitting = BATCH_BYTES // max(example_bytes(blocks, outputs, itemsize=itemsize), 1)
    return 1 << max(0, min(10, int(math.log2(max(fitting, 1)))))


def batch_tokens(blocks: Sequence[Block], outputs: int, seen: int, *, itemsize: int) -> int:
    """Tokens per forward pass of sequences: as many as fit BATCH_BYTES. blocks and outputs are those of examples of `seen` tokens."""
    return max(1, BATCH_BYTES * seen // max(example_bytes(blocks, outputs, itemsize=itemsize), 1))


def example_bytes(blocks: Sequence[Block], outputs: int, *, itemsize: int) -> int:
    """What one example of a batch takes while it is computed."""
    return int(itemsize * sum(map(_held, blocks)) + 32 * outputs)


def _held(block: Block) -> float:
    """Numbers held for one example of a block while it is computed."""
    if block.form == "conv":
        return 2 * block.positions * block.groups * (3 * block.out + block.in_)
    return 1.5 * block.positions * block.groups * (block.out + (block.in_ if block.form != "embedding" else 1))


def scoring_batch(blocks: Sequence[Block], batch: int, queries: int, ranks: Sequence[int | None], *, itemsize: int) -> int:
    """Examples per forward pass while scoring: `batch`, or more where the directions are so many bytes that reading them costs time.

    Every batch reads all directions once; beyond the caches a batch that is too small waits for memory instead of multiplying. Where
    matrices are made of low ranks anew for every batch (`tda.spooled`), that is shared by more examples still.
    """
    short, whole = (itemsize * queries * direction_numbers(blocks, each) for each in (ranks, [None] * len(ranks)))
    if short < whole and whole > SPOOL_BYTES:
        return 4 * batch
    return batch * (2 if whole > STREAMED_BYTES else 1)


def shard_size(examples: int) -> int:
    """Training examples per shard: at most 64 shards until they reach 4,096 examples, and none below 256."""
    return max(256, min(4096, math.ceil(examples / 64)))


def direction_numbers(blocks: Sequence[Block], ranks: Sequence[int | None]) -> int:
    """Numbers in the directions of one query: of as many passes over training gradients as there are ranks, None being in full."""
    return sum(b.size if rank is None or keeps_full(b, rank) else b.groups * rank * (b.out + b.in_) for rank in ranks for b in blocks)


def query_block(blocks: Sequence[Block], queries: int, ranks: Sequence[int | None], shard: int, *, itemsize: int) -> int:
    """Queries that are scored in one pass over the training set: one direction for each of `ranks`, as in `direction_numbers`.

    As many as fit a temporary file of SPOOL_BYTES (`tda.spooled`), and whose scores of a shard of so many examples fit SCORE_BYTES.
    """
    each = itemsize * direction_numbers(blocks, ranks)
    scores = 2 * itemsize * max(len(ranks), 1) * shard
    return max(1, min(queries, SPOOL_BYTES // max(each, 1), SCORE_BYTES // scores))


def made_block(blocks: Sequence[Block], queries: int, vectors: int, *, itemsize: int, shared: bool) -> int:
    """Queries whose directions are made at a time, so many vectors of all parameters being held for each.

    shared: whether they share passes over the training set, which more queries at a time make fewer.
    """
    each = itemsize * vectors * sum(block.size for block in blocks)
    return max(1, min(queries, (SHARED_BYTES if shared else MADE_BYTES) // max(each, 1)))
