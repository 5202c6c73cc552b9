"""Traces of chains as coordinates of an SVG: one line per chain over the steps, the burn-in shaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.report_charts import Tick
from tasks.report_text import number

WIDTH, HEIGHT = 440, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26
#: A line has at most two points in each of so many columns: the least and the most of what falls there.
COLUMNS = 200
#: So many chains have colours of their own; those after them begin again.
COLOURS = 4


@dataclass(frozen=True)
class Line:
    """One chain: its number, its colour, and where its values are finite the corners of its line, as an SVG polyline takes them."""

    chain: int
    colour: int
    points: str


@dataclass(frozen=True)
class Traces:
    """A chart of WIDTH x HEIGHT, ready to draw. burn_in: where the burn-in ends, None where there was none."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    burn_in: float | None
    least: float
    most: float
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    base: int = HEIGHT - _BOTTOM


def traces(values: np.ndarray[Any, Any], at: np.ndarray[Any, Any], steps: int, burn_in: int) -> Traces | None:
    """The chart of values (chain, point) taken after steps `at` (point,) of `steps`; None where no value is finite."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return None
    least, most = float(finite.min()), float(finite.max())
    span = (most - least) or abs(most) or 1.0
    low, high = least - 0.04 * span, most + 0.04 * span

    def x(step: Any) -> Any:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / max(steps, 1)

    def y(value: Any) -> Any:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)

    lines = []
    for chain, row in enumerate(values):
        places = _shown(row, at, steps)
        points = " ".join(f"{x(at[p]):.1f},{y(row[p]):.1f}" for p in places)
        lines.append(Line(chain, chain % COLOURS, points))
    ticks = [Tick(float(y(value)), number(value)) for value in (least, (least + most) / 2, most)]
    ends = [Tick(float(x(0)), "0", "start"), Tick(float(x(steps)), f"{steps:,} steps", "end")]
    return Traces(tuple(lines), tuple(ends), tuple(ticks), float(x(burn_in)) if burn_in else None, least, most)


def _shown(row: np.ndarray[Any, Any], at: np.ndarray[Any, Any], steps: int) -> list[int]:
    """Places of a row that are drawn: all, or the least and the most of every column of the chart."""
    known = np.flatnonzero(np.isfinite(row))
    if known.size <= 2 * COLUMNS:
        return [int(place) for place in known]
    column = at[known] * COLUMNS // (steps + 1)
    shown: list[int] = []
    for group in np.split(known, np.flatnonzero(np.diff(column)) + 1):
        shown += sorted({int(group[row[group].argmin()]), int(group[row[group].argmax()])})
    return shown
