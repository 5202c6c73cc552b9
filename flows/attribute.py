"""The whole run: check, train where needed, fit, make directions, score, verify, publish."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from infra import storage
from infra.cluster import ClusterSpec, open_cluster
from infra.prefect_api import embedded_api
from infra.settings import quiet_prefect
from tasks import candidates, chain, choose, ensemble, layout, plan, prepare, publish, sampling_told, solves, sparse, stage_facts
from tasks.chain import Earlier
from tasks.standing import NO_GPU, place, standing
from tasks.subject import Subject
from tda import location, schema
from tda.device import named
from tda.errors import InputError
from tda.methods.sweep import expand, ranked

if TYPE_CHECKING:
    from flows.config import RunConfig

__all__ = ["Prepared", "RunFailed", "RunSummary", "attribute", "attribute_run", "examine", "given", "request_of"]

quiet_prefect()
from distributed import Client  # noqa: E402
from prefect import flow  # noqa: E402  (its settings are read at import)

from flows import failures, stages  # noqa: E402
from flows.failures import RunFailed  # noqa: E402
from flows.guarded import completed, guarded  # noqa: E402
from flows.progress import Progress  # noqa: E402


@dataclass(frozen=True)
class RunSummary:
    """Where a finished run is, and what it took from earlier ones."""

    run_id: str
    run_url: str
    report_url: str
    store: str
    reused: list[str]


def attribute_run(config: RunConfig, command: str = "") -> RunSummary:
    """Run one configuration, or finish what an earlier try left.

    Args:
        config: what to run.
        command: the command line that runs it, for the message of a failed run.

    Raises:
        InputError, StoreError, ClusterError, ApiError: what the user gave or named is not usable; nothing was written.
        RunFailed: a stage failed; what was finished is kept.
    """
    started = time.perf_counter()
    request = request_of(config)
    with embedded_api() as api:
        inputs = examine(request)
        with (
            cluster_for(request.subject, config.cluster.spec(), request.subject.device) as client,
            api.used(),
            given(Prepared(started, inputs, client)),
            failures.told(request.store, command),
        ):
            return completed(attribute, config.model_dump(mode="json"))


class OfProblem(Protocol):
    """What names a problem and its options, as JSON."""

    @property
    def problem(self) -> str: ...
    @property
    def options(self) -> str: ...


def cluster_for(of: OfProblem, cluster: ClusterSpec, device: str = "cpu") -> AbstractContextManager[Client]:
    """A cluster whose workers have the problem, the device, and versions like those here."""
    if device == "cuda" and cluster.kind == "local" and named(device) == "cpu":
        raise InputError(NO_GPU.format("on this machine"))
    return open_cluster(cluster, partial(standing, of.problem, of.options, device, place()))


def examine(request: prepare.Request) -> prepare.Inputs:
    """Look at everything that a user can get wrong; the store first, since reading all of the data may take long."""
    storage.check_store(request.store)
    _refuse_newer(request.store)
    return choose.examine(request, chain.examine(request, prepare.examine(request)))


def _refuse_newer(store: str) -> None:
    """InputError where a newer version of this package writes to the store: its latest run shows, since ids begin with the time."""
    names = location.list_names(location.join(store, "runs"))
    for manifest in location.read_json_many([layout.run(store, name) + "/run.json" for name in names[-1:]]):
        schema.check_version(manifest or {"schema_version": 0}, store)


def request_of(config: RunConfig) -> prepare.Request:
    """A configuration in the strings and numbers that tasks take."""
    subject = Subject(
        config.problem,
        json.dumps(config.problem_options, sort_keys=True),
        location.resolve(config.checkpoint) if config.checkpoint else "",
        tuple(config.modules),
        tuple(config.exclude),
        config.dtype,
        autocast=config.autocast or "",
        recompute=config.checkpoint_activations,
        device=config.device,
        scale=config.autocast_scale,
    )
    methods = tuple(json.dumps(swept.table, sort_keys=True) for swept in expand(ranked(config.methods, config.query_rank)))
    chosen = config.candidates.model_dump_json(exclude_none=True) if config.candidates else ""
    return prepare.Request(
        subject, location.resolve(config.store), config.seed, config.products, methods, config.batch_size, config.shard_size,
        config.query_block, config.self_influence, config.ensemble, chosen,
        config.batch_tokens, config.layer_block,
    )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What attribute_run has ready for the flow: when the run began (perf_counter), what was examined, and a cluster."""

    started: float
    inputs: prepare.Inputs
    client: Client


