"""Scores of one query at a time, whether a whole training set was scored or only candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from tda.errors import InputError
from tda.labelled import ScoreSet
from tda.results import NotStored, ranking
from tda.retrieval.candidates import SOURCES, named

if TYPE_CHECKING:
    from tda.results import Kind, Run

    _Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """The scores of one query, (example,) or (method, example), and the ids of the examples, (example,).

    label (example,), where labels are integers; source (example,): bits of `tda.retrieval.candidates.SOURCES`, where these are candidates.
    """

    train: _Array
    score: _Array
    label: _Array | None = None
    source: _Array | None = None

    @property
    def of(self) -> str:
        """What the examples were ranked among, where these are candidates: "212 candidates"; else nothing."""
        return "" if self.source is None else f"{len(self.train)} candidates"


@dataclass(frozen=True)
class Rows:
    """The scores of one training set of a run, row by row. data: scores (method, query, ...) with their coordinates."""

    data: xr.DataArray

    @property
    def methods(self) -> list[str]:
        """The labels of the methods."""
        return [str(label) for label in self.data["method"].to_numpy()]

    @property
    def queries(self) -> _Array:
        """The ids of the queries."""
        return self.data["query"].to_numpy()

    @property
    def sparse(self) -> bool:
        """Whether only candidates were scored."""
        return "candidate" in self.data.dims

    def of(self, place: int, method: str | None = None) -> Row:
        """The scores of a query, by its position, under one method, or under all of them."""
        row = self.data[:, place] if method is None else self.data.loc[method][place]
        if not self.sparse:
            label = row["train_label"].to_numpy() if "train_label" in row.coords else None
            return Row(row["train"].to_numpy(), row.to_numpy(), label)
        ids = row["candidate_id"].to_numpy()
        real = ids >= 0
        label = row["candidate_label"].to_numpy()[real] if "candidate_label" in row.coords else None
        return Row(ids[real], row.to_numpy()[..., real], label, row["candidate_source"].to_numpy()[real])


def rows(run: Run, on: str | None = None) -> Rows:
    """The scores of the run's own training set, or of an earlier stage's. Raises NotStored where no method attributes to it."""
    if _chosen(run) == (on or "train"):
        return Rows(candidates(run)["influence"])
    return Rows(run.influence if on is None else run.influence_on(on))


def top(run: Run, query: int, k: int, method: str | None, kind: Kind, on: str | None) -> pd.DataFrame:
    """As `Run.top` says."""
    scores = rows(run, on)
    method = _method(run, method, scores.methods)
    if kind not in ("helpful", "harmful"):
        raise InputError(f"kind must be 'helpful' or 'harmful', got {kind!r}")
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    queries = scores.queries
    if query not in queries:
        raise InputError(f"run {run.id} has no query {query!r}; it has {len(queries)}, from {queries.min()} to {queries.max()}")
    row = scores.of(int(np.flatnonzero(queries == query)[0]), method)
    order = ranking(row.score, kind=kind, better=run.better)[:k]
    table = pd.DataFrame({"rank": np.arange(1, len(order) + 1), "train": row.train[order]})
    if row.label is not None:
        table["label"] = row.label[order]
    table["score"] = row.score[order]
    if row.source is not None:
        table["source"] = [named(int(source)) for source in row.source[order]]
        table.attrs["of"] = f"{row.of} of {scores.data.attrs['examples']} training examples"
    return table


def _method(run: Run, method: str | None, labels: list[str]) -> str:
    if method is None:
        return run.default_method if run.default_method in labels else labels[-1]
    if method not in labels:
        raise InputError(f"run {run.id} has no method {method!r}; it has {', '.join(labels)}")
    return method


def candidates(run: Run) -> xr.Dataset:
    """As `Run.candidates` says: influence and stderr (method, query, candidate), loss (query, candidate).

    Coordinates method, query, query_label; candidate_id, candidate_source, candidate_label (query, candidate). attrs: on, the training set
    that they are of; examples, its N.
    """
    on = _chosen(run)
    if on is None:
        raise NotStored(
            f"run {run.id} scored all training examples: run.influence has them; a [candidates] table scores some for each query"
        )
    found = run.scored() if on == "train" else run.scored("stages", on)
    found = found.rename({f"candidate_{name}": name for name in ("influence", "stderr", "loss") if f"candidate_{name}" in found})
    examples = run.manifest["shape"]["train"] if on == "train" else run.manifest["stages"][on]["shape"]["train"]
    stated = {"on": on, "examples": examples}
    for name in ("influence", "stderr"):
        if name in found:
            found[name].attrs.update(stated)
            if on != "train":
                found[name].attrs["damping"] = run.manifest["stages"][on].get("damping", {})
    source = found["candidate_source"]
    source.attrs.update(flag_masks=list(SOURCES.values()), flag_meanings=" ".join(SOURCES))
    found = found.set_coords("candidate_source")
    return ScoreSet(dict(found.data_vars), found.coords, {**found.attrs, **stated})


def whole(run: Run, data: xr.Dataset) -> xr.DataArray:
    """The scores of a whole training set. Raises NotStored where only candidates were scored."""
    if "influence" not in data:
        raise NotStored(
            f"run {run.id} scored candidates only: run.candidates has them, (method, query, candidate); without the [candidates] table "
            "of its configuration all training examples are scored"
        )
    return data["influence"]


def _chosen(run: Run) -> str | None:
    """The training set of which only candidates were scored; None: all were."""
    asked = run.manifest.get("config", {}).get("candidates")
    return str(asked["on"]) if asked else None
