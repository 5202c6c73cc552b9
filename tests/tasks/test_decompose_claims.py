"""The paper's claims beside numbers that are made up: what holds, what does not, and what a study cannot tell."""

import numpy as np
import pytest
import xarray as xr

from tasks.decompose_claims import Claim, claims
from tasks.decompose_measure import steps
from tda.decomposition import REFERENCES, RUNGS


def points(**coordinates: list) -> xr.Dataset:
    """A study whose error grows evenly down the ladder and whose off-block mass grows from point to point."""
    count = len(next(iter(coordinates.values())))
    error = np.broadcast_to(np.linspace(0, 1, 5), (count, 1, 1, 3, 5)).copy()
    variables = {
        "refused": (["point"], [""] * count),
        "error": (["point", "definition", "inverse", "reference", "rung"], error),
        "error_share": (["point", "definition", "inverse", "reference", "step"], np.diff(error)),
        "off_block_mass": (["point", "reference"], np.linspace(0.1, 0.9, count)[:, None].repeat(3, 1)),
        "basis_overlap": (["point", "reference", "rung", "top"], np.full((count, 3, 5, 1), 0.5)),
    }
    labels = {
        "definition": ["inverse"],
        "inverse": ["i"],
        "reference": list(REFERENCES),
        "rung": list(RUNGS),
        "step": steps(),
        "top": [0.1],
    }
    return xr.Dataset(variables, labels | {name: ("point", values) for name, values in coordinates.items()})


def said(data: xr.Dataset, text: str) -> Claim:
    (found,) = [claim for claim in claims(data, "i") if text in claim.said]
    return found


@pytest.mark.parametrize("values", [["two", "four"], [1, "deep"], ["[4, 4]", "[8, 8]"], [True, False]], ids=str)
def test_an_option_that_is_no_number_leaves_its_claims_open(values: list) -> None:
    data = points(depth=[value if isinstance(value, bool) else str(value) for value in values])
    assert said(data, "off-block mass of the GGN grows").holds is None
    assert said(data, "off-block mass of the GGN grows").measured == "the study's depth are no numbers"


def test_growth_is_judged_by_the_ends_of_a_numeric_option() -> None:
    assert said(points(depth=[1, 4, 8]), "off-block mass of the GGN grows").holds is True
    assert said(points(depth=[8, 4, 1]), "off-block mass of the GGN grows").holds is False


def test_points_that_were_not_measured_are_no_failures() -> None:
    data = points(depth=[1, 2, 4])
    data["error"][1] = np.nan
    data["off_block_mass"][2] = np.nan
    grows = said(data, "the error grows with every step")
    assert (grows.holds, grows.measured) == (True, "at 2 of 2 points")
    mass = said(data, "off-block mass of the GGN grows")
    assert (mass.holds, mass.measured) == (True, "in 1 of 1 comparisons (0.1 at 1, 0.5 at 2)")


@pytest.mark.parametrize(
    ("intervals", "holds", "told"),
    [
        ([(-0.3, -0.1)] * 4, True, "of 4 steps 4 fall, 0 rise, 0 are"),
        ([(-0.3, -0.1)] * 3 + [(-0.1, 0.1)], None, "of 4 steps 3 fall, 0 rise, 1 are"),
        ([(-0.3, -0.1)] * 3 + [(0.1, 0.2)], False, "of 4 steps 3 fall, 1 rise, 0 are"),
        ([(np.nan, np.nan)] * 4, None, "of 0 steps"),
    ],
)
def test_a_step_of_the_lds_counts_where_its_interval_does_not_hold_zero(intervals: list, holds: bool | None, told: str) -> None:
    data = points(depth=[1, 2])
    bounds = np.full((2, 1, 1, 4, 2), np.nan)  # the second point lies on the way of a training: never evaluated
    bounds[0, 0, 0] = intervals
    data["rung_lds_step_bound"] = (["point", "alpha", "inverse", "step", "bound"], bounds)
    found = said(data, "LDS falls")
    assert found.holds is holds
    assert found.measured.startswith(told)
