"""The whole study: check every point, train, decompose and measure those that fit, publish."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.prefect_api import embedded_api
from infra.settings import quiet_prefect
from tasks import decompose, decompose_lds, decompose_measure, decompose_page, decompose_results, decompose_temporary, layout, training
from tasks.decompose import Point, PointJob, Study
from tasks.decompose_lds import LdsJob
from tasks.dense import DenseJob
from tasks.factors import FactorJob
from tda import location

if TYPE_CHECKING:
    from flows.study import StudyConfig

quiet_prefect()
from prefect import flow  # noqa: E402  (its settings are read at import)

from flows import attribute, failures, stages  # noqa: E402
from flows.guarded import as_task, completed, guarded  # noqa: E402
from flows.progress import Progress  # noqa: E402

# The flow's own argument is a configuration alone, so that a schedule can hold it: what decompose_study examined, it finds here.
_EXAMINED: ContextVar[list[Point] | None] = ContextVar("examined", default=None)


@dataclass(frozen=True)
class StudySummary:
    """Where a finished study is; how many points it has, which it left out, and how many it took from earlier studies."""

    study_id: str
    url: str
    report_url: str
    store: str
    points: int
    refused: list[str]
    reused: int


def decompose_study(config: StudyConfig, command: str = "") -> StudySummary:
    """Run one study, or finish what an earlier try left.

    Args:
        config: what to study.
        command: the command line that runs it, for the message of a failed study.

    Raises:
        InputError, StoreError, ClusterError, ApiError: what the user gave or named is not usable; nothing was written.
        RunFailed: a stage failed; what was finished is kept.
    """
    study = study_of(config)
    storage.check_store(study.store)
    examined = _EXAMINED.set(decompose.examine(study))
    try:
        with embedded_api() as api, api.used(), failures.told(study.store, command, "the same study"):
            return completed(decompose_flow, config.model_dump(mode="json"))
    finally:
        _EXAMINED.reset(examined)


def study_of(config: StudyConfig) -> Study:
    """A configuration in the strings and numbers that tasks take."""
    from tda.methods.spectral import parse_bytes

    inverses = tuple((table.title, json.dumps(table.options(), sort_keys=True)) for table in config.inverses)
    evaluation = "" if config.evaluation is None else json.dumps(config.evaluation.model_dump(), sort_keys=True)
    return Study(
        config.problem, json.dumps(config.problem_options, sort_keys=True), json.dumps(config.sweep), tuple(config.progress), inverses,
        location.resolve(config.store), config.seed, tuple(config.modules), tuple(config.exclude), parse_bytes(config.memory_limit),
        config.batch_size, evaluation,
    )  # fmt: skip


@flow(name="decompose", validate_parameters=False)
@guarded
def decompose_flow(config: dict[str, Any]) -> StudySummary:
    """Train, decompose, measure, publish. config: a StudyConfig as JSON, so that a schedule can hold it."""
    from flows.study import StudyConfig

    started = time.perf_counter()
    parsed = StudyConfig.model_validate(config)
    study = study_of(parsed)
    points = _EXAMINED.get() or decompose.examine(study)
    refused = [f"{decompose.listed(p.named)} ({p.parameters:,} parameters): {p.refused}" for p in points if p.refused]
    progress = Progress()
    with progress.shown(), attribute.cluster_for(study, parsed.cluster.spec()) as client, stages.session(client, progress) as session:
        url, manifest = _claim(study, points, config)
        for line in refused:
            progress.say(f"left out: {line}")
        train(points)
        todo = [_todo(study, point) for point in points if not point.refused]
        reused = sum(each.done for each in todo)
        if reused:
            progress.say(f"reused: {reused} of {len(todo)} points")
        if parsed.keep_spectra:
            decompose_temporary.forget(url)
        _compute([each for each in todo if not each.done], parsed.cluster.workers, "" if parsed.keep_spectra else url, study.store)
        urls = iter([each.urls for each in todo])
        decompose_results.write_results(url, study, points, [() if point.refused else next(urls) for point in points])
        manifest["points"] = [decompose_results.described(point, trained=True) for point in points]
        manifest["timings"] = session.timed(started)
        decompose_page.write_page(url, manifest)
        decompose_results.complete(url, manifest)
    return StudySummary(url.rpartition("/")[2], url, location.join(url, "report.html"), study.store, len(todo), refused, reused)


@as_task
def train(points: Sequence[Point]) -> None:
    """Train every model that is measured and not there yet."""
    jobs = {point.training[2]: point.training for point in points if not point.refused}
    missing = [job for url, job in jobs.items() if not layout.is_complete(url)]
    if missing:
        stages.here().shards(training.train, missing, "train")


@dataclass(frozen=True)
class Todo:
    """What there is to do at a point."""

    job: PointJob
    lds: LdsJob | None

    @property
    def urls(self) -> tuple[str, ...]:
        """The artifacts that will hold its numbers."""
        return (self.job.url,) if self.lds is None else (self.job.url, self.lds.url)

    @property
    def done(self) -> bool:
        """Whether an earlier study did it."""
        return all(layout.is_complete(url) for url in self.urls)


def _todo(study: Study, point: Point) -> Todo:
    job = decompose.job_of(study, point)
    return Todo(job, decompose_lds.lds_job(study, point, job))


def _compute(waiting: Sequence[Todo], width: int, temporary: str, store: str) -> None:
    """Fit, measure and evaluate what is not done. temporary: URL of a study that keeps no spectra; "" where they are kept.

    As many points at a time as there are workers: of more, the matrices would fill the store before the first is measured.
    """
    for start in range(0, len(waiting), width):
        wave = waiting[start : start + width]
        if temporary:
            decompose_temporary.drop(temporary, store, {spectra.url for each in waiting[start:] for spectra in each.job.spectra})
            decompose_temporary.note(temporary, [spectra for each in wave for spectra in each.job.spectra])
        fit(wave)
        measure(wave)
        evaluate(wave)
    if temporary:
        decompose_temporary.drop(temporary, store)
        decompose_temporary.forget(temporary)


def fit(wave: Sequence[Todo]) -> None:
    """The spectra and factors of some points; points may share some."""
    jobs: dict[str, FactorJob | DenseJob] = {}
    for each in wave:
        jobs[each.job.factors.url] = each.job.factors
        jobs |= {spectra.url: spectra for spectra in each.job.spectra}
    for job in jobs.values():
        stages.fit(job)


@as_task
def measure(wave: Sequence[Todo]) -> None:
    """Errors, overlaps and scores of some points; different points may be the same checkpoint."""
    stages.here().shards(decompose_measure.measure, list({each.job.url: each.job for each in wave}.values()), "measure")


@as_task
def evaluate(wave: Sequence[Todo]) -> None:
    """Retrain on subsets where the study asks for it, and compare the scores of every rung with that."""
    jobs = list({each.lds.url: each.lds for each in wave if each.lds is not None}.values())
    for truth in {job.truth.url: job.truth for job in jobs}.values():
        if not layout.is_complete(truth.url):
            stages.retrain(truth, "retrain")
    if jobs:
        stages.here().shards(decompose_lds.evaluate, jobs, "LDS")


def _claim(study: Study, points: Sequence[Point], config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The unfinished study with this fingerprint, or a new one: (URL, manifest)."""
    folder = location.join(study.store, "studies")
    names = location.list_names(folder)
    mark = decompose.fingerprint_of(study, points)
    for name, found in zip(names, location.read_json_many([location.join(folder, n, "study.json") for n in names]), strict=True):
        if found and not found.get("complete") and found.get("fingerprints", {}).get("study") == mark:
            return decompose_results.study_url(study.store, name), decompose_results.manifest(study, points, name, found["created"], config)
    created = datetime.now(UTC)
    study_id = f"{created:%Y%m%d-%H%M%S}-{mark[:6]}"
    while True:
        url = decompose_results.study_url(study.store, study_id)
        manifest = decompose_results.manifest(study, points, study_id, created.isoformat(timespec="seconds"), config)
        if storage.create_once(location.join(url, "study.json"), json.dumps(manifest, indent=2, allow_nan=False).encode()):
            return url, manifest
        study_id = f"{created:%Y%m%d-%H%M%S}-{mark[:6]}-{secrets.token_hex(2)}"  # another start had it first
