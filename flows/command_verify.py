"""The command `tda verify`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from flows.arguments import DEFAULT_STORE, RunId, Store, readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tasks.verify import Checked

WRONG = 1
#: Objects that belong to nothing and are told by name, at most.
NAMED = 3


def verify(
    run: RunId = "latest",
    repair: Annotated[bool, typer.Option("--repair", help="Compute what is damaged again by the run's configuration.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Repair with processes on this machine, not on the run's cluster.")] = None,
    store: Store = DEFAULT_STORE,
) -> int:
    """Read all that a run consists of, and say what is damaged or missing; exit status 1 where anything is."""
    from tasks.verify import check
    from tda.results import open_run

    opened = open_run(store, run, incomplete=run != "latest")
    if not opened.manifest.get("complete") and "repairing" not in opened.manifest:
        from tda.errors import InputError

        raise InputError(f"run {opened.id} is incomplete; run its configuration again to finish it, which checks what it finds")
    found = check(opened)
    wrong = _tell(found)
    unfinished = "repairing" in opened.manifest
    more = [] if workers is None else ["--workers", str(workers)]
    command = shlex.join(["tda", "verify", opened.id, "--repair", *more, "--store", store])
    if repair and (wrong or unfinished):
        from flows.repair import repair as mend
        from tda import location

        others = mend(opened, found, command, workers)
        typer.echo("repaired; checking again")
        wrong = _tell(check(open_run(store, opened.id))) + len(others)
        for folder in others:
            aside = f"{opened.store}/aside/{folder}"
            kept = f"; what it was is kept in {readable(aside)}" if location.exists(f"{aside}/aside.json") else ""
            said = "made again, and its bytes are others: machine or libraries are not those that the run was computed with"
            typer.echo(f"{folder}: {said}{kept}")
    elif wrong or unfinished:
        typer.echo(f"mend     {command}")
    return WRONG if wrong or (unfinished and not repair) else 0


def _tell(found: Sequence[Checked]) -> int:
    """Print what was found; the number of faults."""
    wrong = 0
    for each in found:
        said = "; ".join(filter(None, [f"{each.objects} objects, {each.bytes:,} bytes" if each.objects else "", each.note]))
        typer.echo(f"{each.folder}: {said or 'cannot be compared'}")
        for fault in each.faults:
            typer.echo(f"  {fault.name}: {fault.what}")
        if each.strangers:
            more = f", and {len(each.strangers) - NAMED} more" if len(each.strangers) > NAMED else ""
            names = ", ".join(each.strangers[:NAMED])
            typer.echo(f"  {len(each.strangers)} that belong to nothing, and are left alone: {names}{more}")
        wrong += len(each.faults)
    objects, size = sum(each.objects for each in found), sum(each.bytes for each in found)
    typer.echo(f"{wrong} of {objects} objects are wrong" if wrong else f"nothing is wrong: {objects} objects, {size:,} bytes read")
    return wrong
