"""A Prefect deployment of the flow `nightly`: when it fires, on which work pool, whom it tells of failures, which event starts it.

Everything is declared anew each time: what an earlier call made under the same name and this one does not ask for is gone afterwards.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID
from zoneinfo import ZoneInfo

from infra.masking import learn
from infra.prefect_api import ApiError
from infra.settings import quiet_prefect
from tda.errors import InputError, cause

if TYPE_CHECKING:
    from httpx import Response
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool
    from prefect.events.schemas.automations import AutomationCore

FLOW = "nightly"
ENTRYPOINT = "flows.nightly.nightly"
TAG = "tda"
#: What a run can be started with instead of what is deployed.
PARAMETERS = {
    "title": "Parameters",
    "type": "object",
    "properties": {
        "config": {"title": "config", "position": 0, "description": "a run's configuration, or the path of its TOML file"},
        "folder": {"title": "folder", "position": 1, "type": "string", "description": "where the problem's module is looked for"},
    },
    "required": ["config"],
}
#: States, by name, of which --notify tells: also the run that never began (no worker), and the one that an unfinished one kept out.
TOLD = ("Failed", "Crashed", "TimedOut", "Late", "Cancelled")
#: Seconds that a worker may take to start a run before its place is given to another.
START_SECONDS = 600
SUBJECT = "tda: {{ deployment.name }} is {{ flow_run.state.name }}"
BODY = (
    "Flow run {{ flow_run.name }} of {{ flow.name }}/{{ deployment.name }}: {{ flow_run.state.message }}"
    "{% if flow_run|ui_url %}\n{{ flow_run|ui_url }}{% endif %}"
)


@dataclass(frozen=True)
class Nightly:
    """What is deployed. config: a RunConfig as JSON; source: the file that it came from; folder: where problem modules are looked for.

    overlap: what becomes of a run that begins while another is unfinished. notify: a notification block, "type/name", or a webhook's URL.
    event: the name of an event that starts a run too.
    """

    name: str
    config: dict[str, Any]
    source: str
    folder: str
    cron: str
    timezone: str
    pool: str
    overlap: Literal["cancel", "wait"] = "cancel"
    notify: str | None = None
    event: str | None = None


@dataclass(frozen=True)
class Deployed:
    """What was made, or was there. replaced: the file that the deployment of this name was made from before, where that was another."""

    id: UUID
    pool: str
    pool_type: str
    pool_was_there: bool
    next: datetime
    replaced: str


def next_firing(cron: str, timezone: str, after: datetime | None = None) -> datetime:
    """When a schedule fires next, with its time zone.

    Raises:
        InputError: cron or time zone is not valid.
    """
    quiet_prefect()
    from prefect.server.schemas.schedules import CronSchedule

    try:
        ZoneInfo(timezone)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f'--timezone "{timezone}" is not known; give a name such as UTC or Europe/Berlin') from error
    try:
        schedule = CronSchedule(cron=cron, timezone=timezone)
        dates = asyncio.run(schedule.get_dates(n=1, start=after or datetime.now(UTC)))
    except (ValueError, KeyError) as error:  # pydantic's own is a ValueError
        raise _wrong_cron(cron) from error
    if not dates:
        raise _wrong_cron(cron)
    return dates[0]


def _wrong_cron(cron: str) -> InputError:
    return InputError(f'--cron "{cron}" is no cron expression that ever fires; minute hour day month weekday, such as "0 2 * * *"')


def deploy(wanted: Nightly) -> Deployed:
    """Make the deployment, or bring the one of this name up to date.

    Raises:
        InputError: cron, time zone or block is not valid.
        ApiError: the server refuses.
    """
    due = next_firing(wanted.cron, wanted.timezone)
    from httpx import TransportError
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    with get_client(sync_client=True) as client:
        try:
            block = None if wanted.notify is None else _block(client, wanted)
            pool, was_there = _pool(client, wanted.pool)
            replaced = _replaced(client, wanted)
            made = _deployment(client, wanted, pool)
            _automate(client, made, wanted, block)
        except PrefectHTTPStatusError as error:
            raise ApiError(_refusal(error.response)) from error
        except TransportError as error:
            raise ApiError(f"the Prefect server stopped answering ({cause(error)}); start it and call this again") from error
    return Deployed(made, pool.name, pool.type, was_there, due, replaced)


def _refusal(response: Response) -> str:
    if response.status_code in (401, 403):
        return f"the Prefect server refuses ({response.status_code}): set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY, to what it expects"
    said = " ".join(response.text.split())[:200]
    return f"the Prefect server refuses ({response.status_code}, {said}); is it of the version that `tda doctor` names?"


def _pool(client: SyncPrefectClient, name: str) -> tuple[WorkPool, bool]:
    """The work pool, made for processes where there is none; whether it was there."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_work_pool(name), True
    except ObjectNotFound:
        from prefect.workers.process import ProcessWorker

        template = ProcessWorker.get_default_base_job_template()
        return client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template)), False


