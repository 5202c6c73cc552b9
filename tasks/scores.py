"""Directions of the queries, and score shards: train chunk x query block, written as whole Zarr chunks."""

from __future__ import annotations

import json
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
from tasks.factors import fitted
from tasks.subject import Opened, Subject, open_subject
from tasks.tensors import read_tensors, write_tensors
from tda import location, schema
from tda.curvature.eigen import Factor
from tda.directions import Dense, Direction, Factored, query_gradients, squared_norms, take
from tda.errors import InputError, cause
from tda.methods import EKFAC, Method, parse
from tda.products import Products, fast_float32
from tda.scoring import Scorer, score, score_error

#: A stored chunk holds so many queries, or more where it would be below CHUNK_NUMBERS: a query's row is then read without many others.
CHUNK_QUERIES, CHUNK_NUMBERS = 16, 1 << 14
#: Queries and training examples on which a separable form is compared with the exact one.
CHECKED = 64


@dataclass(frozen=True)
class ScoreJob:
    """The scores of one run. methods: (JSON of the options, URL of its fit or "") per method; directions and results: URLs."""

    subject: Subject
    methods: tuple[tuple[str, str], ...]
    directions: str
    results: str
    receipts: str
    examples: int
    queries: int
    shard_size: int
    query_block: int
    batch_size: int
    scoring_batch: int
    products: Products
    self_influence: bool

    def train_ids(self, shard: int) -> range:
        """Training ids of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.examples))

    def query_ids(self, block: int) -> range:
        """Query ids of a block."""
        return range(block * self.query_block, min((block + 1) * self.query_block, self.queries))

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of train shards and of query blocks."""
        return -(-self.examples // self.shard_size), -(-self.queries // self.query_block)

    @property
    def query_chunk(self) -> int:
        """Queries per stored chunk: a part of a block, so that each chunk is written whole by one task."""
        most = min(self.query_block, max(CHUNK_QUERIES, CHUNK_NUMBERS // self.shard_size))
        if self.query_block >= self.queries:
            return most
        return max(size for size in range(1, most + 1) if self.query_block % size == 0)

    def parsed(self) -> list[Method]:
        """The methods."""
        return [parse(json.loads(options)) for options, _ in self.methods]

    def factors(self) -> list[Sequence[Factor | None]]:
        """The factors of each method, one per block (None where it has no curvature)."""
        blocks = open_subject(self.subject).attributed.blocks
        return [fitted(url, self.subject) if url else [None] * len(blocks) for _, url in self.methods]


def _directions_url(job: ScoreJob, block: int) -> str:
    return location.join(job.directions, f"queries-{block:06d}.safetensors")


def make_directions(task: tuple[ScoreJob, int]) -> dict[str, Any]:
    """Compute the directions of one query block under every method, and write them as one object."""
    job, block = task
    started = time.perf_counter()
    url, errors = _directions_url(job, block), dict[str, float]()
    errors_url = url.removesuffix(".safetensors") + ".json"
    if not location.exists(url):
        opened = open_subject(job.subject)
        attributed, ids = opened.attributed, job.query_ids(block)
        gradients, values = query_gradients(attributed, opened.query, ids, batch_size=job.batch_size)
        norms = torch.stack([squared_norms(gradient) for gradient in gradients]).sum(0).sqrt()
        tensors = {"measurement": values, "norms": norms}
        for m, (method, factors) in enumerate(zip(job.parsed(), job.factors(), strict=True)):
            directions, errors[method.title] = _checked_directions(job, opened, method, factors, gradients)
            for b, direction in enumerate(directions):
                tensors |= {f"{m}/{b}/{side}": t for side, t in _sides(direction, job.products).items()}
        # The tensors are written last: they are what says that the block is done.
        storage.write_json(errors_url, errors)
        write_tensors(url, tensors)
    else:
        errors = location.read_json(errors_url)
    return {"seconds": time.perf_counter() - started, "errors": errors}


def _checked_directions(
    job: ScoreJob, opened: Opened, method: Method, factors: Sequence[Factor | None], gradients: Sequence[Direction]
) -> tuple[list[Direction], float]:
    """The directions of a method, and the relative score error of its separable form, measured on CHECKED training examples.

    Where the error is above what the method allows, the exact directions are taken: then it is 0.
    """
    blocks = opened.attributed.blocks

    def made(of: Method, queries: Sequence[Direction]) -> list[Direction]:
        with fast_float32():
            return [of.direction(b, f, g, job.products) for b, f, g in zip(blocks, factors, queries, strict=True)]

    directions = made(method, gradients)
    if not isinstance(method, EKFAC) or method.separable == 0:
        return directions, 0.0
    some = [take(gradient, slice(CHECKED)) for gradient in gradients]
    ids = range(0, job.examples, max(1, job.examples // CHECKED))
    short = [take(direction, slice(CHECKED)) for direction in directions]
    error = score_error(opened.attributed, opened.train, ids, short, made(method.exact(), some), batch_size=job.batch_size)
    return (directions, error) if error <= method.separable else (made(method.exact(), gradients), 0.0)


def separable_errors(receipts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest error of each method over the query blocks."""
    titles = {title for receipt in receipts for title in receipt["errors"]}
    return {title: max(receipt["errors"].get(title, 0.0) for receipt in receipts) for title in sorted(titles)}


def _sides(direction: Direction, products: Products) -> dict[str, Tensor]:
    found = {"matrix": direction.matrix} if isinstance(direction, Dense) else {"left": direction.left, "right": direction.right}
    return {side: tensor.bfloat16() for side, tensor in found.items()} if products == "bfloat16" else found


@lru_cache(maxsize=1)
def _scorers(job: ScoreJob, block: int) -> tuple[tuple[Scorer, ...], Tensor]:
    tensors = read_tensors(_directions_url(job, block))
    count = len(open_subject(job.subject).attributed.blocks)

    def direction(m: int, b: int) -> Direction:
        key = f"{m}/{b}/"
        return Dense(tensors[key + "matrix"]) if key + "matrix" in tensors else Factored(tensors[key + "left"], tensors[key + "right"])

    methods = enumerate(zip(job.parsed(), job.factors(), strict=True))
    scorers = tuple(Scorer(method, [direction(m, b) for b in range(count)], factors, tensors["norms"]) for m, (method, factors) in methods)
    return scorers, tensors["measurement"]


def create_results(job: ScoreJob, labels: dict[str, np.ndarray | None], attrs: dict[str, Any]) -> None:
    """Create the run's arrays, and write the coordinates; called once, before any shard writes. labels: by split, or None."""
    methods = job.parsed()
    m, n, q = len(methods), job.examples, job.queries
    if location.exists(location.join(job.receipts, "created.json")):
        return
    group = location.open_group(job.results, "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, **attrs})
    layout.ensure_array(group, "influence", (m, q, n), (1, job.query_chunk, job.shard_size))
    layout.ensure_array(group, "train_loss", (n,), (job.shard_size,))
    layout.ensure_array(group, "query_measurement", (q,), (job.query_block,))
    if job.self_influence:
        layout.ensure_array(group, "self_influence", (m, n), (1, job.shard_size))
    coordinates = {"method": np.array([method.title for method in methods], dtype=object), "train": np.arange(n), "query": np.arange(q)}
    coordinates |= {f"{split}_label": values for split, values in labels.items() if values is not None}
    for name, coordinate in coordinates.items():
        array = layout.ensure_array(group, name, coordinate.shape)
        array[...] = coordinate
    location.seal(job.results)
    storage.write_json(location.join(job.receipts, "created.json"), {})


def _receipt(job: ScoreJob, shard: int, block: int) -> str:
    return location.join(job.receipts, "scores", f"{shard:06d}-{block:06d}.json")


def score_shard(task: tuple[ScoreJob, int, int]) -> dict[str, Any]:
    """Score one train chunk against one query block under every method; write whole chunks, then the receipt."""
    job, shard, block = task
    receipt = _receipt(job, shard, block)
    if location.exists(receipt):
        return {**location.read_json(receipt), "seconds": 0.0}
    started = time.perf_counter()
    opened = open_subject(job.subject)
    scorers, measurement = _scorers(job, block)
    found = score(
        opened.attributed,
        scorers,
        opened.train,
        job.train_ids(shard),
        examples=job.examples,
        batch_size=job.scoring_batch,
        products=job.products,
        self_influence=job.self_influence and block == 0,
    )
    group: Any = location.open_group(job.results, "r+")
    train, query = (slice(ids.start, ids.stop) for ids in (job.train_ids(shard), job.query_ids(block)))
    group["influence"][:, query, train] = found.influence.float().numpy()
    if block == 0:
        group["train_loss"][train] = found.loss.float().numpy()
        if found.self_influence is not None:
            group["self_influence"][:, train] = found.self_influence.float().numpy()
    if shard == 0:
        group["query_measurement"][query] = measurement.float().numpy()
    told = {"seconds": time.perf_counter() - started, "mass": found.mass.tolist()}
    storage.write_json(receipt, told)
    return told


def verify_shard(task: tuple[ScoreJob, int]) -> dict[str, Any]:
    """Read one train chunk of every array back.

    Where a value is missing, NaN or damaged, the shard's receipts are deleted, so that the same command computes it again, and an
    ArithmeticError names the array and the examples.
    """
    job, shard = task
    started = time.perf_counter()
    group: Any = location.open_group(job.results, "r")
    train = slice(job.train_ids(shard).start, job.train_ids(shard).stop)
    names = ["influence", "train_loss", *(["self_influence"] if job.self_influence else [])]
    wanted = dict.fromkeys(names, (..., train)) | ({"query_measurement": (...,)} if shard == 0 else {})
    for name, where in wanted.items():
        wrong = _wrong(group[name], where)
        if wrong:
            for block in range(job.shape[1]):
                storage.delete(_receipt(job, shard, block))
            examples = "" if name == "query_measurement" else f", training examples {train.start}..{train.stop - 1}"
            raise ArithmeticError(f"{name}{examples}: {wrong}; the next try computes it again")
    return {"seconds": time.perf_counter() - started}


def _wrong(array: Any, where: tuple[Any, ...]) -> str:
    """What is wrong with a part of an array; empty where nothing is."""
    try:
        return "" if np.isfinite(array[where]).all() else "a value is missing or not finite"
    except (InputError, OSError):  # the store's trouble, not the chunk's
        raise
    except Exception as error:  # noqa: BLE001  (a damaged chunk may raise anything that its codecs do)
        return f"cannot be read ({cause(error)})"
