"""Score shards: train chunk x query block, written as whole Zarr chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra import storage
from tasks import layout
from tasks.directions import DirectionJob, curvature_of
from tasks.spool import asked
from tasks.subject import Subject, open_subject
from tda import location, schema
from tda.device import home
from tda.errors import InputError, cause
from tda.methods import Method
from tda.products import Products
from tda.scoring import Scorer, ShardScores, score
from tda.self_products import Own

#: A stored chunk holds so many queries, or more where it would be below CHUNK_NUMBERS: a query's row is then read without many others.
CHUNK_QUERIES, CHUNK_NUMBERS = 16, 1 << 14


@dataclass(frozen=True)
class Scored:
    """One method of a run: its directions, and for each of their passes the subjects whose training gradients they meet.

    Where a pass meets several checkpoints, the gradients are their mean.
    """

    directions: DirectionJob
    meets: tuple[tuple[Subject, ...], ...]


@dataclass(frozen=True)
class ScoreJob:
    """The scores of one trained model. subject: at the final checkpoint; results and receipts: URLs.

    candidates: the URL of the artifact that says which training examples are scored for each query (`tasks.sparse`); empty: all are.
    """

    subject: Subject
    methods: tuple[Scored, ...]
    results: str
    receipts: str
    examples: int
    queries: int
    shard_size: int
    query_block: int
    scoring_batch: int
    products: Products
    self_influence: bool
    candidates: str = ""
    scoring_tokens: int | None = None

    def train_ids(self, shard: int) -> range:
        """Training ids of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.examples))

    def query_ids(self, block: int) -> range:
        """Query ids of a block."""
        return range(block * self.query_block, min((block + 1) * self.query_block, self.queries))

    @property
    def cut(self) -> list[int]:
        """How training examples are cut, on which the rounding of their scores depends."""
        return [self.scoring_batch, self.shard_size, *([] if self.scoring_tokens is None else [self.scoring_tokens])]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of train shards and of query blocks."""
        return -(-self.examples // self.shard_size), -(-self.queries // self.query_block)

    @property
    def query_chunk(self) -> int:
        """Queries per stored chunk of a shard."""
        return self.queries_of(self.shard_size)

    def queries_of(self, width: int) -> int:
        """Queries per stored chunk of so many examples: a part of a block, so that each chunk is written whole by one task."""
        most = min(self.query_block, max(CHUNK_QUERIES, CHUNK_NUMBERS // width))
        if self.query_block >= self.queries:
            return most
        return max(size for size in range(1, most + 1) if self.query_block % size == 0)

    def parsed(self) -> list[Method]:
        """The methods."""
        return [scored.directions.parsed() for scored in self.methods]

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """Every subject whose training gradients are needed, the final checkpoint first."""
        return tuple(dict.fromkeys((self.subject, *(s for scored in self.methods for met in scored.meets for s in met))))

    @property
    def owned(self) -> tuple[bool, ...]:
        """Which methods give self-influence."""
        return tuple(method.gives_own or method.has_own for method in self.parsed())

    @property
    def erring(self) -> tuple[bool, ...]:
        """Which methods give standard errors."""
        return tuple(method.has_stderr for method in self.parsed())


@dataclass(frozen=True)
class Part:
    """What one method scores at one subject: its place among the methods, what its inner products are weighed with, the scorer."""

    method: int
    weight: float
    scorer: Scorer


def _owns(job: DirectionJob) -> Sequence[Own | None]:
    return job.parsed().owns(open_subject(job.subject).attributed, curvature_of(job), job.segments, job.seed)


#: Which query block `_parts` holds.
_HELD: list[tuple[ScoreJob, int]] = []


def _ready(job: ScoreJob, block: int) -> tuple[dict[Subject, list[Part]], Tensor]:
    """`_parts`, the last block's being let go before the next one's are read, and not after."""
    if [(job, block)] != _HELD:
        _parts.cache_clear()
        _HELD[:] = [(job, block)]
    return _parts(job, block)


@lru_cache(maxsize=1)
def _parts(job: ScoreJob, block: int) -> tuple[dict[Subject, list[Part]], Tensor]:
    """What is scored at each subject for one query block, and the queries' measurements."""
    parts: dict[Subject, list[Part]] = {subject: [] for subject in job.subjects}
    measurement, attributed = torch.empty(0), open_subject(job.subject).attributed
    times = max(sum(len(scored.meets) for scored in job.methods), 1)
    for m, (scored, method) in enumerate(zip(job.methods, job.parsed(), strict=True)):
        direct = type(method).direct is not Method.direct
        read = asked(scored.directions, job.query_ids(block), attributed, 0 if direct else times)
        measurement = read.measurement.cpu()
        if direct:
            said = method.direct(read.kept, curvature_of(scored.directions))
            parts[job.subject].append(Part(m, 1.0, Scorer(method.title, (), read.norms, direct=said)))
            continue
        owned = job.self_influence and block == 0 and method.gives_own
        own_of = _owns(scored.directions) if owned else ()
        for p, (directions, met) in enumerate(zip(read.passes, scored.meets, strict=True)):
            for subject in met:
                own = own_of[p] if own_of else None
                parts[subject].append(Part(m, 1 / len(met), Scorer(method.title, directions, read.norms, own, method.cosine)))
    return parts, measurement


