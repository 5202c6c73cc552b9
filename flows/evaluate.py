"""The whole evaluation: attribute (or take the run that is there), retrain, compare every method's predictions with it, publish."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from infra.cluster import ShardFailed
from infra.masking import masked
from infra.prefect_api import embedded_api
from infra.settings import quiet_prefect
from tasks import evaluate as measuring
from tasks import evaluate_page, evaluate_removal, evaluate_results, layout, prepare, retraining
from tasks.evaluate import Evaluation
from tasks.retraining import RetrainJob
from tda import location
from tda.errors import InputError
from tda.evaluation import effects, subsets
from tda.fingerprint import fingerprint
from tda.methods import parse_all
from tda.methods.multistage import Multistage
from tda.methods.sweep import expand
from tda.results import Run, open_run

if TYPE_CHECKING:
    import numpy as np

    from flows.config import RunConfig

quiet_prefect()
from distributed import Client  # noqa: E402
from prefect import flow  # noqa: E402  (its settings are read at import)

from flows import attribute, failures, stages  # noqa: E402
from flows.guarded import as_task, completed, guarded  # noqa: E402
from flows.progress import Progress  # noqa: E402


@dataclass(frozen=True)
class EvaluationSummary:
    """Where a finished evaluation is. reused: what was taken from earlier runs and evaluations."""

    run_id: str
    url: str
    store: str
    reused: list[str]


@dataclass(frozen=True)
class _Ready:
    """What evaluate_run has ready for the flow: when it began, the run's inputs, what is retrained, and a cluster."""

    started: float
    request: prepare.Request
    inputs: prepare.Inputs
    truth: RetrainJob
    client: Client


_READY: ContextVar[_Ready] = ContextVar("ready")


def evaluate_run(config: RunConfig, command: str = "") -> EvaluationSummary:
    """Evaluate every method of a configuration, or finish what an earlier try left.

    Args:
        config: the run; without an [evaluation] table its defaults hold.
        command: the command line, for the message of a failed evaluation.

    Raises:
        InputError, StoreError, ClusterError, ApiError: what the user gave or named is not usable; nothing was written.
        RunFailed: a stage failed; what was finished is kept.
    """
    started = time.perf_counter()
    config = _completed(config)
    request = attribute.request_of(config)
    _check_stages(request)
    if config.candidates is not None:
        raise InputError("tda evaluate compares the scores of all training examples, and [candidates] leaves some out; remove the table")
    with embedded_api() as api:
        inputs = attribute.examine(request)
        truth = retraining.plan(request.store, _truth(config))
        measuring.examine(_options(config), _families(config), truth)
        with (
            attribute.cluster_for(request.subject, config.cluster.spec(), request.subject.device) as client,
            api.used(),
            _given(_Ready(started, request, inputs, truth, client)),
            failures.told(request.store, command, "the same evaluation"),
        ):
            return completed(evaluate, config.model_dump(mode="json"))


def _check_stages(request: prepare.Request) -> None:
    """InputError where models would be retrained from fresh weights, while a method is about one that starts from others."""
    stages = [method.title for method in parse_all([json.loads(text) for text in request.methods]) if isinstance(method, Multistage)]
    if stages:
        raise InputError(
            f"tda evaluate retrains from fresh weights, and method {stages[0]!r} is about a model that was fine-tuned from others; "
            'leave it out of the configuration that is evaluated, or set evaluation.kind = "tracing"'
        )


def _completed(config: RunConfig) -> RunConfig:
    from flows.config import EvaluationConfig

    return config if config.evaluation is not None else config.model_copy(update={"evaluation": EvaluationConfig()})


def _options(config: RunConfig) -> dict[str, Any]:
    assert config.evaluation is not None
    return config.evaluation.retraining()


def _families(config: RunConfig) -> list[str]:
    return [swept.family for swept in expand(config.methods)]


def _truth(config: RunConfig) -> RetrainJob:
    """Random subsets of the configuration."""
    told, options = _options(config), json.dumps(config.problem_options, sort_keys=True)
    return RetrainJob(
        "", config.problem, options, tuple(told["alphas"]), told["subsets"], told["seeds"], told["seed"], config.dtype, device=config.device
    )


@contextmanager
def _given(ready: _Ready) -> Iterator[None]:
    token = _READY.set(ready)
    try:
        with attribute.given(attribute.Prepared(ready.started, ready.inputs, ready.client)):
            yield
    finally:
        _READY.reset(token)


