"""Repairing a run: what is damaged or lost is computed again by the run's own configuration, and compared with what it was.

Of an artifact that is made again nothing is deleted before that: see tasks.aside.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from infra import storage
from infra.cluster import ShardFailed
from infra.prefect_api import embedded_api
from infra.settings import quiet_prefect
from tasks import aside, plan, prepare, publish, solves, verify
from tasks.subject import read_checkpoint
from tasks.verify import Checked
from tda import checkpoint, checksums, location
from tda.errors import InputError, StoreUnreachable
from tda.results import Run

quiet_prefect()
from prefect import flow  # noqa: E402  (its settings are read at import)

from flows import attribute, failures, stages  # noqa: E402
from flows.config import RunConfig  # noqa: E402
from flows.guarded import completed, guarded  # noqa: E402
from flows.progress import Progress  # noqa: E402


def repair(run: Run, found: Sequence[Checked], command: str, workers: int | None = None) -> list[str]:
    """Compute again what `tasks.verify.check` found to be damaged in a run.

    Args:
        run: the run.
        found: what is wrong with it.
        command: the command line that does the same, for the message of a repair that fails.
        workers: processes on this machine that compute it; the run's own cluster when absent.

    Returns:
        The artifacts that were made again and are not what they were: on another machine, or by other libraries.

    Raises:
        InputError: the run cannot be computed again: its manifest is damaged, the problem, the data or the checkpoint have changed, or its
            training does not give the same weights again. All is as it was then.
        RunFailed: a stage failed; `command` goes on.
    """
    broken = [each for each in found if each.faults]
    if any(fault.name == "run.json" for each in broken for fault in each.faults):
        raise InputError(f"{run.url}/run.json is damaged, and with it the configuration: run the configuration again, and delete this run")
    started = time.perf_counter()
    other = {} if workers is None else {"cluster": {"workers": workers}}
    config = RunConfig.model_validate({**run.manifest["config"], "store": run.store, **other})
    request = attribute.request_of(config)
    lost = [fault.name for fault in found[0].faults]
    earlier = run.manifest.get("repairing")
    before = verify.digests(run.store, broken) | (earlier if isinstance(earlier, dict) else {})
    with embedded_api() as api:
        inputs = attribute.examine(request)
        _check_same(run, request, inputs)
        with (
            attribute.cluster_for(request.subject, config.cluster.spec(), request.subject.device) as client,
            api.used(),
            attribute.given(attribute.Prepared(started, inputs, client)),
            failures.told(request.store, command),
        ):
            # What the manifest says of the run stays as it is; only that the run is complete is taken back until it is true again.
            storage.write_json(f"{run.url}/run.json", {**run.manifest, "complete": False, "repairing": before})
            again = _taken_away(run, broken)
            try:
                completed(mend, config.model_dump(mode="json"), run.url, lost, again)
            except (InputError, ShardFailed) as error:
                if not _is_final(error):
                    raise
                for folder in again:
                    aside.put_back(run.store, folder)
                _finish(run)
                raise
            others = _settled(run.store, before, again)
            _finish(run)  # last: who is killed before it is told the same again
    return others


def _settled(store: str, before: dict[str, str], again: dict[str, list[str]]) -> list[str]:
    """Delete what was set aside and is as it was again; the artifacts that are not."""
    now = verify.digests(store, [Checked(folder, 0, 0) for folder in before])
    others = [folder for folder, digest in before.items() if now.get(folder) != digest]
    for folder, damaged in again.items():
        if aside.is_same(store, folder, damaged):
            aside.drop(store, folder)
            continue
        aside.keep(store, folder)
        if folder not in others:
            others.append(folder)
    return others


def _finish(run: Run) -> None:
    """Turn a run complete as it was."""
    publish.complete(run.url, {key: value for key, value in run.manifest.items() if key != "repairing"})


def _is_final(error: Exception) -> bool:
    """Whether another try of a repair would end the same."""
    reason = error.cause if isinstance(error, ShardFailed) else error
    return isinstance(reason, InputError) and not isinstance(reason, StoreUnreachable)


def _taken_away(run: Run, broken: Sequence[Checked]) -> dict[str, list[str]]:
    """Take away what is damaged: single objects where those can be made again, else the artifact, which is set aside as a whole.

    The artifacts that were set aside, now or by an earlier try, with the names of what is damaged of each.
    """
    artifacts = [f"artifacts/{name}" for name in run.manifest.get("artifacts", [])]
    again = aside.pending(run.store, artifacts)
    for each in broken:
        if verify.by_object(each.folder):
            verify.take_away(run.store, each)
        else:
            again[each.folder] = aside.set_aside(run.store, each.folder, [fault.name for fault in each.faults])
    return again


@flow(name="repair", validate_parameters=False)
@guarded
def mend(config: dict[str, Any], run_url: str, lost: list[str], again: dict[str, list[str]]) -> None:
    """Compute what of a run is not there.

    lost: the names of the run's objects that were taken away; again: the artifacts that were set aside, with what is damaged of them.
    """
    parsed = RunConfig.model_validate(config)
    request, progress = attribute.request_of(parsed), Progress()
    manifest = location.read_json(f"{run_url}/run.json")
    with progress.shown(), attribute.prepared(request, parsed.cluster.spec()) as ready, stages.session(ready.client, progress) as session:
        attribute.train(request, ready.inputs)
        for folder, damaged in again.items():
            if folder.startswith("artifacts/checkpoint/") and not aside.is_same(request.store, folder, damaged):
                raise InputError(_other_weights(run_url, request.store, folder, damaged))
        decided = plan.plan(request, ready.inputs)
        if decided.fingerprint != manifest["fingerprints"]["run"]:
            raise InputError(f"what {run_url} was computed from is no longer the same: run its configuration again, and delete this run")
        decided = decided.placed(run_url)
        attribute.compute(decided, ready.inputs, run_url)
        solves.write_solves(decided)
        storage.sweep(run_url)
        if "report.html" in lost:
            added = ("repairing", "checksums", "artifacts", "sha256")  # not there yet when the page was written first
            publish.write_page(decided, run_url, {key: value for key, value in manifest.items() if key not in added})
        if checksums.NAME in lost:
            _restore_sums(decided, run_url, session, manifest)


def _other_weights(run_url: str, store: str, folder: str, damaged: Sequence[str]) -> str:
    said = (
        f"run {run_url.rpartition('/')[2]} cannot be repaired: {folder} was trained again, and is not what it was (is `fit` seeded, and "
        "the machine the same?); all was put back as it was"
    )
    weights = location.join(store, folder, "weights.safetensors")
    if "weights.safetensors" in damaged:
        return f"{said}; delete that folder, and run the configuration anew"
    return f'{said}; its weights are intact: a configuration with checkpoint = "{weights}" goes on with them'


def _restore_sums(decided: plan.Plan, run_url: str, session: stages.Session, manifest: dict[str, Any]) -> None:
    """Write checksums.json anew; InputError where it is not what the manifest says: then something else has changed, too."""
    from tasks.checksums import used, write_run

    told = write_run(run_url, session.sums_below(run_url), used(decided))
    if told["checksums"] != manifest["checksums"]:
        raise InputError(f"{run_url}: checksums.json was lost, and other objects are not what they were: run the configuration again")


def _check_same(run: Run, request: prepare.Request, inputs: prepare.Inputs) -> None:
    """InputError where what the run was computed from has changed since; before anything is deleted."""
    prints = run.manifest["fingerprints"]
    now = {"problem": inputs.problem, "train_data": inputs.train, "query_data": inputs.query}
    if request.subject.checkpoint:
        now["checkpoint"] = checkpoint.digest(read_checkpoint(request.subject.checkpoint))
    if changed := [name for name, digest in now.items() if prints.get(name) != digest]:
        said = " and ".join(name.replace("_", " ") for name in changed)
        raise InputError(f"run {run.id} cannot be repaired: its {said} changed since it was computed; run its configuration again instead")
