"""Ground truth: a problem retrained on many subsets of its training set, and what the retrained models measure on the queries.

    truth.zarr/masks, training_seed, alpha    which examples each subset has, and the seed of every retraining
    truth.zarr/measurement                    (alpha, subset, seed, query)
    complete.json                             last

It depends on the problem, its data and the numbers of the job alone, so every method ever compared reuses it. What its models measure is
gathered from `tasks.retrained`, which knows of no counts: whoever asks for more of the same trains only what is missing. A task trains
up to STACK models at once where the problem's models can be stacked, and a single one where they cannot.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from infra import storage
from tasks import checksums, layout
from tasks.retrained import Block, missing, shared, stored
from tasks.subject import DTYPES
from tasks.tensors import packed
from tda import checksums as sums
from tda import location, schema
from tda.data import digest
from tda.device import device_here, ready
from tda.errors import InputError, cause
from tda.evaluation import subsets
from tda.evaluation.retraining import STACK, retrained
from tda.fingerprint import fingerprint
from tda.problem import Problem, can_fit, load_problem, problem_digest
from tda.stacked import unstackable

#: Numbers in a chunk of measurements.
CHUNK = 1 << 22


@dataclass(frozen=True)
class RetrainJob:
    """What is retrained. options: JSON of the problem's; dtype: "auto", "float32" or "float64".

    alphas, subsets, seeds: shares of the training set, subsets of each and models per subset; seed: what all of them are drawn from.
    source: the problem's digest when the job was planned. alone: why models are trained one by one; empty where they are stacked.
    folders: where measurements are kept, by alpha.
    given: a digest of subsets that the caller chose, instead of random ones; alphas are then (1.0,), and all subsets share their seeds,
    so that differences between them are paired. device: as a run names it.
    """

    url: str
    problem: str
    options: str
    alphas: tuple[float, ...]
    subsets: int
    seeds: int
    seed: int = 0
    dtype: str = "auto"
    source: str = ""
    alone: str = ""
    given: str = ""
    folders: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def models(self) -> int:
        """How many models are trained in all."""
        return len(self.alphas) * self.subsets * self.seeds

    @property
    def zarr(self) -> str:
        """The group of the arrays."""
        return location.join(self.url, "truth.zarr")


@dataclass(frozen=True)
class Piece:
    """One task: an object of measurements, a block of subsets and repeats of `job.alphas[alpha]`."""

    job: RetrainJob
    alpha: int
    block: Block

    @property
    def url(self) -> str:
        """The object."""
        return location.join(self.job.folders[self.alpha], f"{self.block.stem}.safetensors")

    @property
    def receipt(self) -> str:
        """What says what it took."""
        return location.join(self.job.folders[self.alpha], f"{self.block.stem}.json")

    def trouble(self, said: str) -> str:
        """What is wrong with it."""
        some = self.block.subsets
        return f"measurement after retraining, alpha {self.job.alphas[self.alpha]}, subsets {some.start}..{some.stop - 1}: {said}"


def chosen_subsets(job: RetrainJob, masks: np.ndarray) -> RetrainJob:
    """The same job on subsets (subset, train) bool of the caller's; `plan` is still to come, and `create` takes the masks again."""
    mark = hashlib.sha256(np.packbits(masks, axis=1).tobytes()).hexdigest()[:20]
    return replace(job, alphas=(1.0,), subsets=len(masks), given=mark)


def plan(store: str, job: RetrainJob) -> RetrainJob:
    """The job with its place in the store, the problem's digest, and whether models are stacked (tried on two of them); `url` is ignored.

    Raises:
        InputError: the problem cannot fit, a number is out of range, or the data are not fit to train on.
    """
    problem = load_problem(job.problem, json.loads(job.options))
    train, query = problem.train_data(), problem.query_data()
    _check(job, problem, len(train))
    data = [digest(problem, dataset, split)[0] for dataset, split in ((train, "train"), (query, "query"))]
    source = problem_digest(job.problem, json.loads(job.options))
    same = {"problem": source, "data": data, "seed": job.seed, "dtype": job.dtype} | ({"given": job.given} if job.given else {})
    folders = tuple(layout.artifact(store, "retrained", fingerprint("retrained", alpha=alpha, **same)) for alpha in job.alphas)
    mark = fingerprint("retraining", alphas=job.alphas, subsets=job.subsets, seeds=job.seeds, **same)
    url = layout.artifact(store, "retraining", mark)
    created = location.join(url, "created.json")
    # Whether models are stacked was settled by who began it.
    alone = location.read_json(created)["alone"] if location.exists(created) else unstackable(problem, train, dtype=_dtype(job))
    return replace(job, url=url, source=source, alone=alone, folders=folders)


