"""Line charts as coordinates of an SVG: a few series over categories or over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tasks.report_charts import Tick
from tasks.report_text import number, percent

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 28
_DECADES = 7  # a logarithmic axis is cut below so many powers of ten from its top

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Mark:
    """One value: its place in the chart, what it says when it is pointed at, and the heights of the ends of its interval, if any."""

    x: float
    y: float
    told: str
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """One series: its name, the number of its colour, an SVG path, and its values. dashed: a line that is only there for comparison."""

    name: str
    colour: int
    path: str
    marks: tuple[Mark, ...]
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of WIDTH x HEIGHT, ready to draw."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    zero: float | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    base: int = HEIGHT - _BOTTOM


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, max(value, self.low) if self.log else value))
        return self.start + (self.stop - self.start) * (at - low) / (high - low)


@dataclass(frozen=True)
class Series:
    """Values (n,) of one line and the number of its colour; bounds (n, 2) of each value and a level that none can pass, if known."""

    values: _Array
    colour: int
    bounds: _Array | None = None
    ceiling: float = math.nan


def ladder_chart(title: str, series: Mapping[str, Series], rungs: Sequence[str], limits: tuple[float, float]) -> Chart:
    """Series over the rungs, on one linear axis that holds `limits`, so that charts side by side can be compared."""
    low, high = limits
    y = _Axis(low, high if high > low else low + 1, HEIGHT - _BOTTOM, _TOP)
    step = (WIDTH - _LEFT - _RIGHT) / len(rungs)
    places = [_LEFT + step * (i + 0.5) for i in range(len(rungs))]
    lines = []
    for name, one in series.items():
        if _finite(one.ceiling):
            lines.append(Line("ceiling", one.colour, f"M{_LEFT} {y(one.ceiling):.1f}H{WIDTH - _RIGHT}", (), dashed=True))
        marks = [_mark(x, y, f"{name}, {rung}", one, i) for i, (x, rung) in enumerate(zip(places, rungs, strict=True))]
        lines.append(_through(name, one.colour, [mark for mark in marks if _finite(mark.y)]))
    ticks = tuple(Tick(y(v), number(v)) for v in _steps(low, high))
    return Chart(
        title, tuple(lines), tuple(Tick(x, rung) for x, rung in zip(places, rungs, strict=True)), ticks, y(0.0) if low < 0 < high else None
    )


def _mark(x: float, y: _Axis, named: str, one: Series, i: int) -> Mark:
    value, told = float(one.values[i]), f"{named}: {number(float(one.values[i]))}"
    if one.bounds is None or not np.isfinite(one.bounds[i]).all():
        return Mark(x, y(value), told)
    low, high = (float(end) for end in one.bounds[i])
    told += f", 95% from {number(low)} to {number(high)}"
    told += f", ceiling {number(one.ceiling)}" if _finite(one.ceiling) else ""
    return Mark(x, y(value), told, (y(low), y(high)))


def share_chart(title: str, shares: _Array, series: Mapping[str, Series], chance: bool = True) -> Chart:
    """Overlaps from 0 to 1 over shares of the eigenvectors, which are also what chance would reach."""
    x = _Axis(float(shares[0]), float(shares[-1]), _LEFT, WIDTH - _RIGHT, log=True)
    y = _Axis(0.0, 1.0, HEIGHT - _BOTTOM, _TOP)

    def drawn(values: _Array, name: str) -> list[tuple[float, float, str]]:
        return [(x(s), y(v), f"{name}, top {percent(s)}: {number(v)}") for s, v in zip(shares, values, strict=True) if _finite(v)]

    lines = [_line(name, one.colour, drawn(one.values, name)) for name, one in series.items()]
    if chance:
        lines.append(_line("chance", -1, drawn(shares, "chance"), dashed=True))
    ticks = tuple(Tick(x(s), percent(s)) for s in shares.tolist())
    return Chart(title, tuple(lines), ticks, tuple(Tick(y(v), f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)), None)


def spectrum_chart(title: str, quantiles: _Array, series: Mapping[str, _Array]) -> Chart:
    """Eigenvalues over shares of the ranks, both axes logarithmic; what is not positive is not drawn."""
    highest = max((float(np.nanmax(values)) for values in series.values()), default=1.0)
    highest = highest if highest > 0 else 1.0
    top = 10.0 ** math.ceil(math.log10(highest))
    x = _Axis(float(quantiles[0]), 1.0, _LEFT, WIDTH - _RIGHT, log=True)
    y = _Axis(top * 10.0**-_DECADES, top, HEIGHT - _BOTTOM, _TOP, log=True)
    lines = []
    for i, (name, values) in enumerate(series.items()):
        seen = [(x(q), y(v), "") for q, v in zip(quantiles.tolist(), values.tolist(), strict=True) if _finite(v) and v > y.low]
        line = _line(name, i, seen)
        lines.append(Line(line.name, line.colour, line.path, ()))
    powers = range(0, _DECADES + 1, 2)
    ticks = tuple(Tick(y(top * 10.0**-p), f"1e{round(math.log10(top)) - p}") for p in powers)
    return Chart(title, tuple(lines), tuple(Tick(x(q), percent(q)) for q in (0.001, 0.01, 0.1, 1.0)), ticks, None)


def legend(charts: Sequence[Chart]) -> list[Line]:
    """What charts that share their colours draw: every line once, in the order of the colours; what is there for comparison comes last."""
    found: dict[tuple[bool, str], Line] = {}
    for line in (line for chart in charts for line in chart.lines):
        found.setdefault((line.dashed, line.name), replace(line, colour=-1) if line.dashed else line)
    return sorted(found.values(), key=lambda line: (line.dashed, line.colour))


def limits_of(values: _Array) -> tuple[float, float]:
    """Round limits around finite values and 0."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min(initial=0.0)), float(finite.max(initial=0.0))) if finite.size else (0.0, 1.0)
    step = _step(low, high)
    return step * math.floor(low / step), step * math.ceil(high / step)


def signed(share: float) -> str:
    """A share that may be negative, as percent."""
    if not math.isfinite(share):
        return number(share)
    if abs(share) < 0.0005:
        return "0 %"
    return percent(share) if share >= 0 else f"\N{MINUS SIGN}{percent(-share)}"


def _line(name: str, colour: int, places: Sequence[tuple[float, float, str]], *, dashed: bool = False) -> Line:
    return _through(name, colour, [Mark(*place) for place in places], dashed=dashed)


def _through(name: str, colour: int, marks: Sequence[Mark], *, dashed: bool = False) -> Line:
    path = "M" + "L".join(f"{mark.x:.1f} {mark.y:.1f}" for mark in marks) if marks else ""
    return Line(name, colour, path, tuple(marks), dashed)


def _steps(low: float, high: float) -> list[float]:
    step = _step(low, high)
    return [step * i for i in range(round(low / step), round(high / step) + 1)]


def _step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten: four to eight of them span the range."""
    spread = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if spread / (power * factor) <= 8)


def _finite(value: float) -> bool:
    return math.isfinite(value)