# The flow's own argument is a configuration alone, so that a schedule can hold it.
_PREPARED: ContextVar[Prepared] = ContextVar("prepared")


@contextmanager
def given(prepared: Prepared) -> Iterator[None]:
    """Let a flow started in the block use what is ready."""
    token = _PREPARED.set(prepared)
    try:
        yield
    finally:
        _PREPARED.reset(token)


@contextmanager
def prepared(request: prepare.Request, cluster: ClusterSpec) -> Iterator[Prepared]:
    """What attribute_run prepared, or, in a flow that was started by a schedule, the same made here."""
    given = _PREPARED.get(None)
    if given is not None:
        yield given
        return
    started = time.perf_counter()
    inputs = examine(request)
    with cluster_for(request.subject, cluster, request.subject.device) as client:
        yield Prepared(started, inputs, client)


@flow(name="attribute", validate_parameters=False)
@guarded
def attribute(config: dict[str, Any], *, reuse: bool = False) -> RunSummary:
    """Fit, score, publish. config: a RunConfig as JSON, so that a schedule can hold it. reuse: a finished run of the same will do."""
    from flows.config import RunConfig

    parsed = RunConfig.model_validate(config)
    request = request_of(parsed)
    progress = Progress()
    with progress.shown(), prepared(request, parsed.cluster.spec()) as ready, stages.session(ready.client, progress):
        inputs = ready.inputs
        reused = train(request, inputs)
        decided = plan.plan(request, inputs)
        if reuse and (finished := finished_run(decided)):
            progress.say(f"reused: run {finished}")
            run_url = layout.run(request.store, finished)
            return RunSummary(finished, run_url, location.join(run_url, "report.html"), request.store, ["run"])
        run_id, manifest, resumed = _claim(decided, config)
        run_url = layout.run(request.store, run_id)
        decided = decided.placed(run_url)
        if resumed:
            progress.say(f"resuming run {run_id}")
        more, receipts = compute(decided, inputs, run_url)
        reused |= more
        if any(reused.values()):
            progress.say(f"reused: {', '.join(name for name, was in reused.items() if was)}")
        found: dict[str, Any] = {
            "reused": reused,
            "damping": publish.used_damping(decided.first),
            "layer_share": publish.layer_share(decided.first, receipts[0]),
        }
        for earlier in decided.stages:
            manifest["stages"][earlier.name]["damping"] = publish.used_damping(earlier.member)
        found |= solves.summarize(decided) | sampling_told.summarize(decided)
        found |= {"candidates": candidates.facts(decided.candidates)} if decided.candidates else {}
        found["devices"] = stages.devices(request.subject.device)
        warned = [candidates.note(found["candidates"])] if decided.candidates else []
        warned += [*solves.warnings(found), *sampling_told.warnings(found["sampling"]), *stage_facts.warnings(decided)]
        if len(found["devices"]) > 1:
            warned.append(f"workers computed on different devices ({', '.join(found['devices'])}), whose numbers differ by rounding")
        found["notes"] = [*manifest["notes"], *warned]
        for line in warned:
            progress.say(line)
        solves.write_solves(decided)
        stages.finish(decided, run_url, manifest | found, ready.started)
    names = [name for name, was in reused.items() if was]
    return RunSummary(run_id, run_url, location.join(run_url, "report.html"), request.store, names)


