"""Stored chunks are small along queries, yet each is written whole by one task."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.scores import ScoreJob

sizes = st.integers(1, 5000)


def job(**numbers: Any) -> ScoreJob:
    rest = {"scoring_batch": 1, "products": "full", "self_influence": True, "methods": ()}
    return ScoreJob(subject=None, results="", receipts="", **rest, **numbers)  # type: ignore[arg-type]


def test_a_million_examples_and_ten_thousand_queries_are_stored_in_chunks_that_a_row_does_not_regret() -> None:
    large = job(examples=1_000_000, queries=10_000, shard_size=4096, query_block=9984)
    assert large.query_chunk * large.shard_size * 4 == 256 << 10


@pytest.mark.parametrize(
    ("queries", "block", "shard", "chunk"), [(360, 360, 256, 64), (7, 7, 4096, 7), (50, 48, 4096, 16), (50, 23, 4096, 1)]
)
def test_small_runs_have_few_chunks_and_small_ones_no_more_than_needed(queries: int, block: int, shard: int, chunk: int) -> None:
    assert job(examples=1, queries=queries, shard_size=shard, query_block=block).query_chunk == chunk


@given(queries=sizes, block=sizes, shard=sizes)
def test_no_chunk_is_shared_by_two_blocks(queries: int, block: int, shard: int) -> None:
    found = job(examples=1, queries=queries, shard_size=shard, query_block=block)
    owners: dict[int, int] = {}
    for b in range(found.shape[1]):
        for query in found.query_ids(b):
            assert owners.setdefault(query // found.query_chunk, b) == b
