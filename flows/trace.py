"""Fact tracing: train both stages some times, score the pre-training set by every method, and see who finds the documents behind an answer.

Each training is an ordinary run of the configuration with another seed, and so are the scores by methods that know one stage alone: runs of
the pre-training's problem at the weights that were trained. All are immutable, and reused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from flows import attribute, failures
from flows.guarded import completed, guarded
from flows.progress import Progress
from infra.prefect_api import embedded_api
from infra.settings import quiet_prefect
from tasks import layout, plan, prepare, tracing, tracing_results
from tasks.tracing import Row, Tracing
from tda import location
from tda.errors import InputError
from tda.methods import Method, parse_all
from tda.methods.multistage import Multistage
from tda.methods.sweep import Swept, expand
from tda.problem import load_problem

if TYPE_CHECKING:
    from flows.config import RunConfig

quiet_prefect()
from distributed import Client  # noqa: E402
from prefect import flow  # noqa: E402  (its settings are read at import)

At = Literal["finetuned", "pretrained"]


@dataclass(frozen=True)
class TracingSummary:
    """Where a finished evaluation is. run_id: of the first training's run. reused: what was taken from earlier runs and evaluations."""

    run_id: str
    url: str
    store: str
    reused: list[str]


@dataclass(frozen=True)
class _Split:
    """The methods of a configuration: those that know both stages, and those that know one."""

    both: list[tuple[Swept, Multistage]]
    single: list[tuple[Swept, Method]]


# What trace_run has ready for the flow: when it began, and a cluster.
_READY: ContextVar[tuple[float, Client]] = ContextVar("ready")


def trace_run(config: RunConfig, command: str = "") -> TracingSummary:
    """Evaluate fact tracing by every method of a configuration, or finish what an earlier try left.

    Args:
        config: the fine-tuning with a method `multistage`, and an [evaluation] table with kind = "tracing".
        command: the command line, for the message of a failed evaluation.

    Raises:
        InputError, StoreError, ClusterError, ApiError: what the user gave or named is not usable; nothing was written.
        RunFailed: a stage failed; what was finished is kept.
    """
    started = time.perf_counter()
    request = attribute.request_of(config)
    with embedded_api() as api:
        _examine(config)
        with (
            attribute.cluster_for(request.subject, config.cluster.spec(), request.subject.device) as client,
            api.used(),
            _given((started, client)),
            failures.told(request.store, command, "the same evaluation"),
        ):
            return completed(trace, config.model_dump(mode="json"))


@contextmanager
def _given(ready: tuple[float, Client]) -> Iterator[None]:
    token = _READY.set(ready)
    try:
        yield
    finally:
        _READY.reset(token)


def _examine(config: RunConfig) -> None:
    """Raise InputError, before anything is written, for all that can be told before the models are trained."""
    assert config.evaluation is not None
    split = _split(config)
    inputs = attribute.examine(attribute.request_of(_chained(config, split, config.seed)))
    stage = split.both[0][1].stages[0].table
    problem = load_problem(config.problem, config.problem_options)
    corpus = load_problem(stage.problem, stage.problem_options)
    tracing.gold(problem, len(corpus.train_data()))
    if config.evaluation.embedding is not None:
        tracing.check_encoder(config.evaluation.embedding)
    if config.evaluation.bm25 or config.evaluation.embedding is not None:
        tracing.texts(problem, "query")
        tracing.texts(corpus, "train")
    for at in config.evaluation.at if split.single else []:
        own = attribute.examine(attribute.request_of(_alone(config, split, config.seed, stage.checkpoint, at)))
        _same_queries(inputs, own, stage.problem)
    tuned = round(config.evaluation.tuning_queries * inputs.queries)
    families = [each.family for each, _ in (*split.both, *split.single)]
    swept = next((name for name in families if families.count(name) > 1), None)
    if swept is not None and not tuned:
        raise InputError(f"tuning_queries = {config.evaluation.tuning_queries:g} leaves nothing to choose a damping of {swept!r} by")


def _same_queries(inputs: prepare.Inputs, own: prepare.Inputs, problem: str) -> None:
    if inputs.query != own.query:
        raise InputError(
            f"the queries of {problem!r} are not those of the fine-tuning: methods that know one stage are asked them there; "
            "let both problems give the same query_data"
        )


def _split(config: RunConfig) -> _Split:
    """Raises InputError where no method names the pre-training, or one cannot be asked about it."""
    swept = expand(config.methods)
    methods = parse_all([each.table for each in swept])
    pairs = list(zip(swept, methods, strict=True))
    both = [(each, method) for each, method in pairs if isinstance(method, Multistage)]
    if not both:
        raise InputError('evaluation.kind = "tracing" needs a method multistage, which names the pre-training; add one')
    if config.candidates is not None:
        raise InputError("fact tracing ranks all documents, and [candidates] leaves some out; remove the table")
    if config.ensemble > 1:
        raise InputError(f"ensemble = {config.ensemble} does not go with fact tracing; set evaluation.seeds, and leave it out")
    for _, method in pairs:
        if method.meets != "final" or any(fit.kind == "retraining" for fit in method.fits):
            raise InputError(
                f"method {method.title!r} follows or repeats a training of one stage, and fact tracing scores at given weights; "
                "leave it out"
            )
    return _Split(both, [(each, method) for each, method in pairs if not isinstance(method, Multistage)])


