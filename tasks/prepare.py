"""Before anything is computed or written: everything a user can get wrong is looked at, and what the run will be is decided."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks import layout
from tasks.factors import FactorJob
from tasks.scores import CHUNK_QUERIES, ScoreJob
from tasks.subject import Opened, Subject, open_subject, read_checkpoint
from tda import checkpoint, location, sizes
from tda.data import batches, digest, length
from tda.directions import check_finite
from tda.errors import InputError
from tda.fingerprint import fingerprint
from tda.methods import parse_all
from tda.problem import can_fit, measurement_of, problem_digest
from tda.products import Products
from tda.schema import SIGN

#: So many examples of each split are evaluated before a run starts; the others' losses are checked when they are scored.
PROBED = 1024


@dataclass(frozen=True)
class Request:
    """What the user asked for, in strings and numbers. methods and options are JSON; sizes may be None."""

    subject: Subject
    store: str
    seed: int
    products: Products
    methods: tuple[str, ...]
    batch_size: int | None
    shard_size: int | None
    query_block: int | None
    self_influence: bool


@dataclass(frozen=True)
class Inputs:
    """What the data and the code are: digests, counts and integer labels by split."""

    problem: str
    train: str
    query: str
    examples: int
    queries: int
    train_labels: np.ndarray | None
    query_labels: np.ndarray | None


@dataclass(frozen=True)
class Plan:
    """What a run will do: the subject at its checkpoint, the fits (by key), the scores, and the fingerprint of the whole."""

    request: Request
    subject: Subject
    inputs: Inputs
    checkpoint: str
    fits: dict[str, FactorJob]
    scores: ScoreJob
    fingerprint: str


def examine(request: Request) -> Inputs:
    """Load and check everything; nothing is written. Raises InputError in one line, also for whatever the problem's own code raises."""
    try:
        return _examined(request)
    except InputError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno}, in {place.name})"
        raise InputError(
            f"problem {request.subject.problem!r} cannot be evaluated: {said}; set TDA_TRACEBACK=1 to see all of it"
        ) from error


def _examined(request: Request) -> Inputs:
    methods = parse_all([json.loads(text) for text in request.methods])
    subject = request.subject
    if subject.dtype == "float64" and request.products == "bfloat16":
        raise InputError('products = "bfloat16" makes no sense with dtype = "float64"; leave one of them out')
    open_subject.cache_clear()  # a schedule's process may have opened what lay here yesterday
    opened = open_subject(subject)
    problem = opened.attributed.problem
    if not subject.checkpoint and not can_fit(problem):
        raise InputError(f"problem {subject.problem!r} has no fit method and the config no checkpoint; give one of them")
    found = {split: digest(problem, opened.data(split), split, check=_target_check(opened, split)) for split in ("train", "query")}
    for split in ("train", "query"):
        _probe(opened, split)
    if any(method.fisher_kind == "exact" for method in methods):
        batch = opened.attributed.load(opened.train, [0])
        next(problem.likelihood.hessian_columns(opened.attributed.tape(batch).outputs.detach(), batch.targets))
    return Inputs(
        problem_digest(subject.problem, json.loads(subject.options)),
        found["train"][0],
        found["query"][0],
        length(opened.train, "train"),
        length(opened.query, "query"),
        found["train"][1],
        found["query"][1],
    )


def _target_check(opened: Opened, split: str) -> Callable[[Tensor], None]:
    """likelihood.check for targets of a split without a forward pass each: against outputs of the shape that the first example has."""
    attributed = opened.attributed
    with torch.no_grad():
        outputs = attributed.problem.predict(attributed.model, attributed.load(opened.data(split), [0]))

    def check(targets: Tensor) -> None:
        # With a class axis last, as many positions as the targets have: sequences may be of other lengths than the first.
        last = outputs.ndim == targets.ndim + 1
        row = outputs.reshape(-1, outputs.shape[-1])[0] if last else outputs[0]
        attributed.problem.likelihood.check(row.expand(*targets.shape if last else targets.shape[:1], *row.shape), targets)

    return check


def _probe(opened: Opened, split: str) -> None:
    """Evaluate the first examples of a split: finite losses and measurements, one per example."""
    attributed, data = opened.attributed, opened.data(split)
    problem = attributed.problem
    function = problem.likelihood.loss if split == "train" else problem.measurement
    with torch.no_grad():
        for ids in batches(range(min(len(data), PROBED)), 64):
            batch = attributed.load(data, ids)
            outputs = problem.predict(attributed.model, batch)
            try:
                problem.likelihood.check(outputs, batch.targets)
            except InputError as error:
                raise InputError(f"{split} examples {ids[0]}..{ids[-1]}: {error}") from error
            check_finite(function(outputs, batch.targets), ids, f"{'loss' if split == 'train' else 'measurement'} of {split} example")