def create_results(job: ScoreJob, labels: dict[str, np.ndarray | None], attrs: dict[str, Any], url: str = "") -> None:
    """Create the run's arrays, and write the coordinates; called once, before any shard writes.

    labels: by split, or None. url: where, if not the job's own results.
    """
    url = url or job.results
    methods = job.parsed()
    m, n, q = len(methods), job.examples, job.queries
    created = location.join(job.receipts, "created.json") if url == job.results else location.join(job.receipts, "created-mean.json")
    if location.exists(created):
        return
    group = location.open_group(url, "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, **attrs})
    layout.ensure_array(group, "influence", (m, q, n), (1, job.query_chunk, job.shard_size))
    layout.ensure_array(group, "train_loss", (n,), (job.shard_size,))
    layout.ensure_array(group, "query_measurement", (q,), (job.query_block,))
    if job.self_influence:
        layout.ensure_array(group, "self_influence", (m, n), (1, job.shard_size))
    if any(job.erring):
        layout.ensure_array(group, "stderr", (m, q, n), (1, job.query_chunk, job.shard_size))
    coordinates = {"method": np.array([method.title for method in methods], dtype=object), "train": np.arange(n), "query": np.arange(q)}
    coordinates |= {f"{split}_label": values for split, values in labels.items() if values is not None}
    for name, coordinate in coordinates.items():
        array = layout.ensure_array(group, name, coordinate.shape)
        array[...] = coordinate
    location.seal(url)
    storage.write_json(created, {})


def _receipt(job: ScoreJob, shard: int, block: int) -> str:
    return location.join(job.receipts, "scores", f"{shard:06d}-{block:06d}.json")


def score_shard(task: tuple[ScoreJob, int, int]) -> dict[str, Any]:
    """Score one train chunk against one query block under every method; write whole chunks, then the receipt."""
    job, shard, block = task
    receipt = _receipt(job, shard, block)
    if location.exists(receipt):
        return {**location.read_json(receipt), "seconds": 0.0}
    started = time.perf_counter()
    found, measurement = scored(job, job.train_ids(shard), block)
    group: Any = location.open_group(job.results, "r+")
    train, query = (slice(ids.start, ids.stop) for ids in (job.train_ids(shard), job.query_ids(block)))
    group["influence"][:, query, train] = found.influence.float().numpy()
    for m, stderr in found.stderr.items():
        group["stderr"][m, query, train] = stderr.float().numpy()
    if block == 0:
        group["train_loss"][train] = found.loss.float().numpy()
        if found.self_influence is not None:
            group["self_influence"][:, train] = found.self_influence.float().numpy()
    if shard == 0:
        group["query_measurement"][query] = measurement.float().numpy()
    told = {"seconds": time.perf_counter() - started, "mass": found.mass.tolist()}
    storage.write_json(receipt, told)
    return told


def scored(job: ScoreJob, ids: Sequence[int], block: int, asked: Tensor | None = None) -> tuple[ShardScores, Tensor]:
    """The scores of some training examples against one query block, summed over the subjects, and the queries' measurements.

    asked (query, train): the pairs of which the layers' shares are taken, where these are not all.
    """
    parts, measurement = _ready(job, block)
    methods = len(job.methods)
    influence = torch.zeros(methods, len(measurement), len(ids), dtype=measurement.dtype)
    own = torch.full((methods, len(ids)), torch.nan, dtype=measurement.dtype)
    mass, losses, errors = torch.zeros(0), torch.zeros(0), dict[int, Tensor]()
    for subject, here in parts.items():
        opened = open_subject(subject)
        final = subject == job.subject
        each = score(
            opened.attributed,
            [part.scorer for part in here],
            opened.train,
            ids,
            examples=job.examples,
            batch_size=opened.batching("train", job.scoring_batch, job.scoring_tokens),
            products=job.products,
            self_influence=job.self_influence and block == 0,
            asked=asked,
        )
        found = home(each)
        losses = found.loss if final else losses
        mass = mass if len(mass) else torch.zeros(methods, found.mass.shape[1], dtype=torch.float64)
        for k, part in enumerate(here):
            influence[part.method].add_(found.influence[k], alpha=part.weight)
            mass[part.method] += part.weight * found.mass[k]
            if k in found.stderr:
                errors[part.method] = found.stderr[k]
            if found.self_influence is not None and (part.scorer.own is not None or part.scorer.direct is not None):
                own[part.method] = part.weight * found.self_influence[k] + own[part.method].nan_to_num(0.0)
    return ShardScores(influence, own if job.self_influence and block == 0 else None, losses, mass, errors), measurement


def verify_shard(task: tuple[ScoreJob, int]) -> dict[str, Any]:
    """Read one train chunk of every array back; the receipt holds the sums of what was read.

    Where a value is missing, NaN or damaged, the shard's receipts are deleted, so that the same command computes it again, and an
    ArithmeticError names the array and the examples.
    """
    job, shard = task
    started = time.perf_counter()
    sums: dict[str, list[Any]] = {}
    group: Any = location.open_group(job.results, "r", sums)
    train = slice(job.train_ids(shard).start, job.train_ids(shard).stop)
    wanted: dict[str, tuple[Any, ...]] = dict.fromkeys(("influence", "train_loss"), (..., train))
    if job.self_influence and any(job.owned):
        wanted["self_influence"] = (np.flatnonzero(job.owned), train)
    if any(job.erring):
        wanted["stderr"] = (np.flatnonzero(job.erring), slice(None), train)
    if shard == 0:
        wanted["query_measurement"] = (...,)
    for name, where in wanted.items():
        wrong = damage(group[name], where)
        if wrong:
            for block in range(job.shape[1]):
                storage.delete(_receipt(job, shard, block))
            examples = "" if name == "query_measurement" else f", training examples {train.start}..{train.stop - 1}"
            raise ArithmeticError(f"{name}{examples}: {wrong}; the next try computes it again")
    return {"seconds": time.perf_counter() - started, "results": job.results, "sums": sums}


def damage(array: Any, where: tuple[Any, ...], inside: Any = None) -> str:
    """What is wrong with a part of an array; empty where nothing is. inside: what of that part's last axes has to be there."""
    try:
        found = array.oindex[where]
        return "" if np.isfinite(found if inside is None else found[..., inside]).all() else "a value is missing or not finite"
    except (InputError, OSError):  # the store's trouble, not the chunk's
        raise
    except Exception as error:  # noqa: BLE001  (a damaged chunk may raise anything that its codecs do)
        return f"cannot be read ({cause(error)})"
