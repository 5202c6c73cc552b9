"""Scores of the training sets of earlier stages, which a run holds beside those of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tda.labelled import Scores
from tda.results import NotStored
from tda.rows import whole

if TYPE_CHECKING:
    import xarray as xr

    from tda.results import Run


def influence_on(run: Run, stage: str) -> xr.DataArray:
    """`Run.influence_on`: (method, query, train) over the methods that attribute to the stage; attrs also `stage` and `examples`, its N.

    Raises:
        NotStored: no method of the run attributes to it.
    """
    stages = run.manifest.get("stages", {})
    if stage not in stages:
        known = f"it has {', '.join(map(repr, stages))}" if stages else "it has its own training set alone; multistage stores others"
        raise NotStored(f"run {run.id} has no scores on {stage!r}; {known}")
    scores = whole(run, run.scored("stages", stage))
    scores.attrs.update(stage=stage, examples=stages[stage]["shape"]["train"], damping=stages[stage].get("damping", {}))
    return Scores(scores)