def _check(job: RetrainJob, problem: Problem, examples: int) -> None:
    if not can_fit(problem):
        raise InputError(f"problem {job.problem!r} has neither fit nor recipe: it cannot be retrained; define one of them")
    if job.seeds < 1:
        raise InputError(f"seeds must be at least 1, got {job.seeds}")
    if job.given:
        return
    if not job.alphas or len(set(job.alphas)) < len(job.alphas):
        raise InputError(f"alphas must be different numbers, at least one; got {list(job.alphas)}")
    for alpha in job.alphas:
        subsets.subset_size(examples, alpha)
    if job.subsets < 3:
        raise InputError(f"subsets must be at least 3 for a rank correlation over them, got {job.subsets}")


def _dtype(job: RetrainJob) -> torch.dtype | None:
    return None if job.dtype == "auto" else DTYPES[job.dtype]


@lru_cache(maxsize=1)
def _opened(problem: str, options: str, source: str) -> tuple[Problem, Any, Any]:
    if source and problem_digest(problem, json.loads(options)) != source:
        raise InputError(
            f"problem {problem!r} is not the one that the retraining was planned with: it was edited meanwhile, "
            "or a worker has another version of it, of tda or of torch; make them the same and start again"
        )
    found = load_problem(problem, json.loads(options))
    return found, found.train_data(), found.query_data()


