"""`tda sample`: the chains of a configuration alone, or the numbers that they would take."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.prefect_api import embedded_api
from infra.settings import quiet_prefect
from tasks import plan, sampling
from tda.errors import InputError
from tda.methods import parse
from tda.methods.sweep import expand

if TYPE_CHECKING:
    from flows.config import RunConfig
    from tasks.sampling import SampleJob
    from tda.methods import Method

quiet_prefect()
from prefect import flow  # noqa: E402  (its settings are read at import)

from flows import attribute, failures, stages  # noqa: E402
from flows.guarded import completed, guarded  # noqa: E402
from flows.progress import Progress  # noqa: E402


@dataclass(frozen=True)
class Sampled:
    """The chains of one method of one model.

    title: the method's. options: its own, as they were asked for. seed: of the model, where there are several. settled: its numbers and
    where they come from; diagnostics: {} where nothing was sampled.
    """

    title: str
    options: dict[str, Any]
    seed: int | None
    url: str
    settled: dict[str, Any]
    diagnostics: dict[str, Any]
    reused: bool


def sample_run(config: RunConfig, command: str = "", *, tune: bool = False) -> list[Sampled]:
    """Sample the chains of every method that samples; with `tune`, only choose their numbers.

    Args:
        config: what to run; methods that do not sample play no part.
        command: the command line that runs it, for the message of a failed run.
        tune: choose step size, localization, n_beta, burn-in and draws, and sample nothing.

    Raises:
        InputError, StoreError, ClusterError, ApiError: what the user gave or named is not usable, or every chain was lost.
        RunFailed: a stage failed; what was finished is kept.
    """
    started = time.perf_counter()
    config = _chains_alone(config)
    request = attribute.request_of(config)
    with embedded_api() as api:
        inputs = attribute.examine(request)
        with (
            attribute.cluster_for(request.subject, config.cluster.spec(), request.subject.device) as client,
            api.used(),
            attribute.given(attribute.Prepared(started, inputs, client)),
            failures.told(request.store, command, "the same command"),
        ):
            return completed(sample, config.model_dump(mode="json"), tune=tune)


def _chains_alone(config: RunConfig) -> RunConfig:
    """The configuration with the methods that sample, and those that say where training starts."""
    tables = [each.table for each in expand(config.methods)]
    chosen = [table for table in tables if any(fit.kind == "chains" for fit in parse(table).fits)]
    if not chosen:
        names = ", ".join(str(table.get("name")) for table in config.methods)
        raise InputError(f'no method of the configuration samples (it has {names}); add a [[methods]] table with name = "bif"')
    starts = [table for table in config.methods if table.get("name") == "multistage"]
    return config.model_copy(update={"methods": [*starts, *chosen]})


@flow(name="sample", validate_parameters=False)
@guarded
def sample(config: dict[str, Any], *, tune: bool = False) -> list[Sampled]:
    """Train where needed, then the chains of every member and method. config: a RunConfig as JSON."""
    from flows.config import RunConfig

    parsed = RunConfig.model_validate(config)
    request = attribute.request_of(parsed)
    progress = Progress()
    with progress.shown(), attribute.prepared(request, parsed.cluster.spec()) as ready, stages.session(ready.client, progress):
        attribute.train(request, ready.inputs)
        decided = plan.plan(request, ready.inputs)
        found = []
        for member in decided.members:
            seed = member.seed if len(decided.members) > 1 else None
            for scored in member.scores.methods:
                jobs = [job for job in member.fits.values() if job.url in scored.directions.fits]
                found += [_sampled(scored.directions.parsed(), seed, job, tune=tune) for job in jobs if isinstance(job, sampling.SampleJob)]
    return found


def _sampled(method: Method, seed: int | None, job: SampleJob, *, tune: bool) -> Sampled:
    title, options = method.title, json.loads(method.model_dump_json())
    if tune:
        (settled,) = stages.here().shards(sampling.tuned, [job], f"tune ({title})")
        return Sampled(title, options, seed, job.url, settled, {}, reused=False)
    reused = stages.fit(job)
    return Sampled(title, options, seed, job.url, sampling.settled_of(job), sampling.diagnostics_of(job), reused)
