"""The stages of a run as Prefect tasks: coarse, minutes each at scale; inside a stage, shards are Dask futures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from distributed import Client

from flows.guarded import as_task
from flows.progress import Progress
from infra import storage
from infra.cluster import ShardFailed, run_shards
from tasks import (
    candidates,
    chain,
    checksums,
    dense,
    directions,
    ensemble,
    factors,
    layout,
    plan,
    prepare,
    projection,
    publish,
    retraining,
    sampling,
    scores,
    sparse,
    subject,
    training,
)  # fmt: skip
from tasks.reach import reached
from tda import location
from tda.checksums import Sums
from tda.device import named
from tda.errors import InputError


@dataclass
class Session:
    """What the stages of one flow share in its process: the cluster, the bars, and the seconds spent."""

    client: Client
    progress: Progress
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)
    """Of what the verification has read back, by the URL of its results."""

    def shards(self, function: Callable[[Any], dict[str, Any]], jobs: Sequence[Any], stage: str) -> list[dict[str, Any]]:
        """Run one function over shards on the cluster under one bar; the receipts, in order."""
        started = time.perf_counter()
        with self.progress.stage(stage, len(jobs)) as advance:
            receipts = run_shards(
                self.client, partial(reached, function), jobs, stage=stage, on_done=lambda _: advance(), final=(InputError,)
            )
        timing = self.timings.setdefault(stage, {"wall": 0.0, "compute": 0.0})
        timing["wall"] += time.perf_counter() - started
        timing["compute"] += sum(receipt["seconds"] for receipt in receipts)
        return receipts

    def keep(self, receipts: Sequence[dict[str, Any]]) -> None:
        """Keep the sums in the receipts of a verification."""
        for receipt in receipts:
            if "sums" in receipt:
                self.sums.setdefault(receipt["results"], {}).update(receipt["sums"])

    def sums_below(self, url: str) -> Sums:
        """The sums of all results below a URL, by their names there."""
        root = url + "/"
        found = {results.removeprefix(root): sums for results, sums in self.sums.items() if results.startswith(root)}
        return {f"{folder}/{name}": entry for folder, sums in found.items() for name, entry in sums.items()}

    @property
    def spent(self) -> float:
        """Seconds of work so far, on all workers."""
        return sum(timing["compute"] for timing in self.timings.values())

    def timed(self, started: float) -> dict[str, dict[str, float]]:
        """The timings of the stages, and of the whole run so far."""
        return self.timings | {"total": {"wall": time.perf_counter() - started, "compute": self.spent}}


# Stages find their session here: a cluster client is nothing that Prefect should look into or store.
_SESSION: ContextVar[Session] = ContextVar("session")


@contextmanager
def session(client: Client, progress: Progress) -> Iterator[Session]:
    """The session of the flow that runs in this context."""
    token = _SESSION.set(Session(client, progress))
    try:
        yield _SESSION.get()
    finally:
        _SESSION.reset(token)


def here() -> Session:
    """The session of the flow that runs in this context."""
    return _SESSION.get()


def devices(asked: str) -> dict[str, int]:
    """The workers' devices by their names, each with its number of workers."""
    client = here().client
    return dict(Counter(sorted(client.run(named, asked).values())))


def _begin(url: str) -> float | None:
    """What `_price` has to be given: `Session.spent` when an artifact is begun; None where an earlier try was, whose work is not known."""
    first = storage.create_once(location.join(url, "begun.json"), b"{}")
    return here().spent if first else None


def _price(url: str, before: float | None) -> None:
    """Write down beside an artifact that is about to be complete what it took, in seconds of work, for those who compare methods.

    null where a try was interrupted: what it did, and so did not have to be done again, would be missing.
    """
    storage.write_json(location.join(url, "seconds.json"), {"compute": None if before is None else here().spent - before})


@as_task
def train(request: prepare.Request, inputs: prepare.Inputs) -> bool:
    """Train the checkpoint, or one per member of an ensemble; True where an earlier run had."""
    start = chain.start(request, inputs)
    return _trained([(request.subject, s, plan.training_artifact(request, inputs, s, start), start) for s in plan.seeds(request)], "train")


@as_task
def train_stage(request: prepare.Request, inputs: prepare.Inputs, name: str) -> bool | None:
    """Train an earlier stage, those before it being trained; True where an earlier run had, None where it names a checkpoint."""
    job = chain.training(request, inputs, name)
    return None if job is None else _trained([job], f"train ({name})")


def _trained(jobs: Sequence[tuple[subject.Subject, int, str, subject.Subject | None]], stage: str) -> bool:
    missing = [job for job in jobs if not layout.is_complete(job[2])]
    if missing:
        here().shards(training.train, missing, stage)
    return not missing


@as_task
def fit(job: plan.FitJob, of: str = "") -> bool:
    """Fit one set of factors, spectra or projections; True where an earlier run had. of: the earlier stage that they are of."""
    if layout.is_complete(job.url):
        for rest in ("partial", "state"):  # left where a run was killed right after its fit was complete
            storage.delete_tree(location.join(job.url, rest))
        return True
    try:
        if isinstance(job, factors.FactorJob):
            _fit_factors(job, f"{job.fisher}, {of}" if of else job.fisher)
        elif isinstance(job, projection.ProjectionJob):
            _fit_projection(job)
        elif isinstance(job, retraining.RetrainJob):
            retrain(job, "retrain (dtda)")
        elif isinstance(job, sampling.SampleJob):
            _sample(job)
        else:
            _fit_spectra(job)
    except ShardFailed:
        # Another run at work on the same fit (or a worker that outlived a killed one) sweeps the partial sums once it is done.
        if not layout.is_complete(job.url):
            raise
    return False


