"""How the command line shows tables and manifests."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """One table on standard output; into a pipe or file, lines are as long as they need to be."""
    tall = any("\n" in text for row in rows for text in row)
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, show_lines=tall, show_header=any(columns))
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not sys.stdout.isatty():
        console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)


def cell(value: Any) -> str:
    """One value as a person reads it; empty for None, NaN and NaT."""
    if value is None or value != value:  # noqa: PLR0124  (NaN and NaT are not themselves)
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if hasattr(value, "strftime"):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_manifest(manifest: dict[str, Any]) -> None:
    """A run's run.json by sections, what matters most first; keys that this version does not know come last, as they are."""
    coverage = dict(manifest.get("coverage", {}))
    state = "complete" if manifest.get("complete") else "INCOMPLETE: run its config again to finish it"
    shape = manifest.get("shape", {})
    share = f"{coverage.get('attributed', 0):,} of {coverage.get('parameters', 0):,} parameters ({coverage.get('share', 0):.1%})"
    head = [
        ["run", f"{manifest.get('run_id', '')}  ({state})"],
        ["created", str(manifest.get("created", ""))],
        ["problem", str(manifest.get("problem", ""))],
        ["methods", ", ".join(map(str, manifest.get("methods", [])))],
        ["examples", f"{shape.get('train', '?')} training, {shape.get('query', '?')} queries"],
        ["measurement", _inline(manifest.get("measurement"))],
        ["sign", str(manifest.get("sign", ""))],
        ["units", _units(manifest.get("units"))],
        ["coverage", share],
        ["reused", ", ".join(name for name, was in manifest.get("reused", {}).items() if was) or "nothing"],
        ["seeds", _inline(manifest.get("seeds"))],
        ["noise", _inline(manifest.get("noise")) or "none: nothing was sampled"],
        *(["separable", f"{method}: relative error {cell(error)}"] for method, error in manifest.get("separable_errors", {}).items()),
        *_low_rank(manifest.get("low_rank", {})),
        *(["solve", f"{method}: {_inline(solve)}"] for method, solve in manifest.get("solves", {}).items()),
        *(["segments", f"{method}: {_segments(each)}"] for method, each in manifest.get("segments", {}).items()),
        *(["stage", f"{name}: {_stage(facts)}"] for name, facts in manifest.get("stages", {}).items()),
        ["versions", _inline(manifest.get("versions"))],
        *(["note", str(note)] for note in manifest.get("notes", [])),
    ]
    print_table(["", ""], head)
    _print_layers(coverage, manifest.get("damping", {}))
    skipped = [[str(s.get("name")), f"{s.get('parameters', 0):,}", str(s.get("reason"))] for s in coverage.get("skipped", [])]
    if skipped:
        print_table(["not attributed", "parameters", "why"], skipped)
    timings = [[stage, cell(seconds.get("wall")), cell(seconds.get("compute"))] for stage, seconds in manifest.get("timings", {}).items()]
    if timings:
        print_table(["stage", "wall s", "compute s"], timings)
    rest = {key: value for key, value in sorted(manifest.items()) if key not in SHOWN}
    print_table(["more", ""], [row for key, value in rest.items() for row in _rows(key, value)])


def _low_rank(told: dict[str, Any]) -> list[list[str]]:
    """A row for each method with directions in a low rank."""
    if not told:
        return []
    from tda.lowrank import summary  # with torch: only where it is needed

    return [["low rank", f"{method}: {summary(one)}"] for method, one in told.items()]


SHOWN = {
    "run_id", "complete", "created", "problem", "methods", "shape", "measurement", "sign", "units", "coverage", "reused", "seeds", "noise",
    "versions", "notes", "damping", "timings", "separable_errors", "low_rank", "solves", "segments", "members",
    "stages",
}  # fmt: skip


def _print_layers(coverage: dict[str, Any], damping: dict[str, Any]) -> None:
    """A row per layer: how it is treated, and the damping that each method used there."""
    methods = [method for method, used in damping.items() if isinstance(used, dict)]
    rows = [
        [
            str(layer.get("name")),
            str(layer.get("kind")),
            " x ".join(map(str, layer.get("shape", []))),
            str(layer.get("structure")),
            *(cell(damping[method].get(layer.get("name"))) for method in methods),
        ]
        for layer in coverage.get("layers", [])
    ]
    if rows:
        print_table(["layer", "kind", "shape", "structure", *(f"damping {method}" for method in methods)], rows)


def _segments(segments: list[dict[str, Any]]) -> str:
    """Steps, time and damping of the segments that a training is cut into."""
    return "; ".join(
        f"steps {s['steps'][0]}..{s['steps'][1]}, time {s['horizon']:.4g}" + (f", damping {s['damping']:.4g}" if "damping" in s else "")
        for s in segments
    )


def _stage(facts: dict[str, Any]) -> str:
    """An earlier stage of training: what it is, and how it is joined to the one after it."""
    shared, train = facts.get("shared", {}), facts.get("shape", {}).get("train", "?")
    damping = {method: sorted(set(used.values())) for method, used in facts.get("damping", {}).items()}
    least_most = {method: values if len(values) == 1 else [values[0], values[-1]] for method, values in damping.items() if values}
    told = {method: " to ".join(cell(value) for value in values) for method, values in least_most.items()}
    return (
        f"{facts.get('problem')}, {train} training examples; proximity {_inline(facts.get('proximity'))}; damping {_inline(told)}; "
        f"{shared.get('share', 0):.1%} of the parameters shared, moved by {facts.get('shift', 0):.1%} of their norm since"
    )


def _units(units: Any) -> str:
    """The unit once where all methods share it."""
    if isinstance(units, dict) and len(set(units.values())) == 1:
        return str(next(iter(units.values())))
    return _inline(units)


def _rows(key: str, value: Any) -> list[list[str]]:
    """A row per entry of a table, or one row for anything else."""
    if isinstance(value, dict):
        return [[f"{key}.{name}", _inline(inner)] for name, inner in value.items()]
    return [[key, _inline(value)]]


def _inline(value: Any) -> str:
    """A small nested value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, str) else ("" if value is None else json.dumps(value, ensure_ascii=False))
