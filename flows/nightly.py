"""What fires every night: attribute the newest checkpoint, or say that nothing changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from flows.newest import is_floating, pinned
from infra.masking import mask_logs
from infra.prefect_events import use_patient_events
from infra.settings import quiet_prefect
from tasks import chain, layout, plan, prepare
from tda import location
from tda.errors import InputError

if TYPE_CHECKING:
    from flows.config import RunConfig

quiet_prefect()
from prefect import State, flow, get_run_logger  # noqa: E402  (its settings are read at import)
from prefect.states import Completed  # noqa: E402

from flows import attribute, failures, nightly_told  # noqa: E402
from flows.attribute import RunSummary  # noqa: E402
from flows.guarded import completed, guarded  # noqa: E402
from flows.progress import FOLLOWER  # noqa: E402

#: The name of the state of a run that found nothing to do.
UNCHANGED = "Unchanged"


@flow(name="nightly", validate_parameters=False)
@guarded
def nightly(config: dict[str, Any] | str, folder: str = "") -> State[Any]:
    """Attribute as a configuration says, unless a finished run of the same inputs is there.

    Args:
        config: a RunConfig as JSON, or the path of a TOML file that the worker can read.
        folder: where the problem's module is looked for, beside the installed ones.

    Returns:
        Completed, named "Unchanged" where there was nothing to do; the message says which run holds the results.

    Raises:
        InputError, StoreError, ClusterError: the input is not usable; nothing was computed.
        RunFailed: a stage failed; the next firing resumes it.
    """
    mask_logs()
    use_patient_events()
    started, log = time.perf_counter(), get_run_logger()
    if folder and folder not in sys.path:
        sys.path.append(folder)  # the workers of a local cluster inherit it
    parsed = _parsed(config)
    if is_floating(parsed.checkpoint):
        parsed, pattern = pinned(parsed), parsed.checkpoint
        log.info("checkpoint: %s (the newest of %s)", parsed.checkpoint, pattern)
    request = attribute.request_of(parsed)
    inputs = attribute.examine(request)
    same = already_done(request, inputs)
    if same:
        said = f"nothing to do: no input changed since run {same}, which is complete in {request.store}"
        log.info("%s (%.1f s)", said, time.perf_counter() - started)
        return Completed(name=UNCHANGED, message=said)
    done = _attributed(parsed, request, inputs, started)
    try:
        nightly_told.tell(done)
    except Exception as error:  # noqa: BLE001  (whatever it is, the run is complete)
        log.warning("run %s is complete; its table and links are not shown, since Prefect's server refused them: %s", done.run_id, error)
    said = f"run {done.run_id} is complete; reused: {', '.join(done.reused) or 'nothing'}"
    log.info("%s; report: %s (%.1f s)", said, done.report_url, time.perf_counter() - started)
    return Completed(message=said)


def already_done(request: prepare.Request, inputs: prepare.Inputs) -> str:
    """The finished run of the same inputs, looked for without a cluster; empty where there is none, or a model is still to be trained."""
    return attribute.finished_run(plan.plan(request, inputs)) if _is_trained(request, inputs) else ""


def _is_trained(request: prepare.Request, inputs: prepare.Inputs) -> bool:
    for name in reversed(list(inputs.stages)):  # where one starts depends on where the one before it ended
        job = chain.training(request, inputs, name)
        if job is not None and not layout.is_complete(job[2]):
            return False
    if request.subject.checkpoint:
        return True
    start = chain.start(request, inputs)
    return all(layout.is_complete(plan.training_artifact(request, inputs, seed, start)) for seed in plan.seeds(request))


def _attributed(config: RunConfig, request: prepare.Request, inputs: prepare.Inputs, started: float) -> RunSummary:
    """The run itself, as a flow below this one."""
    with (
        failures.told(request.store, again="the next firing"),
        _followed() as follower,
        attribute.cluster_for(request.subject, config.cluster.spec(), request.subject.device) as client,
    ):
        with attribute.given(attribute.Prepared(started, inputs, client)):
            done = completed(attribute.attribute, config.model_dump(mode="json"))
        follower.finish(done.run_id)
        return done


@contextmanager
def _followed() -> Iterator[nightly_told.Follower]:
    """Tell Prefect's progress artifact of every shard."""
    follower = nightly_told.Follower()
    token = FOLLOWER.set(follower)
    try:
        yield follower
    finally:
        FOLLOWER.reset(token)


def _parsed(config: dict[str, Any] | str) -> RunConfig:
    from flows.config import RunConfig, load_config

    if isinstance(config, str):
        return load_config(config, pin=False)
    try:
        parsed = RunConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"the deployment's parameter config: {where}: {first['msg']}; correct it, or make it by `tda nightly`") from error
    return parsed if parsed.checkpoint is None else parsed.model_copy(update={"checkpoint": location.resolve(parsed.checkpoint)})
