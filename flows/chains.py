"""Chains as the terminal shows them: what came of them, or the numbers to give them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from flows.tables import cell, print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flows.sample import Sampled

HEAD = ["method", "chains", "R-hat, largest", "effective draws, least", "learning coefficient", "distance", "uncertain signs", "verdict"]
#: Options that `tda sample --tune` chooses, in the order in which it prints them.
CHOSEN = ("sampler", "step_size", "localization", "n_beta", "burn_in", "draws", "thinning", "chains", "batch_size")
#: Those that it leaves as they were asked for.
OTHERS = ("normalized", "tokens", "together", "segment", "compiled")


def print_sampled(found: Sequence[Sampled]) -> None:
    """A row per method, the sentences of each verdict, and where the chains are."""
    print_table(HEAD, [_row(each) for each in found])
    for each in found:
        for sentence in each.diagnostics["verdict"]:
            typer.echo(f"{_titled(each)}: {sentence}")
        typer.echo(f"{_titled(each)}: {'reused from' if each.reused else 'stored in'} {each.url.removeprefix('file://')}")


def _titled(each: Sampled) -> str:
    return each.title if each.seed is None else f"{each.title}, seed {each.seed}"


def verdict(told: Mapping[str, Any]) -> str:
    """A verdict in a word or two, of diagnostics.json."""
    return "to be read with care" if told["verdict"] else "nothing found against them"


def uncertain(told: Mapping[str, Any]) -> str:
    """What matters for the scores: the share of them whose sign is not known."""
    return "unknown" if told["uncertain"] is None else f"{told['uncertain']:.0%}"


def _row(each: Sampled) -> list[str]:
    told = each.diagnostics
    lost = f" ({len(told['lost'])} lost)" if told["lost"] else ""
    coefficient = f"{cell(told['llc'])} ± {cell(told['llc_stderr'])}"
    numbers = [cell(extreme(told["r_hat"], max)), cell(extreme(told["ess"], min)), coefficient, cell(told["distance"])]
    return [_titled(each), f"{told['chains']}{lost}", *numbers, uncertain(told), verdict(told)]


def extreme(by_series: Mapping[str, float | None], of: Callable[[list[float]], float]) -> float | None:
    """The worst of a number that is known by series."""
    known = [value for value in by_series.values() if value is not None]
    return of(known) if known else None


def print_tuned(found: Sequence[Sampled]) -> None:
    """A [[methods]] table per method to paste, with the reasons as comments: of an ensemble, for its first model."""
    seen: dict[str, Sampled] = {}
    for each in found:
        if each.title in seen:
            continue
        seen[each.title] = each
        if each.seed is not None:
            typer.echo(f'# Chosen at the model of seed {each.seed}; "auto" would choose for each model anew.')
        typer.echo("\n".join(f"# {reason}" for reason in each.settled["reasons"]))
        typer.echo(f'[[methods]]\nname = "{each.options["name"]}"')
        if each.title != each.options["name"]:
            typer.echo(f"label = {json.dumps(each.title)}")
        numbers = {**each.options, **each.settled["sampling"], **each.settled.get("suggested", {})}
        for key in CHOSEN:
            typer.echo(f"{key} = {_toml(numbers[key])}")
        for key in OTHERS:
            if key in each.options:
                typer.echo(f"{key} = {_toml(each.options[key])}")
        typer.echo("")


def _toml(value: Any) -> str:
    """A number or text as TOML has it; four digits of a float are as good as what it was derived from."""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
