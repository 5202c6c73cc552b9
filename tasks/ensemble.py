"""An ensemble's scores: the mean over models trained with different seeds, and its standard error."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tasks import layout
from tasks.scores import ScoreJob, create_results, verify_shard
from tda import location


@dataclass(frozen=True)
class MeanJob:
    """The mean of a run's members. results: URL of what is written; members: whose results are read."""

    results: str
    members: tuple[ScoreJob, ...]

    @property
    def first(self) -> ScoreJob:
        """A member: all have the same sizes."""
        return self.members[0]


def create_means(job: MeanJob, labels: dict[str, np.ndarray | None], attrs: dict[str, Any]) -> None:
    """Create the run's own arrays: those of a member, and the standard error; called once, before any shard writes."""
    first = job.first
    create_results(first, labels, {**attrs, "members": len(job.members)}, job.results)
    group = location.open_group(job.results, "a")
    shape = (len(first.methods), first.queries, first.examples)
    layout.ensure_array(group, "stderr", shape, (1, first.query_chunk, first.shard_size))
    location.seal(job.results)


def average_shard(task: tuple[MeanJob, int]) -> dict[str, Any]:
    """The means of one train chunk over the members, summed in float64 in their order; the standard error of the influence's."""
    job, shard = task
    started = time.perf_counter()
    ids = job.first.train_ids(shard)
    train = slice(ids.start, ids.stop)
    groups: list[Any] = [location.open_group(member.results) for member in job.members]
    into: Any = location.open_group(job.results, "r+")
    for block in range(job.first.shape[1]):
        asked = job.first.query_ids(block)
        query = slice(asked.start, asked.stop)
        each = np.stack([group["influence"][:, query, train].astype(np.float64) for group in groups])
        into["influence"][:, query, train] = each.mean(0).astype(np.float32)
        into["stderr"][:, query, train] = (each.std(0, ddof=1) / len(groups) ** 0.5).astype(np.float32)
    wanted: dict[str, tuple[Any, ...]] = {"train_loss": (train,)}
    if job.first.self_influence:
        wanted["self_influence"] = (slice(None), train)
    if shard == 0:
        wanted["query_measurement"] = (slice(None),)
    for name, where in wanted.items():
        into[name][where] = np.stack([group[name][where].astype(np.float64) for group in groups]).mean(0).astype(np.float32)
    return {"seconds": time.perf_counter() - started}


def verify_mean(task: tuple[MeanJob, int]) -> dict[str, Any]:
    """Read one train chunk of the means back; ArithmeticError where a value is missing or damaged. The next try averages again."""
    job, shard = task
    started = time.perf_counter()
    told = verify_shard((replace(job.first, results=job.results, receipts=location.join(job.results, "receipts")), shard))
    ids = job.first.train_ids(shard)
    group: Any = location.open_group(job.results, "r", told["sums"])
    if not np.isfinite(group["stderr"][:, :, ids.start : ids.stop]).all():
        raise ArithmeticError(f"stderr, training examples {ids.start}..{ids.stop - 1}: a value is missing or not finite")
    return {**told, "seconds": time.perf_counter() - started}
