"""Charts of an evaluation as coordinates of an SVG: methods with their intervals, lines over dampings or shares, scores against seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.decompose_charts import _Axis, _steps, limits_of
from tasks.report_charts import Tick
from tasks.report_text import number

ROW, FOREST_WIDTH = 26, 760
_NAMES, _VALUES, _HEAD, _FOOT = 170, 172, 8, 30
WIDTH, HEIGHT = 520, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 110, 14, 40
#: How long and how high a name is.
LABEL, LINE = 100.0, 13.0


@dataclass(frozen=True)
class Entry:
    """One value with its interval, under a name. hollow: a second value drawn as a ring (one model of an ensemble); NaN where none is."""

    name: str
    value: float
    low: float
    high: float
    hollow: float = math.nan


@dataclass(frozen=True)
class Row:
    """An entry's place in a chart of rows."""

    name: str
    y: float
    x: float
    low: float
    high: float
    hollow: float | None
    told: str


@dataclass(frozen=True)
class Forest:
    """Rows of values with intervals on one axis, ready to draw. ceiling: where the dashed line is; None where it is not known."""

    title: str
    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]
    zero: float
    ceiling: float | None
    ceiling_told: str
    height: int
    width: int = FOREST_WIDTH
    left: int = _NAMES
    right: int = FOREST_WIDTH - _VALUES


@dataclass(frozen=True)
class Point:
    """One value of a line: its place, its interval (the same place twice where there is none), and what it says when pointed at."""

    x: float
    y: float
    low: float
    high: float
    told: str
    ring: bool = False


