"""Charts of a study: a colour is an option's value in every chart, and what is uncertain says how much."""

import numpy as np
import pytest

from tasks.decompose_charts import Series, ladder_chart, legend
from tasks.decompose_page import NAMES, _charts

RUNGS = list(NAMES.values())


def point(depth: int, width: int) -> dict:
    return {"swept": {"depth": depth, "width": width}, "progress": 1.0}


def test_a_colour_is_the_same_value_in_every_chart_also_where_points_were_refused() -> None:
    points = [point(8, 32), point(4, 64), point(1, 32), point(1, 64), point(1, 128)]
    charts = _charts(points, ["depth", "width"], np.random.default_rng(0).random((5, 5)))
    assert [chart.title for chart in charts] == ["depth 8", "depth 4", "depth 1"]
    drawn = [(line.name, line.colour) for chart in charts for line in chart.lines]
    assert len(set(drawn)) == 3
    assert [(line.name, line.colour) for line in legend(charts)] == [("width 32", 0), ("width 64", 1), ("width 128", 2)]


def test_an_interval_and_a_ceiling_are_drawn_at_their_place_and_told() -> None:
    values = np.array([0.5, 0.4, 0.3, np.nan, 0.1])
    bounds = np.stack([values - 0.1, values + 0.1], 1)
    chart = ladder_chart("", {"a": Series(values, 3, bounds, 0.9)}, RUNGS, (0.0, 1.0))
    ceiling, line = chart.lines
    assert (ceiling.dashed, ceiling.colour, line.colour) == (True, 3, 3)
    assert line.marks[0].told == "a, Hessian: 0.5, 95% from 0.4 to 0.6, ceiling 0.9"
    assert len(line.marks) == 4, "what was not measured is not drawn"
    first = line.marks[0]
    assert first.ends is not None
    height = chart.base - line.marks[-1].y  # of 0.1
    assert (first.ends[0] - first.y, first.y - first.ends[1]) == pytest.approx((height, height))
    assert [(each.name, each.colour) for each in legend([chart, chart])] == [("a", 3), ("ceiling", -1)]


def test_without_an_interval_nothing_is_told_of_one() -> None:
    chart = ladder_chart("", {"a": Series(np.ones(5), 0)}, RUNGS, (0.0, 1.0))
    assert [line.dashed for line in chart.lines] == [False]
    assert all(mark.ends is None and "95%" not in mark.told for mark in chart.lines[0].marks)
