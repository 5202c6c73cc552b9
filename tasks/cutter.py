"""Methods cut into jobs: their fits, their directions and what these meet, each with the fingerprint of all that determines it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from tasks import checksums, layout, retraining
from tasks.dense import DenseJob
from tasks.directions import Carried, DirectionJob
from tasks.factors import FactorJob
from tasks.prepare import Inputs, Request
from tasks.projection import ProjectionJob
from tasks.retraining import RetrainJob
from tasks.sampling import SampleJob
from tasks.scores import CHUNK_QUERIES, Scored, ScoreJob
from tasks.subject import Subject, open_subject, read_checkpoint
from tasks.tensors import write_tensors
from tasks.training import segments_of
from tda import checkpoint, location, sizes
from tda.attributed import Attributed
from tda.data import length, lengths_of
from tda.evaluation.mean_shift import check_both_sides
from tda.evaluation.subsets import masks
from tda.fingerprint import fingerprint
from tda.methods import Method
from tda.methods.work import Fit
from tda.problem import load_problem
from tda.projection import Projection
from tda.shapes import Shapes
from tda.trajectory import Segment, average

FitJob = FactorJob | DenseJob | ProjectionJob | RetrainJob | SampleJob
#: What a fit's artifact is called, by the class of its job.
ARTIFACTS = {
    FactorJob: "factors",
    DenseJob: "spectra",
    ProjectionJob: "projections",
    RetrainJob: "retraining",
    SampleJob: "trajectories",
}


@dataclass(frozen=True)
class Unrolled:
    """The training as a method sees it: segments, the subjects at their checkpoints, and those at their mean weights (where asked)."""

    segments: tuple[Segment, ...]
    checkpoints: tuple[tuple[Subject, ...], ...]
    averages: tuple[Subject, ...]


@dataclass(frozen=True)
class Member:
    """What is done for one trained model: its fits (by what they are of and their fingerprint), and its scores."""

    subject: Subject
    seed: int
    fits: dict[str, FitJob]
    scores: ScoreJob

    def fingerprints(self) -> dict[str, Any]:
        """Of its artifacts, for the manifest."""
        found: dict[str, Any] = {"checkpoint": self.subject.weights, "factors": {}, "spectra": {}, "directions": {}, "fits": {}}
        for key, job in self.fits.items():
            found.setdefault(ARTIFACTS[type(job)], {})[key] = job.url.rpartition("/")[2]
        for scored in self.scores.methods:
            method = scored.directions.parsed()
            found["directions"][method.title] = scored.directions.url.rpartition("/")[2]
            urls = zip(method.fits, scored.directions.fits, strict=True)
            found["fits"] |= {method.title: {fit.key: url.rpartition("/")[2] for fit, url in urls}} if method.fits else {}
        return found


@dataclass(frozen=True)
class Sizes:
    """How the work on one model is cut. batch: examples of a forward pass; scoring: of one that is scored; shard: training examples.

    tokens, scoring_tokens: of sequences whose lengths are known, in place of batch and scoring; else None.
    """

    batch: int
    scoring: int
    shard: int
    queries: int
    block: Callable[[Method, int], int]
    tokens: int | None = None
    scoring_tokens: int | None = None


def sized(request: Request, inputs: Inputs, attributed: Attributed | Shapes, ranks: Sequence[int | None]) -> Sizes:
    """What the request says, else from the shapes. ranks: of the directions of a query that are scored at a time, None being in full.

    Of the sizes, queries are scored in one pass over the training set, and the directions of block(method, more) are made at a time, so
    many vectors more than the method's being held for each: what it starts from where that is not counted, and the bytes that are written.
    """
    blocks, itemsize = attributed.blocks, torch.tensor([], dtype=attributed.dtype).element_size()
    batch = request.batch_size or sizes.batch_size(blocks, attributed.outputs, itemsize=itemsize)

    def chunks(count: int) -> int:
        """Whole chunks of queries, where there are several blocks; what the request says, if anything."""
        if request.query_block is not None:
            return request.query_block
        return count if not CHUNK_QUERIES < count < inputs.queries else count - count % CHUNK_QUERIES

    def block(method: Method, more: int) -> int:
        vectors = method.vectors + more
        return chunks(sizes.made_block(blocks, inputs.queries, vectors, itemsize=itemsize, shared=method.shares_passes))

    shard = request.shard_size or sizes.shard_size(inputs.examples)
    queries = chunks(sizes.query_block(blocks, inputs.queries, ranks, shard, itemsize=itemsize))
    scoring = request.batch_size or sizes.scoring_batch(blocks, batch, queries, ranks, itemsize=itemsize)
    lengths = None if request.batch_size or isinstance(attributed, Shapes) else lengths_of(attributed.problem, "train", inputs.examples)
    tokens = scored = None
    if lengths is not None:
        # The blocks are those of the first two examples, padded to the longer one.
        tokens = request.batch_tokens or sizes.batch_tokens(blocks, attributed.outputs, int(lengths[:2].max()), itemsize=itemsize)
        scored = request.batch_tokens or tokens * (scoring // batch)
    return Sizes(batch, scoring, shard, queries, block, tokens, scored)


@dataclass(frozen=True)
class Cutter:
    """Cuts the methods of one trained model into jobs."""

    request: Request
    inputs: Inputs
    subject: Subject
    seed: int
    batch: int
    shard: int
    tokens: int | None = None

    def scored(self, method: Method, queries: int, fits: dict[str, FitJob]) -> Scored:
        """The directions of a method, and what they meet; its fits are added to `fits`."""
        unrolled = self._unrolled(method)
        urls, keys = self._fitted(method, unrolled, fits)
        asked = {"query": self.inputs.query, "method": method.determining(), "fits": keys, "block": queries}
        asked |= {"seed": self.seed} if method.stochastic else {}
        asked |= (
            {"segments": [asdict(segment) for segment in unrolled.segments], "averages": [s.weights for s in unrolled.averages]}
            if unrolled.segments
            else {}
        )
        standing = tuple(subjects[0] for subjects in unrolled.checkpoints) if method.asks == "checkpoints" else ()
        asked |= {"asked at": [subject.weights for subject in standing]} if standing else {}
        url = layout.artifact(self.request.store, "directions", fingerprint("directions", **self._common(self.subject), **asked))
        directions = DirectionJob(
            url, self.subject, method.model_dump_json(), urls, self.inputs.queries, queries, self.batch, self.seed, self.request.products,
            unrolled.segments, unrolled.averages, standing, batch_tokens=self.tokens,
        )  # fmt: skip
        if method.meets == "final":
            return Scored(directions, ((self.subject,),))
        return Scored(directions, unrolled.checkpoints if method.meets == "checkpoints" else tuple((s,) for s in unrolled.averages))

    def carried(self, method: Method, carried: Carried, queries: int, fits: dict[str, FitJob]) -> Scored:
        """The directions that a method makes of what a later stage passes on; its fits are added to `fits`."""
        urls, keys = self._fitted(method, Unrolled((), (), ()), fits)
        asked = {"carried": carried.job.url.rpartition("/")[2], "proximity": carried.proximity, "block": queries}
        asked |= {"method": method.determining(), "fits": keys} | ({"seed": self.seed} if method.stochastic else {})
        url = layout.artifact(self.request.store, "directions", fingerprint("directions", **self._common(self.subject), **asked))
        job = DirectionJob(
            url,
            self.subject,
            method.model_dump_json(),
            urls,
            self.inputs.queries,
            queries,
            self.batch,
            self.seed,
            "full",
            carried=carried,
            batch_tokens=self.tokens,
        )
        return Scored(job, ((self.subject,),))

    def _fitted(self, method: Method, unrolled: Unrolled, fits: dict[str, FitJob]) -> tuple[tuple[str, ...], list[str]]:
        """URLs and fingerprints of a method's fits, which are added to `fits`."""
        jobs = {fit: self._fit(fit, unrolled) for fit in method.fits}
        for fit, found in jobs.items():
            if found not in fits.values():
                fits[fit.key if fit.key not in fits else f"{fit.key}, {method.title}"] = found
        urls = tuple(jobs[fit].url for fit in method.fits)
        return urls, [url.rpartition("/")[2] for url in urls]

    def _common(self, subject: Subject) -> dict[str, Any]:
        """What every number about a subject depends on."""
        opened = open_subject(subject)
        names = [name for block in opened.attributed.blocks for name in block.parameters]
        return {
            "weights": subject.weights, "problem": self.inputs.problem, "train": self.inputs.train, "parameters": names,
            "dtype": str(opened.attributed.dtype), "products": self.request.products, "batch": self.batch,
            **({} if self.tokens is None else {"tokens": self.tokens}), **({"autocast": subject.layers} if subject.autocast else {}),
        }  # fmt: skip

    def _but(self, *names: str) -> dict[str, Any]:
        """What every number about the subject depends on, but for what a fit does not look at."""
        return {name: value for name, value in self._common(self.subject).items() if name not in names}

    def _fit(self, fit: Fit, unrolled: Unrolled) -> FitJob:
        store, examples = self.request.store, self.inputs.examples
        if fit.kind == "dense":
            subject = replace(self.subject, dtype="float64")
            common = self._but("tokens", "autocast") | {"dtype": "float64", "products": "full"}
            key = fingerprint("spectra", curvature=fit.of, **common)
            return DenseJob(layout.artifact(store, "spectra", key), subject, fit.of, examples, self.batch)  # type: ignore[arg-type]
        if fit.kind == "retraining":
            asked, seen = self.request.subject, self.subject.inputs
            return _retraining(store, asked.problem, asked.options, fit.of, self.request.seed, asked.dtype, seen, asked.device)
        if fit.kind == "chains":
            options = json.dumps(json.loads(fit.of) | {"seed": self.seed}, sort_keys=True)
            # Chains multiply in their own way and dtype, and a linearisation's batch is rounding: none of these makes other chains.
            common = self._but("products", "batch", "tokens", "autocast")
            key = fingerprint("trajectories", options=options, query=self.inputs.query, **common)
            return SampleJob(layout.artifact(store, "trajectories", key), self.subject, options, examples, self.inputs.queries, self.batch)
        subjects: tuple[Subject, ...] = (self.subject,)
        if fit.segment is not None:
            subjects = (unrolled.averages[fit.segment],) if unrolled.averages else unrolled.checkpoints[fit.segment]
        if fit.kind == "projection":
            projection, common = Projection.named(fit.of, self.seed), self._common(subjects[0])
            url = layout.artifact(store, "projections", fingerprint("projection", shard=self.shard, **asdict(projection), **common))
            return ProjectionJob(url, subjects[0], projection, examples, self.shard, self.batch)
        seed = self.seed if fit.of == "sampled" else 0
        common = self._common(subjects[0]) | ({"pooled": [s.weights for s in subjects]} if len(subjects) > 1 else {})
        if fit.of == "sampled" and getattr(open_subject(subjects[0]).attributed.problem.likelihood, "reduction", "sum") == "mean":
            common |= {"drawn": "sampled_loss"}  # apart from stored ones of when the loss itself was taken at drawn labels
        url = layout.artifact(store, "factors", fingerprint("factors", fisher=fit.of, seed=seed, shard=self.shard, **common))
        more = (self.request.products, self.tokens, self.request.layer_block)
        return FactorJob(url, subjects, fit.of, seed, examples, self.shard, self.batch, *more)  # type: ignore[arg-type]

    def _unrolled(self, method: Method) -> Unrolled:
        """The segments of the training, for a method that needs them."""
        if method.meets == "final":
            return Unrolled((), (), ())
        segments = segments_of(method, self.subject.checkpoint)
        folder = self.subject.checkpoint.rpartition("/")[0]
        checkpoints = tuple(tuple(self._at(location.join(folder, name)) for name in segment.checkpoints) for segment in segments)
        averages = tuple(self._mean(subjects) for subjects in checkpoints) if method.meets == "averages" else ()
        return Unrolled(segments, checkpoints, averages)

    def _at(self, url: str) -> Subject:
        return replace(self.subject, checkpoint=url, weights=checkpoint.digest(read_checkpoint(url)))

    def _mean(self, subjects: tuple[Subject, ...]) -> Subject:
        """The subject at the mean weights of others, which are stored as an artifact."""
        folder = layout.artifact(self.request.store, "averages", fingerprint("average", weights=[s.weights for s in subjects]))
        url = location.join(folder, "weights.safetensors")
        if not location.exists(url):
            write_tensors(url, average([read_checkpoint(s.checkpoint) for s in subjects]))
            checksums.complete(folder, {"weights": [s.weights for s in subjects]})
        return self._at(url)


@lru_cache(maxsize=8)
def _retraining(
    store: str,
    problem: str,
    options: str,
    of: str,
    seed: int,
    dtype: str,
    seen: str,  # noqa: ARG001
    device: str,
) -> RetrainJob:
    """The same for all members of an ensemble; `seen`, of the data, keeps other data apart.

    Its seeds are below 0, and so no evaluation's: what scores are judged by is not what they are learnt from.
    """
    alpha, subsets, seeds = of.split()
    job = RetrainJob("", problem, options, (float(alpha),), int(subsets), int(seeds), -1 - seed, dtype, device=device)
    planned = retraining.plan(store, job)
    # Which examples the subsets have is known before anything is trained.
    examples = length(load_problem(problem, json.loads(options)).train_data(), "train")
    check_both_sides(masks(examples, float(alpha), job.subsets, job.seed))
    return planned
