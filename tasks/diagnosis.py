"""Whether chains are to be trusted: what is stored beside them as diagnostics.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tda import location
from tda.sampling.covariance import covariance, still_series
from tda.sampling.diagnostics import diagnose, verdict
from tda.sampling.stored import Trajectories

#: Examples of each split, evenly drawn, whose series are judged one by one.
MOST_SERIES = 256


def diagnosis(stored: Trajectories) -> dict[str, Any]:
    """`tda.sampling.diagnostics.Diagnostics` as JSON (null where a number cannot be had), and "verdict", its sentences.

    Of single training examples and queries, up to MOST_SERIES each are looked at: the least number of effective draws is theirs, and so
    is the share of scores of uncertain sign.
    """
    group: Any = location.open_group(stored.zarr)
    whole = {name: np.asarray(group[array], np.float64)[stored.chains] for name, array in _WHOLE.items()}
    train, queries = stored.train(_evenly(stored.examples)), stored.measurement(_evenly(int(stored.told["queries"])))
    value, stderr = covariance(train, queries)
    found = diagnose(
        whole | {"example losses": train.numpy(), "measurements": queries.numpy()},
        stored.sampling,
        parameters=stored.told["parameters"],
        bound=stored.told.get("bound", math.nan),
        uncertain=float((value.abs() < 2 * stderr).double().mean()),
        still=still_series(train) + still_series(queries),
        lost=list(stored.told["lost"].values()),
    )
    numbers = {key: value for key, value in asdict(found).items() if key != "sampling"}
    return {**_json(numbers), "verdict": verdict(found)}


#: Series of which there is one number per draw, by the names that verdicts use.
_WHOLE = {"train loss": "mean_loss_train", "distance": "distance"}


def _evenly(count: int) -> Sequence[int]:
    return range(0, count, -(-count // MOST_SERIES))


def _json(value: Any) -> Any:
    """Numbers that JSON does not have are null."""
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
