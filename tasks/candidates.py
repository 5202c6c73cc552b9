"""Which training examples are scored for which query, as artifacts that runs share.

embeddings/<fingerprint>: embeddings.zarr, of every example of a split by one encoder, in shards. candidates/<fingerprint>: candidates.zarr,
ids and their sources, (query, candidate), as `tda.retrieval.candidates.union` gives them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from infra import storage
from tasks import checksums, layout
from tasks.scores import damage
from tasks.subject import Subject, open_problem
from tda import location, schema
from tda.data import batches
from tda.errors import InputError
from tda.problem import Split
from tda.retrieval import bm25, candidates, embedding
from tda.retrieval.candidates import Asked

#: Texts of a shard, which is a chunk of the stored embeddings; and queries of a stored chunk of candidates.
TEXTS, QUERIES = 2048, 1024


@dataclass(frozen=True)
class EmbeddingJob:
    """The embeddings of a split. folder: the URL of the encoder, encoder: its digest."""

    url: str
    subject: Subject
    split: Split
    folder: str
    encoder: str
    examples: int

    @property
    def zarr(self) -> str:
        """The URL of the stored array's group."""
        return location.join(self.url, "embeddings.zarr")

    @property
    def parts(self) -> list[range]:
        """The ids of each shard."""
        return [range(ids[0], ids[-1] + 1) for ids in batches(range(self.examples), TEXTS)]


@dataclass(frozen=True)
class CandidateJob:
    """The candidates of all queries. corpus, asking: the subjects of the training set and of the queries; embedded: of both, or empty."""

    url: str
    asked: Asked
    corpus: Subject
    asking: Subject
    examples: int
    queries: int
    seed: int
    embedded: tuple[EmbeddingJob, ...]

    @property
    def zarr(self) -> str:
        """The URL of the stored arrays' group."""
        return location.join(self.url, "candidates.zarr")


def create_embeddings(job: EmbeddingJob) -> None:
    """Create the array; called once, before any shard writes."""
    if location.exists(location.join(job.url, "created.json")):
        return
    size = _encode(job, candidates.texts(open_problem(job.subject), job.split, [0])).shape[1]
    group = location.open_group(job.zarr, "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, "encoder": job.encoder})
    layout.ensure_array(group, "embedding", (job.examples, size), (TEXTS, size))
    location.seal(job.zarr)
    storage.write_json(location.join(job.url, "created.json"), {})


def embed_part(task: tuple[EmbeddingJob, int]) -> dict[str, Any]:
    """Embed the texts of one shard: a whole chunk, then the receipt."""
    job, part = task
    receipt = location.join(job.url, "receipts", f"{part:06d}.json")
    if location.exists(receipt):
        return {"seconds": 0.0}
    started, ids = time.perf_counter(), job.parts[part]
    try:
        found = _encode(job, candidates.texts(open_problem(job.subject), job.split, ids))
    except InputError as error:
        raise InputError(f"{job.split} examples {ids.start}..{ids.stop - 1}: {error}") from error
    group: Any = location.open_group(job.zarr, "r+")
    group["embedding"][ids.start : ids.stop] = found
    told = {"seconds": time.perf_counter() - started}
    storage.write_json(receipt, told)
    return told


def _encode(job: EmbeddingJob, texts: Sequence[str]) -> np.ndarray[Any, Any]:
    if embedding.encoder_digest(job.folder) != job.encoder:
        raise InputError(f"encoder {job.folder} was replaced while the run was under way; start it again")
    return embedding.embed(texts, job.folder)


def finish_embeddings(job: EmbeddingJob) -> dict[str, Any]:
    """Read every chunk back, and mark the artifact complete. Where one is damaged, its receipt is deleted, and the next try makes it."""
    started = time.perf_counter()
    group: Any = location.open_group(job.zarr)
    for part, ids in enumerate(job.parts):
        if wrong := damage(group["embedding"], (slice(ids.start, ids.stop),)):
            storage.delete(location.join(job.url, "receipts", f"{part:06d}.json"))
            raise ArithmeticError(f"embeddings of {job.split} examples {ids.start}..{ids.stop - 1}: {wrong}; the next try makes them again")
    checksums.complete(job.url, {})
    return {"seconds": time.perf_counter() - started}


def select(job: CandidateJob) -> dict[str, Any]:
    """Choose the candidates of every query, write them, read them back, and mark the artifact complete."""
    started = time.perf_counter()
    ids, sources = candidates.union(_found(job))
    group: Any = location.open_group(job.zarr, "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION})
    for name, values in (("candidate_id", ids), ("candidate_source", sources)):
        array = layout.ensure_array(group, name, values.shape, (min(QUERIES, len(values)), values.shape[1]))
        array[...] = values
        if not np.array_equal(array[...], values):
            raise ArithmeticError(f"{name} reads otherwise than it was written; the next try writes it again")
    location.seal(job.zarr)
    checksums.complete(job.url, {})
    return {"seconds": time.perf_counter() - started}


def _found(job: CandidateJob) -> dict[str, Any]:
    """By source, the ids (query, ...) that it names."""
    asked, corpus, asking = job.asked, open_problem(job.corpus), open_problem(job.asking)
    found: dict[str, Any] = {}
    if asked.bm25:
        documents = candidates.texts(corpus, "train", range(job.examples))
        queries = candidates.texts(asking, "query", range(job.queries))
        found["bm25"] = bm25.bm25_nearest(queries, documents, asked.bm25)[0]
    if asked.embedding:
        arrays: list[Any] = [location.open_group(each.zarr)["embedding"] for each in job.embedded]
        train, query = arrays
        found["embedding"] = embedding.nearest(np.asarray(query[...]), train, asked.embedding)[0]
    if asked.gold:
        found["gold"] = candidates.gold(asking, job.queries, job.examples, asked.on)
    if asked.random:
        found["random"] = [candidates.drawn(job.examples, asked.random, job.seed, query) for query in range(job.queries)]
    return found


def facts(job: CandidateJob) -> dict[str, Any]:
    """What a manifest says of the candidates: the options, how many there are per query, in all, and from each source on average."""
    group: Any = location.open_group(job.zarr)
    ids, sources = group["candidate_id"][...], group["candidate_source"][...]
    counts = (ids >= 0).sum(1)
    found = {name: float(((sources & bit) > 0).sum(1).mean()) for name, bit in candidates.SOURCES.items() if (sources & bit).any()}
    return {
        "on": job.asked.on,
        "asked": {key: value for key, value in asdict(job.asked).items() if value and key != "on"},
        "examples": job.examples,
        "per_query": {"least": int(counts.min()), "mean": float(counts.mean()), "most": int(counts.max())},
        "different": len(np.unique(ids[ids >= 0])),
        "from": found,
        "fingerprint": job.url.rpartition("/")[2],
    }


def note(told: dict[str, Any]) -> str:
    """The line by which a run says that it scored candidates only."""
    most, least = told["per_query"]["most"], told["per_query"]["least"]
    each = f"{most}" if least == most else f"{least} to {most}"
    return (
        f"{told['on']}: only candidates were scored ({', '.join(told['from'])}): {each} of {told['examples']} training examples per query, "
        f"{told['different']} different ones; others may have larger scores"
    )


def parsed(text: str) -> Asked | None:
    """What a request's JSON asks for; None where that is empty."""
    return Asked(**json.loads(text)) if text else None
