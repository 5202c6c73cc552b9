"""The command `tda prune`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from flows.arguments import DEFAULT_STORE, Store

if TYPE_CHECKING:
    from tasks.prune import Doomed, Pruning

HOURS = {"h": 1, "d": 24, "w": 7 * 24}
SHOWN_ARTIFACTS = 20


def prune(
    store: Store = DEFAULT_STORE,
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Keep so many of the newest complete runs of each problem.")] = None,
    older_than: Annotated[str | None, typer.Option("--older-than", help="Drop only what is older: 12h, 90d or 8w.", metavar="AGE")] = None,
    grace: Annotated[str, typer.Option(help="What was written to within this time may be in use: never dropped.", metavar="AGE")] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
) -> None:
    """Drop old runs, then the artifacts that no run uses any more; an interrupted call is finished by the next."""
    from tda.errors import InputError
    from tda.location import resolve

    if keep is None and older_than is None:
        raise InputError("nothing says what to drop; give --keep 30, --older-than 90d or both: a run goes where neither protects it")
    ages = _age(older_than, "--older-than") if older_than is not None else None

    from tasks.prune import Rules, delete, plan

    found = plan(resolve(store), Rules(1 if keep is None else keep, ages, _age(grace, "--grace"), datetime.now(UTC)))
    if not found.all:
        typer.echo(f"nothing to drop in {found.store}: {_staying(found)}")
    else:
        _print(found.all)
    for note in found.notes:
        typer.echo(note)
    if not found.all:
        return
    if dry_run:
        typer.echo(f"would drop {_sum(found.all)}; {_staying(found)}; nothing was deleted (--dry-run)")
        return
    gone = list(delete(found))
    typer.echo(f"dropped {_sum(gone)}; {_staying(found)}")
    if len(gone) < len(found.all):
        typer.echo(f"left alone, since they came into use meanwhile: {_sum([each for each in found.all if each not in gone])}")


def _age(text: str, option: str) -> timedelta:
    from tda.errors import InputError

    match = re.fullmatch(r"(\d{1,5})([hdw])", text.strip())
    if match is None:
        raise InputError(f'{option} "{text}" is no age; write hours, days or weeks such as 12h, 90d or 8w')
    return timedelta(hours=int(match[1]) * HOURS[match[2]])


def _staying(found: Pruning) -> str:
    return f"{_counted(found.staying, 'complete run')} {'stays' if found.staying == 1 else 'stay'}"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _sum(some: tuple[Doomed, ...] | list[Doomed]) -> str:
    runs = sum("run" in each.kind.split() for each in some)
    return f"{_counted(runs, 'run')} and {_counted(len(some) - runs, 'artifact')}, {_size(sum(each.bytes for each in some))}"


def _print(doomed: tuple[Doomed, ...]) -> None:
    """Every run, and the largest artifacts."""
    from flows.tables import print_table

    runs = [each for each in doomed if "run" in each.kind.split()]
    rest = sorted((each for each in doomed if "run" not in each.kind.split()), key=lambda each: -each.bytes)
    rows = [[each.kind, each.name, f"{each.written:%Y-%m-%d}", _size(each.bytes), each.why] for each in [*runs, *rest[:SHOWN_ARTIFACTS]]]
    if len(rest) > SHOWN_ARTIFACTS:
        more = rest[SHOWN_ARTIFACTS:]
        rows.append(["artifacts", f"{len(more)} more", "", _size(sum(each.bytes for each in more)), more[0].why])
    print_table(["what", "name", "written", "bytes", "why"], rows)


def _size(count: int) -> str:
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"
