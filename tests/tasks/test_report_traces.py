"""Traces of chains: every line inside its chart, lost chains end, long ones keep their extremes."""

import numpy as np

from tasks.report_traces import COLUMNS, HEIGHT, WIDTH, traces


def corners(points: str) -> np.ndarray:
    return np.array([[float(part) for part in pair.split(",")] for pair in points.split()])


def test_a_long_trace_keeps_its_least_and_its_most_and_stays_inside() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5000))
    values[1, 4321] = 40.0
    chart = traces(values, np.arange(5000), 5000, 500)
    assert chart is not None
    assert len(chart.lines) == 3
    found = [corners(line.points) for line in chart.lines]
    assert all(len(each) <= 2 * COLUMNS for each in found)
    assert all(((each >= 0) & (each <= [WIDTH, HEIGHT])).all() for each in found)
    assert found[1][:, 1].min() < found[0][:, 1].min() - 50, "the one large value is there"
    assert chart.burn_in is not None
    assert chart.left < chart.burn_in < chart.right


def test_a_lost_chain_ends_where_it_was_lost_and_nothing_at_all_gives_no_chart() -> None:
    values = np.zeros((2, 10))
    values[1, 4:] = np.nan
    chart = traces(values, np.arange(10), 10, 0)
    assert chart is not None
    assert [len(corners(line.points)) for line in chart.lines] == [10, 4]
    assert chart.burn_in is None
    assert traces(np.full((2, 3), np.nan), np.arange(3), 3, 0) is None
