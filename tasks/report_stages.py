"""What the page shows of earlier stages of training: their facts, and for each query their most helpful and harmful examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.report_content import Describes, described

if TYPE_CHECKING:
    import xarray as xr

    from tda.results import Run

#: Ranks a row of scores: given the function that describes an example, the scores, and "helpful" or "harmful".
Rank = Callable[[Callable[[int], dict[str, Any]], Any, Any], list[dict[str, Any]]]


class Stages:
    """The earlier stages of a run: none, for most. problems: by stage, what describes its examples."""

    def __init__(self, run: Run, problems: Mapping[str, Describes]) -> None:
        self.scores = {name: run.influence_on(name) for name in run.manifest.get("stages", {})}
        self.examples = {name: _examples(scores, problems.get(name)) for name, scores in self.scores.items()}
        self.facts = [{"name": name, **facts} for name, facts in run.manifest.get("stages", {}).items()]

    def of(self, method: str, place: int, rank: Rank) -> list[dict[str, Any]]:
        """The ends of the ranking of one query (by its position) by one method, for each stage that the method attributes to."""
        found = []
        for name, scores in self.scores.items():
            if method in scores["method"].to_numpy():
                row = scores.loc[method][place].to_numpy()
                found.append({"name": name, **{kind: rank(self.examples[name], row, kind) for kind in ("helpful", "harmful")}})
        return found


def _examples(scores: xr.DataArray, problem: Describes | None) -> Callable[[int], dict[str, Any]]:
    ids = scores["train"].to_numpy()
    labels = np.asarray(scores.coords["train_label"]) if "train_label" in scores.coords else None

    @cache
    def example(place: int) -> dict[str, Any]:
        return {
            "id": int(ids[place]),
            "label": None if labels is None else int(labels[place]),
            "value": None,
            "content": described(problem or _Nothing(), "train", int(ids[place])),
        }

    return example


class _Nothing:
    """Stands for a problem that is not at hand: an example is shown by its number."""

    def describe(self, split: str, i: int) -> str:
        return f"{split} {i}"
