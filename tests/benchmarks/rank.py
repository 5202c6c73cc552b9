"""What directions of low rank save where queries are many: milliseconds per training sequence of case T, with files of the same size.

    TDA_CASES=folder python -m tests.benchmarks.rank --queries 1024 --file 2048

Directions are drawn at random: only the pass over the training sequences is timed (processor time, the least of three), not how directions
are made. In full, as many queries are scored at a time as the temporary file holds (`tda.spooled`), and every block of queries takes a pass
of its own; in a low rank, it holds more of them. Quality: `python -m tests.benchmarks.compare --case T`.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from tda import sizes
from tda.attributed import Attributed
from tda.data import batches
from tda.directions import SPOOL_BYTES, Dense, Direction, Factored
from tda.lowrank import keeps_full
from tda.scoring import Scorer, score
from tda.spooled import Met, spooled
from tests import cases
from tests.benchmarks.ours import Examples, prepared


def drawn(attributed: Attributed, queries: int, rank: int | None) -> list[Direction]:
    """Directions of so many queries."""
    found: list[Direction] = []
    for b in attributed.blocks:
        if rank is None or keeps_full(b, rank):
            found.append(Dense(torch.randn(queries, b.groups, b.out, b.in_)))
        else:
            found.append(Factored(torch.randn(queries, rank, b.groups, b.out), torch.randn(queries, rank, b.groups, b.in_)))
    return found


def milliseconds(attributed: Attributed, train: Examples, directions: Sequence[Met], queries: int, batch: int) -> float:
    """Of one pass, per sequence."""
    scorer, took = Scorer("drawn", directions, torch.ones(queries)), []
    for _ in range(3):
        begin = time.process_time()
        score(attributed, [scorer], train, range(len(train)), examples=len(train), batch_size=batch, self_influence=False)
        took.append(time.process_time() - begin)
    return 1000 * min(took) / len(train)


def main(argv: list[str]) -> None:
    """A line for full directions and one for each rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--file", type=int, default=SPOOL_BYTES >> 20, help="MiB of directions at a time")
    parser.add_argument("--ranks", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--sequences", type=int, default=64)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    attributed, train, _ = prepared(cases.load_case("T", torch.float32), options.sequences)
    limit = options.file << 20
    first = 0.0
    for rank in (None, *options.ranks):
        each = 4 * sizes.direction_numbers(attributed.blocks, [rank])
        block = max(1, min(options.queries, limit // each))
        passes = -(-options.queries // block)
        parts = (drawn(attributed, len(some), rank) for some in batches(range(block), 16))
        directions = spooled(attributed.blocks, parts, block, rank=rank, limit=limit)
        size = sizes.scoring_batch(attributed.blocks, 8, block, [rank], itemsize=4)
        took = passes * milliseconds(attributed, train, directions, block, size)
        first = first or took
        name = "in full" if rank is None else f"rank {rank}"
        print(
            f"{name:8} {block:5} queries at a time, {passes:3} passes: {took:7.1f} ms per sequence, {first / took:.1f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
