"""Directions of the queries under one method: what a run's scores are inner products with.

    queries-<block>.safetensors    "<pass>/<block>/matrix" or ".../left", ".../right"; "measurement" and "norms" of the queries;
                                   "kept/<name>" of a method that scores directly
    queries-<block>.json           what the method tells of how they were made: residuals of a solve, the error of an approximation
    state-<block>.safetensors      of a solve that is under way
    complete.json                  last

Each method has an artifact of its own, so that a method added to a configuration is the only one computed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from infra import storage
from tasks import checksums, dense, projection, retraining, sampling
from tasks.factors import fitted
from tasks.subject import Opened, Subject, open_subject
from tasks.tensors import packed, read_tensors, write_tensors
from tda import location
from tda.blocks import Block
from tda.carried import carry
from tda.checksums import of
from tda.data import Batching
from tda.device import placed
from tda.directions import Dense, Direction, Factored, extend, query_gradients, query_measurements, squared_norms, take
from tda.lowrank import shorten, stated
from tda.methods import Method, parse
from tda.methods.work import Fit, Made, Work
from tda.products import Products, fast_float32
from tda.trajectory import Segment

#: Seconds between two stored states of a solve: so much is lost at most when a worker dies.
STATE_SECONDS = 20.0


@dataclass(frozen=True)
class Carried:
    """What a later stage of training passes on: its directions, its blocks, and by how much it was pulled to this one's weights."""

    job: DirectionJob
    blocks: tuple[Block, ...]
    proximity: float