def compute(decided: plan.Plan, inputs: prepare.Inputs, run_url: str) -> tuple[dict[str, bool], list[list[dict[str, Any]]]]:
    """Fit, make directions, score and verify what of a placed plan is not there yet: what was reused, by name; by member, the receipts."""
    run_id, reused, fitted = run_url.rpartition("/")[2], dict[str, bool](), set[str]()
    receipts, labels = [], {"train": inputs.train_labels, "query": inputs.query_labels}
    if decided.candidates:
        reused["candidates"] = stages.choose(decided.candidates)
    for member in decided.members:
        suffix = f", seed {member.seed}" if len(decided.members) > 1 else ""
        for key, fit in member.fits.items():
            if fit.url in fitted:
                continue  # one for all members, and done for the first of them
            fitted.add(fit.url)
            reused[f"{plan.ARTIFACTS[type(fit)]} ({key}{suffix})"] = stages.fit(fit)
        made = [stages.make_directions(scored.directions) for scored in member.scores.methods]
        reused[f"directions{suffix}"] = all(made)
        sparse.create_results(member.scores, labels, plan.results_attrs(decided, run_id))
        receipts.append(stages.score(member.scores))
    for earlier in decided.stages:
        reused |= _score_stage(decided, earlier, inputs, run_id)
    jobs = [member.scores for member in decided.members]
    stages.verify([*jobs, *(earlier.member.scores for earlier in decided.stages)])
    if len(jobs) > 1:
        mean = ensemble.MeanJob(location.join(run_url, "results.zarr"), tuple(jobs))
        ensemble.create_means(mean, labels, plan.results_attrs(decided, run_id))
        stages.average(mean)
    return reused, receipts


def train(request: prepare.Request, inputs: prepare.Inputs) -> dict[str, bool]:
    """Train what names no checkpoint, the first stage first, since each starts where the one before it ended; what was reused, by name."""
    reused: dict[str, bool] = {}
    for name in reversed(list(inputs.stages)):
        was = stages.train_stage(request, inputs, name)
        reused |= {} if was is None else {f"checkpoint ({name})": was}
    return reused if request.subject.checkpoint else reused | {"checkpoint": stages.train(request, inputs)}


def _score_stage(decided: plan.Plan, earlier: Earlier, inputs: prepare.Inputs, run_id: str) -> dict[str, bool]:
    """Fit, carry directions on, and score one earlier stage; what was reused, by name."""
    name, member = earlier.name, earlier.member
    reused = {f"{plan.ARTIFACTS[type(job)]} ({key}, {name})": stages.fit(job, name) for key, job in member.fits.items()}
    made = [stages.make_directions(scored.directions, name) for scored in member.scores.methods]
    reused[f"directions ({name})"] = all(made)
    labels = {"train": earlier.inputs.train_labels, "query": inputs.query_labels}
    sparse.create_results(member.scores, labels, stage_facts.attrs(decided, earlier, run_id))
    stages.score(member.scores, name)
    return reused


def finished_run(decided: plan.Plan) -> str:
    """The newest complete run with this fingerprint whose methods have these labels; empty where there is none."""
    runs = location.join(decided.request.store, "runs")
    names = location.list_names(runs)
    found = zip(names, location.read_json_many([location.join(runs, n, "run.json") for n in names]), strict=True)
    titles = [method.title for method in decided.methods]
    same = [
        (str(manifest["created"]), name)
        for name, manifest in found
        if manifest
        and manifest.get("complete")
        and manifest.get("fingerprints", {}).get("run") == decided.fingerprint
        and manifest.get("methods") == titles
    ]
    return max(same)[1] if same else ""


def _claim(decided: plan.Plan, config: dict[str, Any]) -> tuple[str, dict[str, Any], bool]:
    """The unfinished run with this fingerprint, or a new one: (id, manifest, whether it is resumed)."""
    store = decided.request.store
    runs = location.join(store, "runs")
    names = location.list_names(runs)
    for name, found in zip(names, location.read_json_many([location.join(runs, n, "run.json") for n in names]), strict=True):
        if found and not found.get("complete") and found.get("fingerprints", {}).get("run") == decided.fingerprint:
            return name, publish.first_manifest(decided, name, found["created"], config), True
    created = datetime.now(UTC)
    run_id = f"{created:%Y%m%d-%H%M%S}-{decided.fingerprint[:6]}"
    while True:
        manifest = publish.first_manifest(decided, run_id, created.isoformat(timespec="seconds"), config)
        if storage.create_once(location.join(runs, run_id, "run.json"), json.dumps(manifest, indent=2, allow_nan=False).encode()):
            return run_id, manifest, False
        run_id = f"{created:%Y%m%d-%H%M%S}-{decided.fingerprint[:6]}-{secrets.token_hex(2)}"  # another start had it first