def checkpoint_artifact(request: Request, inputs: Inputs) -> str:
    """The folder of the checkpoint that the flow trains: problem, data, seed and precision determine it."""
    parts = {"problem": inputs.problem, "train": inputs.train, "seed": request.seed, "dtype": request.subject.dtype}
    return layout.artifact(request.store, "checkpoint", fingerprint("checkpoint", **parts))


def plan(request: Request, inputs: Inputs) -> Plan:
    """Decide a run. Where the request names no checkpoint, the trained artifact's is used; it must be there."""
    subject = request.subject
    if not subject.checkpoint:
        subject = replace(subject, checkpoint=location.join(checkpoint_artifact(request, inputs), "weights.safetensors"))
    weights = checkpoint.digest(read_checkpoint(subject.checkpoint))
    seen = fingerprint("inputs", digests=[inputs.problem, inputs.train, inputs.query])
    subject = replace(subject, weights=weights, source=inputs.problem, inputs=seen)
    opened = open_subject(subject)
    blocks = opened.attributed.blocks
    itemsize = torch.tensor([], dtype=opened.attributed.dtype).element_size()
    batch = request.batch_size or sizes.batch_size(blocks, opened.attributed.outputs, itemsize=itemsize)
    shard = request.shard_size or sizes.shard_size(inputs.examples)
    # What every number of the run depends on.
    common = {
        "weights": weights, "problem": inputs.problem, "train": inputs.train, "parameters": [n for b in blocks for n in b.parameters],
        "dtype": str(opened.attributed.dtype), "products": request.products, "batch": batch, "shard": shard,
    }  # fmt: skip
    methods = parse_all([json.loads(text) for text in request.methods])
    fits: dict[str, FactorJob] = {}
    urls = []
    for method in methods:
        if method.fisher_kind is None:
            urls.append("")
            continue
        seed = request.seed if method.fisher_kind == "sampled" else 0
        key = fingerprint("factors", fisher=method.fisher_kind, seed=seed, **common)
        url = layout.artifact(request.store, "factors", key)
        fits[method.fisher_kind] = FactorJob(url, (subject,), method.fisher_kind, seed, inputs.examples, shard, batch, request.products)
        urls.append(url)
    queries = request.query_block or sizes.query_block(blocks, inputs.queries, len(methods), itemsize=itemsize)
    if request.query_block is None and CHUNK_QUERIES < queries < inputs.queries:
        queries -= queries % CHUNK_QUERIES  # so that it can be cut in chunks of that many
    scoring = request.batch_size or sizes.scoring_batch(blocks, batch, queries * len(methods), itemsize=itemsize)
    asked = {
        "query": inputs.query, "methods": [json.loads(text) for text in request.methods],
        "fits": [url.rpartition("/")[2] for url in urls], "block": queries,
    }  # fmt: skip
    directions = fingerprint("directions", **common, **asked)
    whole = fingerprint("run", directions=directions, batch=scoring, self_influence=request.self_influence, seed=request.seed)
    scores = ScoreJob(
        subject, tuple(zip(request.methods, urls, strict=True)), layout.artifact(request.store, "directions", directions),
        "", "", inputs.examples, inputs.queries, shard, queries, batch, scoring, request.products, request.self_influence,
    )  # fmt: skip
    return Plan(request, subject, inputs, weights, fits, scores, whole)


def stated(plan: Plan) -> dict[str, Any]:
    """What stands both in the manifest and beside the arrays: methods, sign, units and the measurement."""
    methods = plan.scores.parsed()
    return {
        "methods": [method.title for method in methods],
        "sign": SIGN,
        "units": {method.title: method.unit for method in methods},
        "measurement": measurement_of(open_subject(plan.subject).attributed.problem),
    }


def results_attrs(plan: Plan, run_id: str) -> dict[str, Any]:
    """Attributes of results.zarr: sign, units, damping and the measurement stand beside the numbers."""
    damping = {method.title: getattr(method, "damping", None) for method in plan.scores.parsed()}
    return {"run_id": run_id, **stated(plan), "damping": damping}


def described(plan: Plan) -> dict[str, Any]:
    """The plan's fingerprints, for the manifest."""
    return {
        "checkpoint": plan.checkpoint,
        "train_data": plan.inputs.train,
        "query_data": plan.inputs.query,
        "problem": plan.inputs.problem,
        "factors": {key: job.url.rpartition("/")[2] for key, job in plan.fits.items()},
        "directions": plan.scores.directions.rpartition("/")[2],
        "run": plan.fingerprint,
    }