def create(job: RetrainJob, chosen: np.ndarray | None = None) -> None:
    """Create the arrays, and write masks and seeds; called once, before any task writes. chosen: the masks of `chosen_subsets`."""
    created = location.join(job.url, "created.json")
    if location.exists(created):
        return
    _, train, query = _opened(job.problem, job.options, job.source)
    shape = (len(job.alphas), job.subsets, job.seeds)
    group = location.open_group(job.zarr, "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, "alone": job.alone})
    per_chunk = max(1, CHUNK // (job.seeds * len(query)))
    layout.ensure_array(group, "measurement", (*shape, len(query)), (1, min(per_chunk, job.subsets), job.seeds, len(query)))
    masks = (
        chosen[None] if chosen is not None else np.stack([subsets.masks(len(train), alpha, job.subsets, job.seed) for alpha in job.alphas])
    )
    for name, values in {"masks": masks, "training_seed": _seeds(job), "alpha": np.array(job.alphas)}.items():
        array = layout.ensure_array(group, name, values.shape)
        array[...] = values
    location.seal(job.zarr)
    storage.write_json(created, {"alone": job.alone})


def _seeds(job: RetrainJob) -> np.ndarray:
    places = [0] * job.subsets if job.given else range(job.subsets)
    rows = [[[subsets.training_seed(job.seed, a, s, r) for r in range(job.seeds)] for s in places] for a in job.alphas]
    return np.array(rows, np.int64)


def pieces(job: RetrainJob) -> list[Piece]:
    """The tasks that are left."""
    most = 1 if job.alone else STACK
    return [Piece(job, a, block) for a, folder in enumerate(job.folders) for block in missing(stored(folder), job.subsets, job.seeds, most)]


def retrain_piece(piece: Piece) -> dict[str, Any]:
    """Train a piece's models and write what they measure, then the receipt.

    Raises:
        InputError: a measurement is not finite; the query, the subset and the seed are named.
    """
    started, job = time.perf_counter(), piece.job
    if location.exists(piece.url) or layout.is_complete(job.url):
        return {"seconds": 0.0, "models": 0}
    problem, train, query = _opened(job.problem, job.options, job.source)
    group: Any = location.open_group(job.zarr, "r")
    where = (piece.alpha, *piece.block.where)
    chosen, seeds = np.asarray(group["masks"][where[:2]]), np.asarray(group["training_seed"][where])
    ids = [np.flatnonzero(mask).tolist() for mask in chosen for _ in piece.block.repeats]
    device = ready(device_here(job.device))
    found = retrained(problem, train, query, ids, seeds.ravel().tolist(), dtype=_dtype(job), device=device, stacked=not job.alone)
    measured = found.view(*seeds.shape, -1)
    _check_finite(piece, measured.numpy())
    data = packed({"measurement": measured})
    storage.write_bytes(piece.url, data)
    told = {"seconds": time.perf_counter() - started, "models": len(ids)}
    storage.write_json(piece.receipt, sums.signed({**told, "objects": {piece.url.rpartition("/")[2]: sums.of(data)}}))
    return told


def _check_finite(piece: Piece, measured: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(measured))
    if len(bad):
        subset, seed, query = (int(i) for i in bad[0])
        block, alpha = piece.block, piece.job.alphas[piece.alpha]
        raise InputError(
            f"the measurement of query {query} is {measured[subset, seed, query]} after retraining on subset {block.subsets[subset]} of "
            f"alpha = {alpha} with repeat {block.repeats[seed]} (queries with such values: {len(set(bad[:, 2]))}); "
            "training diverged, or the measurement has no value there: mend one of them or leave the query out"
        )


def finish(job: RetrainJob) -> dict[str, Any]:
    """Gather what was measured, read it back, write the completion marker.

    Where a value is missing or an object damaged, the object is deleted, so that the same command trains it again, and an ArithmeticError
    says so.
    """
    started = time.perf_counter()
    if not layout.is_complete(job.url):
        group: Any = location.open_group(job.zarr, "r+")
        for a in range(len(job.alphas)):
            group["measurement"][a] = _gathered(job, a, group["measurement"].shape[3])
        schema.validate(group, ["masks", "measurement", "training_seed", "alpha"])
        if said := _wrong(group["measurement"], ...):
            raise ArithmeticError(f"measurements after retraining: {said}; the next try gathers them again")
        checksums.complete(job.url, {"models": job.models, "alone": job.alone})
    return {"seconds": time.perf_counter() - started}


def _gathered(job: RetrainJob, alpha: int, queries: int) -> np.ndarray:
    """(subset, seed, query) of an alpha."""
    found, wrong = np.full((job.subsets, job.seeds, queries), np.nan), []
    for block, mine in shared(stored(job.folders[alpha]), job.subsets, job.seeds):
        piece = Piece(job, alpha, block)
        try:
            data = location.read_bytes(piece.url)
            values = load(data)["measurement"].numpy()
            whole = np.full((max(job.subsets, block.subsets.stop), max(job.seeds, block.repeats.stop), queries), np.nan)
            whole[block.where] = values
            found[mine] = whole[: job.subsets, : job.seeds][mine]
            said = "" if np.isfinite(values).all() else "a value is not finite"
            said = said or ("" if _written_so(piece, data) else "its bytes have changed")
        except (InputError, OSError):  # the store's trouble, not the object's
            raise
        except Exception as error:  # noqa: BLE001  (a damaged object may raise anything)
            said = f"cannot be read ({cause(error)})"
        if said:
            storage.delete(piece.url)
            wrong.append(piece.trouble(said))
    if wrong:
        raise ArithmeticError(f"{wrong[0]} ({len(wrong)} such objects); the next try trains them again")
    gone = np.argwhere(~np.isfinite(found))
    if len(gone):
        subset = int(gone[0][0])
        piece = Piece(job, alpha, Block(range(subset, subset + 1), range(1)))
        raise ArithmeticError(f"{piece.trouble('values are missing')}; the next try trains them")
    return found


def _written_so(piece: Piece, data: bytes) -> bool:
    """Whether an object is what its receipt says; True where none says anything."""
    told = location.read_json_many([piece.receipt])[0] or {}
    entry = told.get("objects", {}).get(piece.url.rpartition("/")[2])
    return not sums.is_whole(told) or entry in (None, sums.of(data))


def spent(job: RetrainJob) -> float | None:
    """Seconds of work behind all of the job's models, whoever trained them; None where a try was killed before it could say."""
    total = 0.0
    for a, folder in enumerate(job.folders):
        for block, mine in shared(stored(folder), job.subsets, job.seeds):
            url = Piece(job, a, block).receipt
            if not location.exists(url):
                return None
            total += float(location.read_json(url)["seconds"]) * float(mine.sum()) / block.models
    return total


def _wrong(array: Any, where: Any) -> str:
    """What is wrong with a part of an array; empty where nothing is."""
    try:
        return "" if np.isfinite(array[where]).all() else "a value is missing or not finite"
    except (InputError, OSError):  # the store's trouble, not the chunk's
        raise
    except Exception as error:  # noqa: BLE001  (a damaged chunk may raise anything that its codecs do)
        return f"cannot be read ({cause(error)})"


@dataclass(frozen=True)
class Truth:
    """A ground truth in memory: masks (alpha, subset, train) bool, measurement (alpha, subset, seed, query), alphas (alpha,)."""

    alphas: Sequence[float]
    masks: np.ndarray
    measurement: np.ndarray
    training_seed: np.ndarray


def load_truth(url: str) -> Truth:
    """A completed ground truth; InputError where it is not complete."""
    if not layout.is_complete(url):
        raise InputError(f"retraining {url} is not complete; run the command that began it again")
    group: Any = location.open_group(location.join(url, "truth.zarr"), "r")
    schema.validate(group, ["masks", "measurement", "training_seed", "alpha"])
    masks, measurement, seeds = (np.asarray(group[name][...]) for name in ("masks", "measurement", "training_seed"))
    return Truth(tuple(float(alpha) for alpha in group["alpha"][...]), masks, measurement, seeds)