@flow(name="evaluate", validate_parameters=False)
@guarded
def evaluate(config: dict[str, Any]) -> EvaluationSummary:
    """Attribute, retrain, compare, publish. config: a RunConfig as JSON."""
    from flows.config import RunConfig

    parsed, ready = RunConfig.model_validate(config), _READY.get()
    done = attribute.attribute(config, reuse=True)
    run, told, store = open_run(done.store, done.run_id), _options(parsed), ready.request.store
    progress, reused = Progress(), list(done.reused)
    with progress.shown(), stages.session(ready.client, progress) as session:
        reused += ["retraining"] if retrain(ready.truth, "retrain") else []
        examples, alone = ready.inputs.examples, ""
        if told["leave_one_out"]:
            groups = effects.leave_one_out(examples, subsets.left_out(examples, told["leave_one_out"], told["seed"]))
            alone = _retrained(parsed, store, groups, "retrain (leave one out)")
        job = measuring.plan(run, ready.truth.url, alone, _families(parsed), json.dumps(told, sort_keys=True))
        if layout.is_complete(job.url):
            reused.append("evaluation")
            evaluate_results.complete(job, location.read_json(location.join(job.url, "complete.json")))
            return EvaluationSummary(run.id, job.url, done.store, reused)
        measure(job)
        numbers = measuring.numbers_of(job)
        chosen = measuring.choose(job, numbers)
        notes: list[str] = []
        removal: dict[str, Any] = {}
        if told["removal"]:
            url = _retrained(parsed, store, evaluate_removal.masks(job, chosen), "retrain (removal)")
            removal = evaluate_removal.curves(job, chosen, url)
    randomised = _randomised(parsed, ready, job, chosen, notes) if told["randomised"] else None
    found = evaluate_results.Found(numbers, chosen, removal, randomised)
    publish(job, found, session.timed(ready.started), notes)
    return EvaluationSummary(run.id, job.url, done.store, reused)


def _retrained(config: RunConfig, store: str, masks: np.ndarray[Any, Any], stage: str) -> str:
    """Retrain on given subsets; the URL of what they measure."""
    told = _options(config)
    base = _truth(config)
    job = RetrainJob("", base.problem, base.options, (), 0, told["retrainings"], told["seed"], base.dtype, device=config.device)
    planned = retraining.plan(store, retraining.chosen_subsets(job, masks))
    retrain(planned, stage, masks)
    return planned.url


@as_task
def retrain(job: RetrainJob, stage: str, masks: np.ndarray[Any, Any] | None = None) -> bool:
    """Train every model of a ground truth that is not there yet; True where an earlier evaluation had."""
    if layout.is_complete(job.url):
        return True
    stages.retrain(job, stage, masks)
    return False


@as_task
def measure(job: Evaluation) -> None:
    """Compare each method's predictions with the ground truth."""
    stages.here().shards(measuring.measure, [(job, method) for method in range(len(job.families))], "measure")


def _randomised(config: RunConfig, ready: _Ready, job: Evaluation, chosen: Sequence[int], notes: list[str]) -> np.ndarray[Any, Any] | None:
    """Score an untrained model by the chosen methods that need no training, in a store of its own inside the store."""
    tables = [swept.table for swept in expand(config.methods)]
    methods = parse_all(tables)
    kept = [tables[m] for m in chosen if methods[m].meets == "final" and methods[m].of_weights]
    if not kept:
        return None
    options = json.dumps(config.problem_options, sort_keys=True)
    seed = -1 - config.seed  # below 0, and so no member's: what a member started from resembles it
    mark = fingerprint("untrained", problem=ready.inputs.problem, train=ready.inputs.train, dtype=config.dtype, seed=seed)
    store = layout.artifact(ready.request.store, "untrained", mark)
    weights = location.join(store, "weights.safetensors")
    evaluate_removal.write_untrained((config.problem, options, config.dtype, seed, weights))
    changes = {"store": store, "checkpoint": weights, "ensemble": 1, "self_influence": False, "methods": kept, "evaluation": None}
    other = config.model_copy(update=changes)
    try:
        inputs = attribute.examine(attribute.request_of(other))
        with attribute.given(attribute.Prepared(time.perf_counter(), inputs, ready.client)):
            done = attribute.attribute(other.model_dump(mode="json"), reuse=True)
    except (InputError, ShardFailed) as error:
        if isinstance(error, ShardFailed) and not isinstance(error.cause, InputError):
            raise  # may be gone at the next try, where a note would be for good
        notes.append(f"the check against an untrained model was left out: {masked(str(error))}")
        return None
    return evaluate_removal.randomised(job, Run(done.run_url, location.read_json(location.join(done.run_url, "run.json"))))


@as_task
def publish(job: Evaluation, found: evaluate_results.Found, timings: dict[str, Any], notes: Sequence[str]) -> None:
    """Write arrays, table, page and manifest; the manifest last."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    told = evaluate_results.manifest(job, found, created, timings, notes)
    evaluate_results.write_results(job, found)
    evaluate_page.write_page(job, told)
    evaluate_results.complete(job, told)
