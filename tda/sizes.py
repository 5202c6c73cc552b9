"""Batch, shard and query-block sizes where the user gives none: functions of shapes alone, so that they never depend on the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tda.blocks import Block

#: A batch's captured rows and their copies are kept below this.
BATCH_BYTES = 128 << 20
#: Directions of more bytes than this are streamed from memory for every batch.
STREAMED_BYTES = 256 << 20
#: All directions of a query block are kept below this.
DIRECTION_BYTES = 1 << 30


def batch_size(blocks: Sequence[Block], outputs: int, *, itemsize: int) -> int:
    """Examples per forward pass: a power of two whose captured rows, graph and copies fit BATCH_BYTES.

    Measured with and without convolutions: a row costs about 1.5 times itself; a convolution's patches twice, its output six times; the
    model's `outputs` are held about four times in float64.
    """
    fitting = BATCH_BYTES // max(int(itemsize * sum(map(_held, blocks)) + 32 * outputs), 1)
    return 1 << max(0, min(10, int(math.log2(max(fitting, 1)))))


def _held(block: Block) -> float:
    """Numbers held for one example of a block while it is computed."""
    if block.form == "conv":
        return 2 * block.positions * block.groups * (3 * block.out + block.in_)
    return 1.5 * block.positions * block.groups * (block.out + (block.in_ if block.form != "embedding" else 1))


def scoring_batch(blocks: Sequence[Block], batch: int, queries: int, *, itemsize: int) -> int:
    """Examples per forward pass while scoring: `batch`, or more where the directions are so many bytes that reading them costs time.

    Every batch reads all directions once; beyond the caches a batch that is too small waits for memory instead of multiplying.
    """
    directions = itemsize * queries * sum(b.size for b in blocks)
    return batch * (2 if directions > STREAMED_BYTES else 1)


def shard_size(examples: int) -> int:
    """Training examples per shard: at most 64 shards until they reach 4,096 examples, and none below 256."""
    return max(256, min(4096, math.ceil(examples / 64)))


def query_block(blocks: Sequence[Block], queries: int, methods: int, *, itemsize: int) -> int:
    """Queries whose directions are held in memory at a time."""
    each = itemsize * methods * sum(b.size for b in blocks)
    return max(1, min(queries, DIRECTION_BYTES // max(each, 1)))
