"""Scores of candidates alone: only the candidates that the queries of a block have between them pass through the model.

Each piece of that union leaves the scores of the pairs that were asked for in <receipts>/pieces/; of these, a query block is put together
as whole chunks of (method, query, candidate).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from infra import storage
from tasks import layout, scores
from tasks.scores import ScoreJob, damage, scored
from tasks.tensors import read_tensors, write_tensors
from tda import location, schema


def create_results(job: ScoreJob, labels: dict[str, np.ndarray | None], attrs: dict[str, Any]) -> None:
    """As scores.create_results, of a job for candidates too; these must be chosen already."""
    if not job.candidates:
        scores.create_results(job, labels, attrs)
        return
    created = location.join(job.receipts, "created.json")
    if location.exists(created):
        return
    chosen: Any = location.open_group(location.join(job.candidates, "candidates.zarr"))
    ids, methods = chosen["candidate_id"][...], job.parsed()
    q, c = ids.shape
    rows = job.queries_of(c)
    group = location.open_group(job.results, "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, **attrs, "examples": job.examples})
    layout.ensure_array(group, "candidate_influence", (len(methods), q, c), (1, rows, c))
    if any(job.erring):
        layout.ensure_array(group, "candidate_stderr", (len(methods), q, c), (1, rows, c))
    layout.ensure_array(group, "candidate_loss", (q, c), (rows, c))
    layout.ensure_array(group, "query_measurement", (q,), (job.query_block,))
    coordinates = {"method": np.array([method.title for method in methods], dtype=object), "query": np.arange(q)}
    coordinates |= {"candidate_id": ids, "candidate_source": chosen["candidate_source"][...]}
    if (asked := labels["query"]) is not None:
        coordinates["query_label"] = asked
    if (known := labels["train"]) is not None:
        coordinates["candidate_label"] = np.where(ids >= 0, known[ids], -1)
    for name, values in coordinates.items():
        array = layout.ensure_array(group, name, values.shape, (rows, c) if values.ndim == 2 else None)
        array[...] = values
    location.seal(job.results)
    storage.write_json(created, {})


def pieces(job: ScoreJob) -> list[tuple[ScoreJob, int, int]]:
    """The tasks of `score_piece`: a job, the number of a piece, and of a query block."""
    return [(job, piece, block) for block in range(job.shape[1]) for piece in range(-(-len(_union(job, block)) // job.shard_size))]


def _ids(job: ScoreJob, block: int) -> np.ndarray[Any, Any]:
    """The candidates of a block's queries, (query, candidate), padded with -1."""
    group: Any = location.open_group(location.join(job.candidates, "candidates.zarr"))
    asked = job.query_ids(block)
    found: np.ndarray[Any, Any] = group["candidate_id"][asked.start : asked.stop]
    return found


def _union(job: ScoreJob, block: int) -> np.ndarray[Any, Any]:
    ids = np.unique(_ids(job, block))
    return ids[ids >= 0]


def _piece(job: ScoreJob, piece: int, block: int) -> str:
    return location.join(job.receipts, "pieces", f"{block:06d}-{piece:06d}")


def _receipt(job: ScoreJob, block: int) -> str:
    return location.join(job.receipts, "candidates", f"{block:06d}.json")