@dataclass(frozen=True)
class Series:
    """One line: its name and where that is written, the number of its colour, an SVG path, its points."""

    name: str
    label_x: float
    label_y: float
    colour: int
    path: str
    points: tuple[Point, ...]
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """A chart of lines or points, ready to draw; level: a dashed horizontal line."""

    title: str
    series: tuple[Series, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    zero: float | None
    level: float | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    base: int = HEIGHT - _BOTTOM


def forest(title: str, entries: Sequence[Entry], ceiling: float = math.nan) -> Forest:
    """One row per entry, in their order, on a linear axis around 0 and the ceiling."""
    values = np.array([v for e in entries for v in (e.value, e.low, e.high, e.hollow)] + [ceiling])
    low, high = limits_of(values)
    axis = _Axis(low, high if high > low else low + 1, _NAMES, FOREST_WIDTH - _VALUES)
    rows = []
    for i, entry in enumerate(entries):
        bounds = [axis(v if math.isfinite(v) else entry.value) for v in (entry.low, entry.high)]
        hollow = axis(entry.hollow) if math.isfinite(entry.hollow) else None
        rows.append(Row(entry.name, _HEAD + ROW * (i + 0.5), axis(entry.value), bounds[0], bounds[1], hollow, told(entry)))
    ticks = tuple(Tick(axis(v), number(v)) for v in _steps(low, high))
    at = axis(ceiling) if math.isfinite(ceiling) else None
    return Forest(title, tuple(rows), ticks, axis(0.0), at, number(ceiling), _HEAD + ROW * len(rows) + _FOOT)


def told(entry: Entry) -> str:
    """An entry's value with its interval."""
    value = f"{entry.value:.3f}".replace("-", "\N{MINUS SIGN}")
    if not math.isfinite(entry.low):
        return value
    return f"{value} [{entry.low:.3f}, {entry.high:.3f}]".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Curve:
    """Values of a line to draw: xs, each an entry; ring: positions drawn as rings (what is not a plain number on the axis)."""

    name: str
    xs: Sequence[float]
    entries: Sequence[Entry]
    ring: frozenset[int] = frozenset()
    dashed: bool = False
    colour: int = 0


def plot(title: str, curves: Sequence[Curve], x_title: str, *, log: bool = True, joined: bool = True, level: float = math.nan) -> Plot:
    """Curves on a logarithmic or linear axis; joined: lines between their points. level: a dashed line, such as the ceiling."""
    xs = [x for curve in curves for x in curve.xs]
    values = np.array([v for c in curves for e in c.entries for v in (e.value, e.low, e.high)] + [level])
    low, high = limits_of(values)
    base = max(HEIGHT - _BOTTOM, _TOP + math.ceil(LINE * sum(bool(curve.name) for curve in curves)))
    y = _Axis(low, high if high > low else low + 1, base, _TOP)
    first, last = _span(xs, log)
    x = _Axis(first, last, _LEFT + 8, WIDTH - _RIGHT - 8, log=log)
    ends = [(x(curve.xs[-1]), y(curve.entries[-1].value)) for curve in curves if curve.name]
    labels = iter(_column([end for _, end in ends], base) if joined and len({x for x, _ in ends}) == 1 else _apart(ends, base))
    series = []
    for curve in curves:
        points = [_point(x(at), y, entry, i in curve.ring) for i, (at, entry) in enumerate(zip(curve.xs, curve.entries, strict=True))]
        path = "M" + "L".join(f"{p.x:.1f} {p.y:.1f}" for p in points) if joined and len(points) > 1 else ""
        label = next(labels) + 4 if curve.name else 0.0
        series.append(Series(curve.name, points[-1].x + 9, label, curve.colour, path, tuple(points), curve.dashed))
    ticks = tuple(Tick(y(v), number(v)) for v in _steps(low, high))
    at = y(level) if math.isfinite(level) else None
    zero = y(0.0) if low < 0 < high else None
    x_ticks = tuple(_x_ticks(x, first, last, log))
    return Plot(title, tuple(series), x_ticks, ticks, x_title, zero, at, height=base + _BOTTOM, base=base)


def _point(x: float, y: _Axis, entry: Entry, ring: bool) -> Point:
    low, high = (y(v if math.isfinite(v) else entry.value) for v in (entry.low, entry.high))
    return Point(x, y(entry.value), low, high, f"{entry.name}: {told(entry)}", ring)


def _span(xs: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(xs), max(xs)
    if high > low:
        return (low / (high / low) ** 0.04, high * (high / low) ** 0.04) if log else (low, high)
    return (low / 2, high * 2) if log else (low - 0.5, high + 0.5)


def _x_ticks(axis: _Axis, first: float, last: float, log: bool) -> list[Tick]:
    if not log:
        return [Tick(axis(v), number(v)) for v in sorted({*np.linspace(first, last, 5).round(3).tolist()})]
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    # Tens where there are several, else also twos and fives; rounding must not lose the ends.
    values: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [f * 10.0**p for p in powers for f in factors if first * (1 - 1e-9) <= f * 10.0**p <= last * (1 + 1e-9)]
        if len(values) >= 3:
            break
    step = max(1, len(values) // 6)
    return [Tick(axis(v), number(v)) for v in values[::step]] or [Tick(axis(v), number(v)) for v in (first, last)]


def _column(places: Sequence[float], base: float) -> list[float]:
    """Where labels at these heights are written in one column: in the order of the heights, a line apart, within the chart."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = list(places)
    for above, i in zip([None, *order], order, strict=False):
        found[i] = max(found[i], _TOP if above is None else found[above] + LINE)
    for below, i in zip([None, *order[::-1]], order[::-1], strict=False):
        found[i] = min(found[i], base if below is None else found[below] - LINE)
    return found


def _apart(places: Sequence[tuple[float, float]], base: float) -> list[float]:
    """Where labels that begin at (x, y) are written, each moved down or up until it covers none before it; in the order given."""
    found = [y for _, y in places]
    done: list[int] = []
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        near = [found[j] for j in done if abs(places[j][0] - places[i][0]) < LABEL]
        free = [found[i], *(y + LINE for y in near), *(y - LINE for y in near)]
        fits = [y for y in free if all(abs(y - other) >= LINE - 1e-9 for other in near) and _TOP <= y <= base]
        found[i] = min(fits or [found[i]], key=lambda y, wanted=found[i]: abs(y - wanted))  # type: ignore[misc]
        done.append(i)
    return found
