"""Batch, shard and query-block sizes where the user gives none: functions of shapes alone, so that they never depend on the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tda.blocks import Block

#: A batch's captured rows and their copies are kept below this.
BATCH_BYTES = 128 << 20
#: All directions of a query block are kept below this.
DIRECTION_BYTES = 1 << 30


def batch_size(blocks: Sequence[Block], *, itemsize: int) -> int:
    """Examples per forward pass: a power of two whose rows (with two copies for the graph and the rotation) fit BATCH_BYTES."""
    rows = sum(3 * b.positions * b.groups * (b.out + (b.in_ if b.form != "embedding" else 1)) for b in blocks)
    fitting = BATCH_BYTES // max(itemsize * rows, 1)
    return 1 << max(0, min(10, int(math.log2(max(fitting, 1)))))


def shard_size(examples: int) -> int:
    """Training examples per shard: at most 64 shards until they reach 4,096 examples, and none below 256."""
    return max(256, min(4096, math.ceil(examples / 64)))


def query_block(blocks: Sequence[Block], queries: int, methods: int, *, itemsize: int) -> int:
    """Queries whose directions are held in memory at a time."""
    each = itemsize * methods * sum(b.size for b in blocks)
    return max(1, min(queries, DIRECTION_BYTES // max(each, 1)))