def score_piece(task: tuple[ScoreJob, int, int]) -> dict[str, Any]:
    """Score one piece of a block's candidates under every method; write the scores of the pairs asked for, then the receipt."""
    job, piece, block = task
    url = _piece(job, piece, block)
    if location.exists(f"{url}.json"):
        return {**location.read_json(f"{url}.json"), "seconds": 0.0}
    started, ids = time.perf_counter(), _ids(job, block)
    part = _union(job, block)[piece * job.shard_size : (piece + 1) * job.shard_size]
    rows, columns = _pairs(ids, part)
    asked_for = torch.zeros(len(ids), len(part), dtype=torch.bool)
    asked_for[rows, columns] = True
    found, measurement = scored(job, part.tolist(), block, asked_for)
    tensors = {"influence": found.influence[:, rows, columns].float(), "loss": found.loss[columns].float()}
    tensors |= {f"stderr/{m}": stderr[rows, columns].float() for m, stderr in found.stderr.items()}
    write_tensors(f"{url}.safetensors", tensors)
    if piece == 0:
        asked, group = job.query_ids(block), location.open_group(job.results, "r+")
        array: Any = group["query_measurement"]
        array[asked.start : asked.stop] = measurement.float().numpy()
    told = {"seconds": time.perf_counter() - started, "mass": found.mass.tolist()}
    storage.write_json(f"{url}.json", told)
    return told


def _pairs(ids: np.ndarray[Any, Any], part: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the candidates `ids` (query, candidate) that lie in `part`, row by row: the query's place, and the place in `part`."""
    inside = np.isin(ids, part)
    return torch.from_numpy(np.nonzero(inside)[0]), torch.from_numpy(np.searchsorted(part, ids[inside]))


def gather(task: tuple[ScoreJob, int]) -> dict[str, Any]:
    """Put the pieces of one query block together as whole chunks, then the receipt; the pieces are deleted."""
    job, block = task
    started, receipt = time.perf_counter(), _receipt(job, block)
    union = _union(job, block)
    count = -(-len(union) // job.shard_size)
    if not location.exists(receipt):
        ids, asked = _ids(job, block), job.query_ids(block)
        names = {"influence": "candidate_influence", "loss": "candidate_loss"}
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for piece in range(count):
            inside = np.isin(ids, union[piece * job.shard_size : (piece + 1) * job.shard_size])
            for name, values in read_tensors(f"{_piece(job, piece, block)}.safetensors").items():
                shape = (*values.shape[:-1], *ids.shape)
                arrays.setdefault(name, np.full(shape, np.nan, dtype=np.float32))[..., inside] = values.numpy()
        group: Any = location.open_group(job.results, "r+")
        for name, found in arrays.items():
            if name.startswith("stderr/"):
                group["candidate_stderr"][int(name.rpartition("/")[2]), asked.start : asked.stop] = found
            else:
                group[names[name]][..., asked.start : asked.stop, :] = found
        storage.write_json(receipt, {})
    for piece in range(count):
        storage.delete(f"{_piece(job, piece, block)}.safetensors")
    return {"seconds": time.perf_counter() - started}


def verify_block(task: tuple[ScoreJob, int]) -> dict[str, Any]:
    """Read one query block of every array back: finite where there is a candidate.

    Else the block's receipts are deleted, so that the same command computes it again, and an ArithmeticError names array and queries.
    """
    job, block = task
    started, asked = time.perf_counter(), job.query_ids(block)
    sums: dict[str, list[Any]] = {}
    group: Any = location.open_group(job.results, "r", sums)
    queries, real = slice(asked.start, asked.stop), _ids(job, block) >= 0
    wanted: dict[str, tuple[tuple[Any, ...], Any]] = {
        "candidate_influence": ((slice(None), queries, slice(None)), real),
        "candidate_loss": ((queries, slice(None)), real),
        "query_measurement": ((queries,), None),
    }
    if any(job.erring):
        wanted["candidate_stderr"] = ((np.flatnonzero(job.erring), queries, slice(None)), real)
    for name, (where, inside) in wanted.items():
        wrong = damage(group[name], where, inside)
        if wrong:
            for piece in range(-(-len(_union(job, block)) // job.shard_size)):
                storage.delete(f"{_piece(job, piece, block)}.json")
            storage.delete(_receipt(job, block))
            raise ArithmeticError(f"{name}, queries {asked.start}..{asked.stop - 1}: {wrong}; the next try computes it again")
    return {"seconds": time.perf_counter() - started, "results": job.results, "sums": sums}
