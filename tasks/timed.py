"""How fast this machine computes a run's shards: one shard, or as much of it as a few seconds hold."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from tasks.projected import Work, forward
from tasks.subject import Opened
from tda.data import batches
from tda.directions import Dense, dense, query_gradients
from tda.scoring import Scorer, score

#: Queries whose gradients stand for directions, and seconds after which the rest of a shard is left out.
QUERIES, SECONDS = 16, 5.0


def measured_flops(opened: Opened, work: Work) -> float:
    """Operations a second of one worker with this process's torch threads, on the first training shard against the first queries.

    The first batch is left out: what a library does once is in it.
    """
    queries = range(min(QUERIES, work.queries))
    directions, _ = query_gradients(opened.attributed, opened.query, queries, batch_size=work.batch)
    scorers = [
        Scorer("dense", [Dense(dense(direction)) for direction in directions], torch.ones(len(queries), device=opened.attributed.device))
    ]

    def scored(ids: Sequence[int]) -> None:
        score(opened.attributed, scorers, opened.train, ids, examples=work.examples, batch_size=work.scoring, self_influence=False)

    parts = list(batches(range(min(work.shard, work.examples)), work.scoring))
    scored(parts[0])
    started, done = time.perf_counter(), 0
    for part in parts[1:] or parts:
        scored(part)
        done += len(part)
        if time.perf_counter() - started > SECONDS:
            break
    blocks = work.shapes.blocks
    each = 2 * forward(blocks) + sum(2.0 * b.positions * b.size for b in blocks) + 2.0 * len(queries) * work.shapes.parameters
    return done * each / (time.perf_counter() - started)
