"""Charts put values where they belong: on one axis, with intervals around them, and labels that do not cover each other."""

import math
from itertools import pairwise

import pytest

from tasks.evaluate_charts import Curve, Entry, forest, plot, told

ENTRIES = [Entry("ekfac", 0.5, 0.4, 0.6, 0.45), Entry("random", -0.01, -0.1, 0.08)]


def test_rows_lie_on_one_axis_with_their_intervals() -> None:
    chart = forest("alpha = 0.5", ENTRIES, 0.9)
    first, second = chart.rows
    assert first.low < first.x < first.high < chart.ceiling <= chart.right
    assert second.low < chart.zero < second.high
    assert first.hollow is not None
    assert first.low < first.hollow < first.x
    assert second.hollow is None
    assert first.y < second.y < chart.height
    assert chart.left <= second.low
    scale = (first.x - second.x) / 0.51
    assert chart.ceiling - first.x == pytest.approx(0.4 * scale)
    assert first.told == "0.500 [0.400, 0.600]"


def test_a_ceiling_that_is_not_known_is_not_drawn() -> None:
    assert forest("", ENTRIES).ceiling is None
    assert plot("", [Curve("a", [1.0], ENTRIES[:1])], "seconds").level is None


def test_lines_run_from_small_to_large_dampings_on_a_logarithmic_axis() -> None:
    entries = [Entry("", v, math.nan, math.nan) for v in (0.1, 0.3, 0.2)]
    chart = plot("", [Curve("ekfac", [1e-3, 1e-2, 1e-1], entries, frozenset({1}))], "damping", level=0.8)
    a, b, c = chart.series[0].points
    assert b.x - a.x == pytest.approx(c.x - b.x)
    assert b.y < c.y < a.y, "higher is up"
    assert a.low == a.high == a.y, "no interval"
    assert [point.ring for point in (a, b, c)] == [False, True, False]
    assert chart.series[0].path.count("L") == 2
    assert [tick.label for tick in chart.x_ticks] == ["0.001", "0.01", "0.1"]
    assert chart.level < b.y


@pytest.mark.parametrize("count", [12, 40])
@pytest.mark.parametrize("joined", [True, False])
def test_names_of_lines_that_end_together_are_apart_and_inside(joined: bool, count: int) -> None:
    curves = [Curve(f"m{i}", [0.3, 0.5], [Entry("", 0.0, 0, 0), Entry("", 0.001 * i, 0, 0)], colour=i) for i in range(count)]
    chart = plot("", curves, "alpha", log=False, joined=joined)
    places = sorted(line.label_y for line in chart.series)
    assert all(b - a >= 12 for a, b in pairwise(places))
    assert places[-1] <= chart.height
    assert places[0] >= 0
    if joined:
        by_value = [line.label_y for line in chart.series]
        assert by_value == sorted(by_value, reverse=True), "in the order of the ends, the highest on top"
    assert all(bool(line.path) == joined for line in chart.series)


def test_a_single_place_has_room_on_both_sides() -> None:
    chart = plot("", [Curve("a", [2.0], ENTRIES[:1])], "seconds of work", joined=False)
    assert chart.left < chart.series[0].points[0].x < chart.right


def test_a_value_without_an_interval_is_told_alone() -> None:
    assert told(Entry("", -0.25, math.nan, math.nan)) == "\N{MINUS SIGN}0.250"
