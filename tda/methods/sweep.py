"""Damping sweeps: a `[[methods]]` table with a list of dampings, its own or its pre-training's, stands for one method per value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tda.errors import InputError


@dataclass(frozen=True)
class Swept:
    """One method of a run: its table, and the label that it shares with the other dampings of its sweep (its own where it is alone)."""

    table: dict[str, Any]
    family: str


def expand(tables: Sequence[dict[str, Any]]) -> list[Swept]:
    """Every table with damping = [a, b] as two, labelled "<label>-<a>" and "<label>-<b>"; the others as they are.

    Raises:
        InputError: a list of dampings is empty, or names one twice; a sweep has the label of another table.
    """
    found, titles = [], [str(table.get("label") or table.get("name")) for table in tables]
    for title, table in zip(titles, tables, strict=True):
        stage = _swept_stage(table)
        values = table.get("damping") if stage is None else stage["damping"]
        if not isinstance(values, list):
            found.append(Swept(table, title))
            continue
        if not values or len({_named(value) for value in values}) < len(values):
            what = "names none" if not values else "names a value twice"
            raise InputError(f"damping = {values} {what}; list different numbers, or give one number (method {table.get('name')!r})")
        if titles.count(title) > 1:
            raise InputError(f'damping = {values}: another method is labelled {title!r}, too; give one of them its own label = "..."')
        for value in values:
            change = {"damping": value} if stage is None else {"pretraining": {**stage, "damping": value}}
            found.append(Swept({**table, "label": f"{title}-{_named(value)}", **change}, title))
    return found


def ranked(tables: Sequence[dict[str, Any]], rank: int | None) -> list[dict[str, Any]]:
    """Tables with a run's query_rank where their own say nothing.

    Raises:
        InputError: one is of a method that has no directions to shorten.
    """
    from tda.methods import METHODS

    if rank is None:
        return list(tables)
    for table in tables:
        kind = METHODS.get(str(table.get("name")))
        if kind is not None and "query_rank" not in kind.model_fields:
            raise InputError(
                f"query_rank = {rank} is not for method {table['name']!r}, whose scores are no products with directions, or whose "
                "directions are multiplied on; give it in the [[methods]] tables of the others"
            )
    return [{"query_rank": rank, **table} for table in tables]


def _swept_stage(table: dict[str, Any]) -> dict[str, Any] | None:
    """The stage before the fine-tuning, where its dampings are a list."""
    stage = table.get("pretraining")
    if not isinstance(stage, dict) or not isinstance(stage.get("damping"), list):
        return None
    if isinstance(table.get("damping"), list):
        raise InputError(f"method {table.get('name')!r} has lists of dampings for itself and for its pretraining; sweep one of them")
    return stage


def _named(damping: Any) -> str:
    """A damping as part of a label."""
    number = isinstance(damping, int | float) and not isinstance(damping, bool)
    return f"{damping:g}" if number else str(damping)