def _chained(config: RunConfig, split: _Split, seed: int) -> RunConfig:
    """The run that trains both stages, and scores by the methods that know both."""
    tables = [each.table for each, _ in split.both]
    return config.model_copy(update={"seed": seed, "methods": tables, "self_influence": False, "evaluation": None})


def _alone(config: RunConfig, split: _Split, seed: int, checkpoint: str | None, at: At) -> RunConfig:
    """The run of the pre-training's problem at given weights by the methods that know one stage."""
    stage = split.both[0][1].stages[0].table
    # What sees no weights is scored once.
    first = config.evaluation is not None and at == config.evaluation.at[0]
    tables = [each.table for each, method in split.single if first or method.of_weights]
    changes: dict[str, Any] = {"problem": stage.problem, "problem_options": stage.problem_options, "checkpoint": checkpoint, "seed": seed}
    changes |= {"modules": stage.modules or config.modules, "exclude": config.exclude if stage.exclude is None else stage.exclude}
    return config.model_copy(update=changes | {"methods": tables, "self_influence": False, "evaluation": None})


@flow(name="trace", validate_parameters=False)
@guarded
def trace(config: dict[str, Any]) -> TracingSummary:
    """Train, score, rank, publish. config: a RunConfig as JSON."""
    from flows.config import RunConfig

    parsed, (started, client) = RunConfig.model_validate(config), _READY.get()
    assert parsed.evaluation is not None
    split, seeds = _split(parsed), tuple(range(parsed.seed, parsed.seed + parsed.evaluation.seeds))
    store, found, reused = attribute.request_of(parsed).store, list[dict[str, str]](), list[str]()
    progress = Progress()
    for seed in seeds:
        chained = _chained(parsed, split, seed)
        urls = {"both": _attributed(chained, client, reused)}
        request = attribute.request_of(chained)
        weights = _weights(request, attribute.examine(request))
        for at in parsed.evaluation.at if split.single else []:
            one = _alone(parsed, split, seed, weights[at], at)
            if one.methods:
                urls[at] = _attributed(one, client, reused)
        found.append(urls)
    job = _job(parsed, split, seeds, found)
    with progress.shown():
        if layout.is_complete(job.url):
            progress.say("reused: evaluation")
            tracing_results.complete(job, location.read_json(location.join(job.url, "complete.json")))
            return TracingSummary(job.run.rpartition("/")[2], job.url, store, [*reused, "evaluation"])
        with progress.stage("rank", 1) as advance:
            measured = tracing.measure(job)
            advance()
        wall = time.perf_counter() - started
        tracing_results.publish(job, measured, datetime.now(UTC).isoformat(timespec="seconds"), wall)
    return TracingSummary(job.run.rpartition("/")[2], job.url, store, reused)


def _attributed(config: RunConfig, client: Client, reused: list[str]) -> str:
    """The URL of a configuration's run, made or there."""
    inputs = attribute.examine(attribute.request_of(config))
    with attribute.given(attribute.Prepared(time.perf_counter(), inputs, client)):
        done = attribute.attribute(config.model_dump(mode="json"), reuse=True)
    if done.reused == ["run"]:
        reused.append(f"run {done.run_id}")
    return done.run_url


def _weights(request: prepare.Request, inputs: prepare.Inputs) -> dict[At, str]:
    """URLs of the weights after each stage; both are trained."""
    decided = plan.plan(request, inputs)
    return {"finetuned": decided.first.subject.checkpoint, "pretrained": decided.stages[0].member.subject.checkpoint}


def _job(config: RunConfig, split: _Split, seeds: Sequence[int], found: Sequence[dict[str, str]]) -> Tracing:
    """The evaluation of these runs, with its lines."""
    assert config.evaluation is not None
    told, stage = config.evaluation, split.both[0][1].stages[0].table
    rows = [
        Row(method.title, each.family, _named(method.stages[0].table.damping), "both", tuple(urls["both"] for urls in found), method.title)
        for each, method in split.both
    ]
    for at in told.at:
        for each, method in split.single:
            if at != told.at[0] and not method.of_weights:
                continue
            suffix = f", {at}" if method.of_weights else ""
            runs = tuple(urls[at] for urls in found)
            damping = _named(getattr(method, "damping", None))
            rows.append(Row(f"{method.title}{suffix}", f"{each.family}{suffix}", damping, at if method.of_weights else "text", runs, ""))
            rows[-1] = replace(rows[-1], title=method.title)
    kinds = [kind for kind, wanted in (("bm25", told.bm25), ("embedding", told.embedding is not None)) if wanted]
    titles = [tracing.text_title(kind, answer) for kind in kinds for answer in (False, True)]
    rows += [Row(title, title, "", "text", (), title) for title in titles]
    options = told.model_dump(include={"seed", "tuning_queries", "draws", "at", "embedding"})
    own, corpus = (json.dumps(each, sort_keys=True) for each in (config.problem_options, stage.problem_options))
    answers = tuple(urls["both"] for urls in found)
    return Tracing(
        answers[0], tuple(rows), answers, (config.problem, own), (stage.problem, corpus), tuple(seeds), json.dumps(options, sort_keys=True)
    )


def _named(damping: Any) -> str:
    """A damping as it was configured."""
    if damping is None or isinstance(damping, str):
        return damping or ""
    return f"{damping:g}"