@dataclass(frozen=True)
class DirectionJob:
    """The directions of all queries under one method.

    method: JSON of its options. fits: URLs, in the order of the method's. segments of the training, the subjects at their mean weights,
    and those at the checkpoint that stands for each, for methods that need them. block: queries per task. carried: where the gradients
    of the queries come from, if not from the subject itself. batch_tokens: of the queries, in place of batch_size, where set.
    """

    url: str
    subject: Subject
    method: str
    fits: tuple[str, ...]
    queries: int
    block: int
    batch_size: int
    seed: int
    products: Products
    segments: tuple[Segment, ...] = ()
    averages: tuple[Subject, ...] = ()
    checkpoints: tuple[Subject, ...] = ()
    carried: Carried | None = None
    batch_tokens: int | None = None

    def parsed(self) -> Method:
        """The method."""
        return parse(json.loads(self.method))

    def ids(self, block: int) -> range:
        """Query ids of a block."""
        return range(block * self.block, min((block + 1) * self.block, self.queries))

    @property
    def blocks(self) -> int:
        """Number of query blocks."""
        return -(-self.queries // self.block)

    def place(self, kind: str, block: int, suffix: str = "safetensors") -> str:
        """URL of a block's object."""
        return location.join(self.url, f"{kind}-{block:06d}.{suffix}")


def load_fit(fit: Fit, url: str, subject: Subject) -> tuple[Any, ...]:
    """A completed fit: one Factor per block, Spectra (dense, or of projected gradients), the Truth of a retraining, Trajectories chains.

    Factors and spectra lie on the subject's device.
    """
    if fit.kind == "retraining":
        return truth(url)
    if fit.kind == "chains":
        return sampling.load(url)
    if fit.kind == "kronecker":
        return fitted(url, subject)
    return spectra(url, fit.kind, open_subject(subject).attributed.device)


@lru_cache(maxsize=1)
def spectra(url: str, kind: str, device: torch.device) -> tuple[Any, ...]:
    """The spectra of a completed fit, kept for the next task of the same worker; one at a time, for they are large."""
    return placed(projection.load(url) if kind == "projection" else tuple(dense.load_spectra(url)), device)


@lru_cache(maxsize=1)
def truth(url: str) -> tuple[Any, ...]:
    """What retrained models measure, kept likewise."""
    return (retraining.load_truth(url),)


def curvature_of(job: DirectionJob) -> list[tuple[Any, ...]]:
    """The fits of a job's method, loaded."""
    return [load_fit(fit, url, job.subject) for fit, url in zip(job.parsed().fits, job.fits, strict=True)]


def make_directions(task: tuple[DirectionJob, int]) -> dict[str, Any]:
    """Compute the directions of one query block, and write them as one object."""
    job, block = task
    started = time.perf_counter()
    url = job.place("queries", block)
    if not location.exists(url):
        opened = open_subject(job.subject)
        method = job.parsed()
        gradients, values, norms = _asked(job, opened, job.ids(block), taken=method.takes_gradients)
        state = job.place("state", block)

        def gradients_at(segment: int) -> list[Direction]:
            at = open_subject(job.checkpoints[segment])
            return query_gradients(at.attributed, at.query, job.ids(block), batch_size=_batching(job, at))[0]

        work = Work(
            opened.attributed,
            opened.train,
            curvature_of(job),
            job.seed,
            job.batch_size,
            job.products,
            job.segments,
            tuple(open_subject(subject).attributed for subject in job.averages),
            placed(read_tensors(state), opened.attributed.device) if location.exists(state) else None,
            _kept(state),
            job.ids(block).start,
            opened.query,
            job.ids(block),
            gradients_at if job.checkpoints else None,
        )
        made = _shortened(opened.attributed.blocks, method, method.directions(work, gradients))
        tensors = {"measurement": values, "norms": norms} | {f"kept/{name}": tensor for name, tensor in made.kept.items()}
        for p, directions in enumerate(made.passes):
            for b, direction in enumerate(directions):
                tensors |= {f"{p}/{b}/{side}": t for side, t in _sides(direction, "full" if method.exact else job.products).items()}
        data = packed(tensors)
        # The tensors are written last: they are what says that the block is done.
        storage.write_json(job.place("queries", block, "json"), {**made.told, "sum": of(data)})
        storage.write_bytes(url, data)
        storage.delete(state)
    return {"seconds": time.perf_counter() - started}


def _batching(job: DirectionJob, opened: Opened) -> Batching:
    return opened.batching("query", job.batch_size, job.batch_tokens)


def _shortened(blocks: Sequence[Block], method: Method, made: Made) -> Made:
    """What a method made, in a low rank where one is asked for and the method has not done so itself."""
    if method.rank is None or "low_rank" in made.told:
        return made
    passes, errors = [], list[list[Tensor | None]]()
    with fast_float32():
        for directions in made.passes:
            short = [shorten(block, direction, method.rank) for block, direction in zip(blocks, directions, strict=True)]
            passes.append([d if s is None else s.direction for d, s in zip(directions, short, strict=True)])
            errors.append([None if s is None else s.error for s in short])
    # Passes are taken together: what is told of a layer is over the queries of all.
    each = [[e for e in column if e is not None] for column in zip(*errors, strict=True)]
    told = stated(blocks, method.rank, [torch.cat(column) if column else None for column in each])
    return Made(passes, made.told | {"low_rank": told}, made.kept)


def _asked(job: DirectionJob, opened: Opened, ids: range, *, taken: bool) -> tuple[list[Direction], Tensor, Tensor]:
    """Gradients of queries at the subject, block by block; their measurements, and their norms where they are measured.

    taken: whether the method takes gradients; there are none where it does not, and norms of 0.
    """
    if not taken:
        values = query_measurements(opened.attributed, opened.query, ids, batch_size=_batching(job, opened))
        return [], values, torch.zeros_like(values)
    if job.carried is None:
        gradients, values = query_gradients(opened.attributed, opened.query, ids, batch_size=_batching(job, opened))
        return gradients, values, torch.stack([squared_norms(gradient) for gradient in gradients]).sum(0).sqrt()
    later, blocks, proximity = job.carried.job, job.carried.blocks, job.carried.proximity
    attributed = opened.attributed
    made = placed(read_directions(later, ids), attributed.device)
    return carry(blocks, made.passes[0], attributed.blocks, -proximity, attributed.dtype), made.measurement, made.norms


def _kept(url: str) -> Callable[[dict[str, Tensor]], None]:
    """Store a solve's state now and then, so that an interrupted one goes on."""
    last = time.perf_counter()

    def keep(state: dict[str, Tensor]) -> None:
        nonlocal last
        if time.perf_counter() - last >= STATE_SECONDS:
            write_tensors(url, state)
            last = time.perf_counter()

    return keep


def finish(job: DirectionJob) -> None:
    """Drop what interrupted tasks left, and write the completion marker."""
    for block in range(job.blocks):
        storage.delete(job.place("state", block))
    made = enumerate(told(job))
    known = {job.place("queries", block).rpartition("/")[2]: one["sum"] for block, one in made if "sum" in one}
    checksums.complete(job.url, {"queries": job.queries, "method": json.loads(job.method)}, known)


def told(job: DirectionJob) -> list[dict[str, Any]]:
    """What the method told of each query block."""
    return [location.read_json(job.place("queries", block, "json")) for block in range(job.blocks)]


def _sides(direction: Direction, products: Products) -> dict[str, Tensor]:
    found = {"matrix": direction.matrix} if isinstance(direction, Dense) else {"left": direction.left, "right": direction.right}
    return {side: tensor.bfloat16() for side, tensor in found.items()} if products == "bfloat16" else found


@dataclass(frozen=True)
class Directions:
    """A block's directions read back: passes, by block; measurement and gradient norms of the queries; what was kept of them else."""

    passes: Sequence[Sequence[Direction]]
    measurement: Tensor
    norms: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)