def _fit_factors(job: factors.FactorJob, kind: str) -> None:
    run, before = here().shards, _begin(job.url)
    factors.create_factors(job)
    for sums, label in (("covariance", "covariances"), ("eigenvalues", "eigenvalues")):
        run(factors.sum_shard, factors.leaves(job, sums), f"{label} ({kind})")  # type: ignore[arg-type]
        for level in factors.levels(job, sums):  # type: ignore[arg-type]
            run(factors.reduce_node, level, f"sum {label} ({kind})")
        if sums == "covariance":
            count = len(subject.open_subject(job.subject).attributed.blocks)
            run(factors.decompose_layer, [(job, layer) for layer in range(count)], f"eigendecompositions ({kind})")
    _price(job.url, before)
    run(factors.finish_factors, [job], f"finish factors ({kind})")


def _fit_spectra(job: dense.DenseJob) -> None:
    run, kind, before = here().shards, job.curvature, _begin(job.url)
    dense.create(job)
    run(dense.rows, dense.row_tasks(job), f"matrix ({kind})")
    run(dense.decompose, dense.decompose_tasks(job), f"eigendecomposition ({kind})")
    _price(job.url, before)
    run(dense.finish, [job], f"finish spectra ({kind})")


def _fit_projection(job: projection.ProjectionJob) -> None:
    run, before = here().shards, _begin(job.url)
    run(projection.sum_part, [(job, part) for part in range(job.parts)], "projected gradients")
    _price(job.url, before)
    run(projection.finish, [job], "finish projection")


def _sample(job: sampling.SampleJob) -> None:
    session, before = here(), here().spent
    session.shards(sampling.prepare, [job], "prepare chains")
    for line in sampling.warnings(job):
        session.progress.say(line)
    session.shards(sampling.sample_group, [(job, group) for group in range(len(job.cut.groups))], "chains")
    _price(job.url, before)
    session.shards(sampling.finish, [job], "finish chains")


def retrain(job: retraining.RetrainJob, stage: str, masks: np.ndarray[Any, Any] | None = None) -> None:
    """Train every model of a ground truth that is not there yet. masks: of subsets that were chosen."""
    session = here()
    retraining.create(job, masks)
    if job.alone:
        session.progress.say(f"models are retrained one by one: {job.alone}")
    session.shards(retraining.retrain_piece, retraining.pieces(job), stage)
    storage.write_json(location.join(job.url, "seconds.json"), {"compute": retraining.spent(job)})
    session.shards(retraining.finish, [job], f"finish {stage}")


@as_task
def make_directions(job: directions.DirectionJob, of: str = "") -> bool:
    """Make the queries' directions under one method; True where an earlier run had. of: the earlier stage that they are of."""
    if layout.is_complete(job.url):
        return True
    title, before = job.parsed().title, _begin(job.url)
    here().shards(
        directions.make_directions, [(job, block) for block in range(job.blocks)], f"directions ({title}{f', {of}' if of else ''})"
    )
    _price(job.url, before)
    directions.finish(job)
    return False


@as_task
def choose(job: candidates.CandidateJob) -> bool:
    """Choose which training examples are scored; True where an earlier run had."""
    if layout.is_complete(job.url):
        return True
    run = here().shards
    for each, whose in zip(job.embedded, (job.asked.on, "queries"), strict=False):
        if not layout.is_complete(each.url):
            candidates.create_embeddings(each)
            run(candidates.embed_part, [(each, part) for part in range(len(each.parts))], f"embeddings ({whose})")
            run(candidates.finish_embeddings, [each], f"finish embeddings ({whose})")
    run(candidates.select, [job], "candidates")
    return False


@as_task
def score(job: scores.ScoreJob, of: str = "") -> list[dict[str, Any]]:
    """Score every train chunk, or all candidates, against every query block; the receipts. of: the earlier stage that they are of."""
    shards, blocks = job.shape
    if job.candidates:
        told = here().shards(sparse.score_piece, sparse.pieces(job), f"scores of candidates ({of or 'train'})")
        here().shards(sparse.gather, [(job, block) for block in range(blocks)], f"gather scores ({of or 'train'})")
        return told
    return _SESSION.get().shards(
        scores.score_shard, [(job, s, q) for q in range(blocks) for s in range(shards)], f"scores ({of})" if of else "scores"
    )


@as_task
def verify(jobs: Sequence[scores.ScoreJob]) -> None:
    """Read every chunk of the scores back."""
    whole = [(job, shard) for job in jobs if not job.candidates for shard in range(job.shape[0])]
    chosen = [(job, block) for job in jobs if job.candidates for block in range(job.shape[1])]
    for function, tasks in ((scores.verify_shard, whole), (sparse.verify_block, chosen)):
        if tasks:
            here().keep(here().shards(function, tasks, "verify"))


@as_task
def average(job: ensemble.MeanJob) -> None:
    """Average the members of an ensemble, and read the means back."""
    shards = [(job, shard) for shard in range(job.first.shape[0])]
    _SESSION.get().shards(ensemble.average_shard, shards, "average")
    here().keep(here().shards(ensemble.verify_mean, shards, "verify the average"))


@as_task
def finish(done: plan.Plan, run_url: str, manifest: dict[str, Any], started: float) -> None:
    """Write the report, and turn the run complete. started: when the run began, as time.perf_counter."""
    here = _SESSION.get()
    storage.sweep(run_url)
    with here.progress.stage("report", 1) as advance:
        begun = time.perf_counter()
        publish.write_page(done, run_url, manifest | {"timings": here.timed(started)})
        here.timings["report"] = dict.fromkeys(("wall", "compute"), time.perf_counter() - begun)
        sums = checksums.write_run(run_url, here.sums_below(run_url), checksums.used(done))
        publish.complete(run_url, manifest | {"timings": here.timed(started)} | sums)
        advance()