def _replaced(client: SyncPrefectClient, wanted: Nightly) -> str:
    from prefect.exceptions import ObjectNotFound

    try:
        before = str(client.read_deployment_by_name(f"{FLOW}/{wanted.name}").description or "")
    except ObjectNotFound:
        return ""
    return "" if before == _description(wanted) else before.removeprefix("tda nightly ")


def _description(wanted: Nightly) -> str:
    return f"tda nightly {wanted.source}"


def _deployment(client: SyncPrefectClient, wanted: Nightly, pool: WorkPool) -> UUID:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
    from prefect.client.schemas.schedules import CronSchedule

    strategy = ConcurrencyLimitStrategy.CANCEL_NEW if wanted.overlap == "cancel" else ConcurrencyLimitStrategy.ENQUEUE
    return client.create_deployment(
        flow_id=client.create_flow_from_name(FLOW),
        name=wanted.name,
        description=_description(wanted),
        entrypoint=ENTRYPOINT,
        path=None,
        pull_steps=[],
        work_pool_name=pool.name,
        schedules=[DeploymentScheduleCreate(schedule=CronSchedule(cron=wanted.cron, timezone=wanted.timezone), active=True)],
        parameters={"config": wanted.config, "folder": wanted.folder},
        parameter_openapi_schema=PARAMETERS,
        enforce_parameter_schema=False,  # the flow says more clearly what is wrong
        tags=[TAG, wanted.config["problem"].rpartition(":")[2]],
        concurrency_limit=1,
        concurrency_options=ConcurrencyOptions(collision_strategy=strategy, grace_period_seconds=START_SECONDS),
        paused=False,
    )


def _automate(client: SyncPrefectClient, deployment: UUID, wanted: Nightly, block: UUID | None) -> None:
    """The automations of a deployment, in place of those that it had."""
    client.delete_resource_owned_automations(f"prefect.deployment.{deployment}")
    if wanted.event is not None:
        client.create_automation(_on_event(deployment, wanted, wanted.event))
    name = f"{FLOW}/{wanted.name} tells of failures"
    for old in client.read_automations_by_name(name):
        client.delete_automation(old.id)
    if block is not None:
        client.create_automation(_on_failure(deployment, name, block))


def _on_event(deployment: UUID, wanted: Nightly, event: str) -> AutomationCore:
    from prefect.events import DeploymentEventTrigger

    trigger = DeploymentEventTrigger(name=f"{FLOW}/{wanted.name} on {event}", expect={event})
    trigger.set_deployment_id(deployment)
    return trigger.as_automation()


def _on_failure(deployment: UUID, name: str, block: UUID) -> AutomationCore:
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    trigger = EventTrigger(
        expect={f"prefect.flow-run.{state}" for state in TOLD},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "deployment", "prefect.resource.id": f"prefect.deployment.{deployment}"},
        posture=Posture.Reactive,
        threshold=1,
    )
    return AutomationCore(
        name=name,
        description="made by `tda nightly --notify`",
        trigger=trigger,
        actions=[SendNotification(block_document_id=block, subject=SUBJECT, body=BODY)],
    )


def _block(client: SyncPrefectClient, wanted: Nightly) -> UUID:
    """The id of the notification block; one is made for a webhook's URL, which is kept as a secret."""
    told = str(wanted.notify)
    if told.startswith(("http://", "https://")):
        return _webhook(f"tda-{FLOW}-{wanted.name}", told)
    kind, slash, name = told.partition("/")
    if not (slash and kind and name):
        raise InputError(f'--notify "{told}" is neither a block, TYPE/NAME such as slack-webhook/team, nor a URL that begins with http')
    from prefect.exceptions import ObjectNotFound

    try:
        found = client.read_block_document_by_name(name, kind)
    except ObjectNotFound as error:
        raise InputError(f'--notify "{told}": there is no such block; `prefect block ls` lists what there is') from error
    if "notify" not in (found.block_schema.capabilities if found.block_schema is not None else []):
        raise InputError(f'--notify "{told}" is no block that notifies; such are slack-webhook, email-server, custom-webhook and others')
    return found.id


def _webhook(name: str, url: str) -> UUID:
    import re

    from prefect.blocks.fields import SecretDict
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    learn(url)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    block = CustomWebhookNotificationBlock(
        name=slug,
        url="{{url}}",
        json_data={"subject": "{{subject}}", "text": "{{subject}}\n{{body}}"},
        secrets=SecretDict({"url": url}),
    )
    made: Any = block.save(slug, overwrite=True)
    return UUID(str(made))