def read_directions(job: DirectionJob, ids: range) -> Directions:
    """The directions of queries `ids`, whatever blocks they were made in."""
    found: Directions | None = None
    for part in read_parts(job, ids):
        if len(part.measurement) == len(ids):
            return part
        # Each part is let go as it is joined: all of them beside the whole would be twice the memory.
        found = _joined(found, part, len(ids))
    assert found is not None
    return found


def read_parts(job: DirectionJob, ids: range) -> Iterator[Directions]:
    """The same, of as many queries at a time as were made together."""
    for block in range(ids.start // job.block, -(-ids.stop // job.block)):
        made = job.ids(block)
        yield _read(job.place("queries", block), slice(max(ids.start - made.start, 0), min(ids.stop, made.stop) - made.start))


def _joined(known: Directions | None, part: Directions, queries: int) -> Directions:
    """A part behind what is known already of so many queries."""
    if known is None:
        passes = [[extend(None, d, 0, queries) for d in blocks] for blocks in part.passes]
        return Directions(passes, part.measurement, part.norms, part.kept)
    start = len(known.measurement)
    each = zip(known.passes, part.passes, strict=True)
    passes = [[extend(whole, d, start, queries) for whole, d in zip(*blocks, strict=True)] for blocks in each]
    kept = {name: torch.cat([t, part.kept[name]]) if t.ndim else t for name, t in known.kept.items()}
    return Directions(passes, torch.cat([known.measurement, part.measurement]), torch.cat([known.norms, part.norms]), kept)


def _read(url: str, some: slice) -> Directions:
    tensors = read_tensors(url)
    # What is kept has the queries along its first axis, or is one number for all.
    kept = {key.removeprefix("kept/"): tensor for key, tensor in tensors.items() if key.startswith("kept/")}
    kept = {name: tensor[some] if tensor.ndim else tensor for name, tensor in kept.items()}
    places = [key.split("/") for key in tensors if "/" in key and not key.startswith("kept/")]
    passes = 1 + max((int(place[0]) for place in places), default=-1)
    count = 1 + max((int(place[1]) for place in places), default=-1)

    def direction(p: int, b: int) -> Direction:
        key = f"{p}/{b}/"
        whole = Dense(tensors[key + "matrix"]) if key + "matrix" in tensors else Factored(tensors[key + "left"], tensors[key + "right"])
        return take(whole, some)

    found = [[direction(p, b) for b in range(count)] for p in range(passes)]
    return Directions(found, tensors["measurement"][some], tensors["norms"][some], kept)
