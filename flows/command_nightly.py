"""The command `tda nightly`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.arguments import Config, OtherStore, Overrides
from infra.masking import masked

if TYPE_CHECKING:
    from flows.config import RunConfig
    from flows.deployment import Deployed, Nightly

Cron = Annotated[str, typer.Option("--cron", help="When it fires: minute hour day month weekday.")]
Timezone = Annotated[str, typer.Option("--timezone", help="What the cron expression's hours are of.")]
Pool = Annotated[str, typer.Option("--pool", help="The work pool; made for processes where there is none.")]
Name = Annotated[str | None, typer.Option("--name", help="The deployment's name; that of the file when absent.")]
Overlap = Annotated[
    Literal["cancel", "wait"], typer.Option("--overlap", help="What a run does that begins while the one before it is unfinished.")
]
Notify = Annotated[
    str | None, typer.Option("--notify", help="Who is told of failures: a notification block, TYPE/NAME, or a webhook's URL.")
]
Event = Annotated[str | None, typer.Option("--event", help="An event that starts a run too, such as tda.checkpoint.published.")]


def nightly(  # noqa: PLR0913, PLR0917  (options of a command)
    config: Config,
    cron: Cron = "0 2 * * *",
    timezone: Timezone = "UTC",
    pool: Pool = "tda",
    name: Name = None,
    overlap: Overlap = "cancel",
    notify: Notify = None,
    event: Event = None,
    store: OtherStore = None,
    overrides: Overrides = None,
) -> None:
    """Make, or update, a Prefect deployment that runs a configuration every night on the newest checkpoint."""
    from flows.config import load_config

    parsed = load_config(config, overrides or [], store, pin=False)
    note = _check(parsed)

    from infra.prefect_api import lasting_server

    server = lasting_server("tda nightly")

    from flows.deployment import Nightly, deploy

    wanted = Nightly(
        name=_name(name, config),
        config=parsed.model_dump(mode="json"),
        source=str(Path(config).absolute()),
        folder=os.getcwd(),  # noqa: PTH109
        cron=cron,
        timezone=timezone,
        pool=pool,
        overlap=overlap,
        notify=notify,
        event=event,
    )
    _tell(wanted, deploy(wanted), server, note)


def _name(name: str | None, config: str) -> str:
    from tda.errors import InputError

    chosen = Path(config).stem if name is None else name
    if not re.fullmatch(r"[^/%&<>\s]+", chosen):
        raise InputError(f'the deployment\'s name "{chosen}" may not be empty nor hold spaces, /, %, &, < or >; give another by --name')
    return chosen


def _check(config: RunConfig) -> str:
    """Look at what can be looked at before the first night; a note where the checkpoint is not there yet."""
    from flows.newest import is_floating, newest
    from infra.storage import check_store
    from tda.errors import InputError
    from tda.problem import import_problem

    check_store(config.store)
    import_problem(config.problem)
    if not is_floating(config.checkpoint):
        return ""
    try:
        return f"now {newest(str(config.checkpoint))}"
    except InputError as error:
        return f"not there yet: {error}"


def _tell(wanted: Nightly, made: Deployed, server: str, note: str) -> None:
    full, server = f"nightly/{wanted.name}", masked(server)
    state = "kept as it is" if made.pool_was_there else "made"
    rows = [
        ("deployment", full + (f" (before: of {made.replaced})" if made.replaced else "")),
        ("fires", f'"{wanted.cron}", {wanted.timezone}; next {made.next:%Y-%m-%d %H:%M %Z}'),
        ("overlap", "a run that begins while another is unfinished " + ("is cancelled" if wanted.overlap == "cancel" else "waits for it")),
        ("store", wanted.config["store"]),
        ("checkpoint", f"{wanted.config['checkpoint'] or 'trained by the run'}{f' ({note})' if note else ''}"),
        ("failures", _told(wanted.notify)),
        ("pool", f"{made.pool} ({made.pool_type}, {state})"),
        ("worker", f"prefect worker start --pool {made.pool}     one has to run, with PREFECT_API_URL={server}"),
        ("by hand", f"prefect deployment run {full}"),
        ("over HTTP", f"curl -X POST {server}/deployments/{made.id}/create_flow_run -H 'Content-Type: application/json' -d '{{}}'"),
    ]
    if wanted.event is not None:
        rows.append(("on event", f"prefect event emit {wanted.event} --resource-id tda.{wanted.name}"))
    for title, text in rows:
        typer.echo(f"{title:<12}{text}")


def _told(notify: str | None) -> str:
    if notify is None:
        return "told to nobody; --notify TYPE/NAME or a webhook's URL"
    return "told to a webhook" if notify.startswith("http") else f"told to {notify}"
