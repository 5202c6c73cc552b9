"""Histograms as coordinates of an SVG: counts on a logarithmic axis, because influence has heavy tails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.report_text import number

WIDTH, HEIGHT = 440, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 26
_BINS = 56
_CROWDED = 100_000  # counts from which every second power of ten is labelled


@dataclass(frozen=True)
class Bar:
    """One bin: its place in the chart, its count, its range, and whether it lies below zero."""

    x: float
    y: float
    width: float
    height: float
    count: int
    low: float
    high: float
    negative: bool


@dataclass(frozen=True)
class Tick:
    """A label of an axis and its place along it."""

    at: float
    label: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Histogram:
    """A chart of WIDTH x HEIGHT, ready to draw, with what a caption says about the values."""

    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    zero: float | None
    count: int
    least: float
    median: float
    most: float
    negative_share: float
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    base: int = HEIGHT - _BOTTOM


def histogram(values: np.ndarray[Any, Any]) -> Histogram | None:
    """Histogram of the finite values; zero always lies on an edge of a bin. None where no value is finite."""
    finite = np.asarray(values, dtype=np.float64).reshape(-1)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return None
    least, most = float(finite.min()), float(finite.max())
    edges = _edges(least, most)
    counts = np.histogram(finite, edges)[0]
    return Histogram(
        bars=_bars(counts, edges),
        x_ticks=_x_ticks(edges),
        y_ticks=_y_ticks(int(counts.max())),
        zero=_x(0.0, edges) if edges[0] <= 0 <= edges[-1] else None,
        count=finite.size,
        least=least,
        median=float(np.median(finite)),
        most=most,
        negative_share=float(np.mean(finite < 0)),
    )


def _edges(least: float, most: float) -> np.ndarray[Any, Any]:
    width = (most - least) / _BINS or abs(most) / _BINS or 1.0
    first, last = math.floor(least / width), math.ceil(most / width)
    return width * np.arange(first, max(last, first + 1) + 1)


def _bars(counts: np.ndarray[Any, Any], edges: np.ndarray[Any, Any]) -> tuple[Bar, ...]:
    top = math.log10(1 + int(counts.max()))
    full = HEIGHT - _TOP - _BOTTOM
    bars = []
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            height = full * math.log10(1 + count) / top
            x = _x(low, edges)
            bars.append(Bar(x, HEIGHT - _BOTTOM - height, max(_x(high, edges) - x - 0.6, 0.6), height, count, low, high, high <= 0))
    return tuple(bars)


def _x(value: float, edges: np.ndarray[Any, Any]) -> float:
    return float(_LEFT + (WIDTH - _LEFT - _RIGHT) * (value - edges[0]) / (edges[-1] - edges[0]))


def _x_ticks(edges: np.ndarray[Any, Any]) -> tuple[Tick, ...]:
    first, last = float(edges[0]), float(edges[-1])
    ticks = [Tick(_x(first, edges), number(first, 2), "start"), Tick(_x(last, edges), number(last, 2), "end")]
    if first < 0 < last and _LEFT + 70 < _x(0, edges) < WIDTH - _RIGHT - 70:
        ticks.append(Tick(_x(0, edges), "0"))
    return tuple(ticks)


def _y_ticks(most: int) -> tuple[Tick, ...]:
    """1, 10, 100, ... up to the largest count, every second one where they crowd."""
    full = HEIGHT - _TOP - _BOTTOM
    top = math.log10(1 + most)
    powers = range(0, int(math.log10(most)) + 1, 1 if most < _CROWDED else 2)
    return tuple(Tick(HEIGHT - _BOTTOM - full * math.log10(1 + 10**power) / top, f"{10**power:,}") for power in powers)
