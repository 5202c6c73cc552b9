"""What a notebook opens: a finished run as labelled arrays that are fetched when they are used.

run = tda.open_run("s3://bucket/prefix", "latest")
run.influence.loc["ekfac", 3]                    # reads the chunks that hold this row, nothing else
run.top(query=3, k=10, kind="helpful")
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
import zarr

from tda import location, schema
from tda.errors import InputError
from tda.labelled import Scores

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

Kind = Literal["helpful", "harmful"]


class NotStored(AttributeError):  # noqa: N818  (reads as what happened: run.stderr is not stored)
    """The run has no such array; the message says what would store it."""


def list_runs(store: str | os.PathLike[str]) -> pd.DataFrame:
    """Every run of a store, newest first, from the runs' manifests alone: no array is opened.

    Returns:
        Columns run (id), created (UTC), complete, problem, methods (labels, comma-separated), train and query (numbers of examples),
        reused (what was taken from earlier runs, comma-separated). A run that was interrupted is listed with complete = False; so is one
        whose run.json is damaged, which says so in place of the problem.

    Raises:
        InputError: the store cannot be read.
    """
    rows = [_row(run_id, manifest) for run_id, manifest in _manifests(location.resolve(str(store))).items()]
    table = pd.DataFrame(rows, columns=["run", "created", "complete", "problem", "methods", "train", "query", "reused"])
    table["created"] = pd.to_datetime(table["created"], utc=True, errors="coerce", format="ISO8601")
    return table.sort_values(["created", "run"], ascending=False, kind="stable", ignore_index=True)


def open_run(store: str | os.PathLike[str], run: str = "latest", *, incomplete: bool = False) -> Run:
    """Open one run; only its manifest is read now.

    Args:
        store: "file:./store", a folder, or "s3://bucket/prefix".
        run: its id, a beginning of the id that no other run shares, or "latest": the newest complete run.
        incomplete: also open runs that have not finished; what they have not computed reads as NaN.

    Raises:
        InputError: no such run, several runs begin so, the run is incomplete, a newer tda wrote it, or the store cannot be read.
    """
    url = location.resolve(str(store))
    manifests = _manifests(url, None if run == "latest" else run)
    run_id = _latest(url, manifests, incomplete=incomplete) if run == "latest" else _by_prefix(url, run, manifests)
    manifest = manifests[run_id]
    where = location.join(url, "runs", run_id)
    if not manifest:
        location.read_json(f"{where}/run.json")  # raises, and says how it is damaged
    schema.check_version(manifest, f"{where}/run.json")
    if not (manifest.get("complete") or incomplete):
        raise InputError(f"run {run_id} in {url} is incomplete; run the same config again to finish it, or pass incomplete=True")
    return Run(where, manifest)


@dataclass(frozen=True, eq=False)
class Run:
    """A run's results. Arrays are opened on first use and read where they are indexed; `.load()` or `.values` fetches all of one.

    Args:
        url: the run's folder, <store>/runs/<id>.
        manifest: its run.json: configuration, versions, coverage, damping, timings, seeds, and what was reused.
    """

    url: str
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        shape = self.manifest.get("shape", {})
        state = "complete" if self.manifest.get("complete") else "incomplete"
        return (
            f"<Run {self.id} ({state}) of {self.manifest.get('problem')}: {', '.join(self.methods)}; "
            f"{shape.get('query', '?')} queries x {shape.get('train', '?')} training examples>"
        )

    @property
    def id(self) -> str:
        """The run's id: its folder's name."""
        return self.url.rpartition("/")[2]

    @property
    def store(self) -> str:
        """The URL of the store that holds the run."""
        return self.url.rpartition("/")[0].rpartition("/")[0]

    @property
    def methods(self) -> list[str]:
        """The labels of the methods, in the order of the configuration."""
        return [str(method) for method in self.manifest.get("methods", [])]

    @property
    def default_method(self) -> str:
        """The method that is meant where none is named: the last one of the configuration, after its baselines."""
        return self.methods[-1]

    @property
    def influence(self) -> xr.DataArray:
        """Scores (method, query, train), float32, lazily; coords query, train, query_label, train_label; attrs sign, units, damping.

        Raises:
            NotStored: only candidates were scored.
        """
        from tda.rows import whole

        return Scores(whole(self, self._results))

    @property
    def candidates(self) -> xr.Dataset:
        """Where only candidates were scored, their scores: influence (method, query, candidate), candidate_id (query, candidate), lazily.

        docs/candidates.md names its arrays. Raises NotStored where all training examples were scored.
        """
        from tda.rows import candidates

        return candidates(self)

    def influence_on(self, stage: str) -> xr.DataArray:
        """Scores (method, query, train) of another training set, such as "pretraining", as `influence` has them of the run's own.

        N, train and train_label are that set's. Lazily.

        Raises:
            NotStored: no method of the run attributes to it.
        """
        from tda.earlier import influence_on

        return influence_on(self, stage)

    @property
    def self_influence(self) -> xr.DataArray:
        """Scores (method, train) of each training example on its own loss, float32, lazily."""
        return Scores(self._array("self_influence", "self_influence = true"))

    @property
    def train_loss(self) -> xr.DataArray:
        """Loss (train,) of each training example at the checkpoint, nats, lazily."""
        return self._array("train_loss", "a run of this version of tda")

    @property
    def query_measurement(self) -> xr.DataArray:
        """Measurement f_q (query,) at the checkpoint, lazily."""
        return self._array("query_measurement", "a run of this version of tda")

    @cached_property
    def factors(self) -> xr.Dataset:
        """Spectra per layer, lazily: "<layer>.eigenvalues" (group, out, in), "<layer>.kfac_in", "<layer>.kfac_out", undamped.

        Where methods use several fits (two Fishers, say), names begin with the fit's key in the manifest: "<key>/<layer>.eigenvalues".

        Raises:
            NotStored: no method of the run has factors.
        """
        from tda.stored_spectra import spectra

        return spectra(self)

    @property
    def stderr(self) -> xr.DataArray:
        """Standard errors (method, query, train) of the influence, float32, lazily; NaN for methods without.

        Of an ensemble, over its models, whose spread holds what each of them sampled; of a single model, where a method samples (bif).

        Raises:
            NotStored: nothing of the run has an error estimate.
        """
        if "stderr" not in self._results:
            if "candidate_stderr" in self._results:
                raise NotStored(f"run {self.id} scored candidates only: run.candidates has their standard errors")
            known = ", ".join(self.methods)
            raise NotStored(f"run {self.id} has no stderr; ensemble = 2 or more, and methods that sample (bif), store it (it has {known})")
        return Scores(self._results["stderr"])

    def member(self, member: int) -> xr.DataArray:
        """Scores (method, query, train) of one model of an ensemble, counted from 0, float32, lazily; run.influence is their mean.

        Raises:
            InputError: the run has no such member.
        """
        count = self._ensemble
        if count == 1 or not 0 <= member < count:
            has = f"it has {count}, counted from 0" if count > 1 else "it is no ensemble; see `ensemble` in the configuration"
            raise InputError(f"run {self.id} has no member {member}; {has}")
        return Scores(_with_labels(lazy(self._open_group("members", str(member), "results.zarr")))["influence"])

    def solve(self, method: str, segment: int = 0, member: int | None = None) -> xr.Dataset:
        """How an iterative method's solve went: residual (step, query), relative, and evaluations (step,), products spent per query.

        segment: of methods that solve once per segment of the training. member: of an ensemble; the first when absent.

        Raises:
            NotStored: the method did not solve iteratively.
        """
        names = self.manifest.get("solves", {})
        if method not in names:
            known = ", ".join(names) or "none"
            raise NotStored(f"run {self.id} has no solve of {method!r}; cg, sni, astra and astra_source store it (it has {known})")
        folder = ("members", str(member or 0)) if self._ensemble > 1 else ()
        group = self._open_group(*folder, "solves.zarr")
        schema.check_version(group.attrs, str(group.store_path))
        found = group.get(f"{method}/{segment}")
        if not isinstance(found, zarr.Group):
            raise NotStored(f"run {self.id} has no solve {segment} of {method!r}")
        schema.validate(group, [f"{method}/{segment}/{name}" for name in ("residual", "evaluations")])
        return lazy(found)

    @property
    def trajectories(self) -> xr.Dataset:
        """`trajectories_of` the last method of the configuration that samples."""
        return self.trajectories_of()

    def trajectories_of(self, method: str | None = None, member: int = 0) -> xr.Dataset:
        """Losses along the chains of a method that samples, less those at the checkpoint, lazily; NaN where a chain was lost.

        docs/bif.md names arrays and attributes. Raises NotStored where the method does not sample, or none does.
        """
        from tda.sampled import trajectories

        return trajectories(self, method, member)

    def token_influence(
        self, query: int, train: Sequence[int], method: str | None = None, *, by_query_token: bool = False, member: int = 0
    ) -> xr.DataArray:
        """The influence of single tokens of training examples on a query, (train, train_token), computed now; sums are the sequence's.

        Under bif by the tokens whose loss it is, 0 where there is no label; under gradient methods by the tokens as inputs, from the
        problem itself. by_query_token: also by the query's tokens, taken alike, (train, train_token, query_token).

        Raises:
            NotStored: no losses of single tokens are stored, and the method has no directions; by_query_token, and it has no factors.
            InputError: no such query or training example.
        """
        from tda.sampled import token_influence

        return token_influence(self, query, train, method, member, by_query_token=by_query_token)

    @property
    def evaluation(self) -> xr.Dataset:
        """How the scores compare with retraining, lazily, by the latest `tda evaluate` of this run; docs/evaluation.md names its arrays.

        Raises:
            NotStored: the run was not evaluated.
        """
        from tda.evaluated import open_evaluation

        return open_evaluation(self.url)

    def top(self, query: int, k: int = 10, method: str | None = None, kind: Kind = "helpful", on: str | None = None) -> pd.DataFrame:
        """The k training examples that help or harm a query most.

        Helpful examples move the measurement in its better direction: where it is a loss, those with the most negative influence.
        Reads one row of the scores. Where only candidates were scored, they are ranked; `attrs["of"]` of the table says of how many.

        Args:
            query: the query's id.
            k: how many; fewer where there are fewer training examples.
            method: its label; the last one of the configuration when absent.
            kind: "helpful" or "harmful".
            on: another training set, such as "pretraining".

        Returns:
            Columns rank (from 1), train (id), label (where labels are integers), score; source (of candidates, such as "bm25, gold").

        Raises:
            InputError: no such query or method, or k or kind is none of those above.
            NotStored: no method of the run attributes to the set.
        """
        from tda.rows import top

        return top(self, query, k, method, kind, on)

    @property
    def better(self) -> Literal["lower", "higher"]:
        """The measurement's better direction: "lower" for a loss."""
        return "higher" if self.manifest.get("measurement", {}).get("better") == "higher" else "lower"

    @property
    def _ensemble(self) -> int:
        return int(self.manifest.get("config", {}).get("ensemble", 1))

    @cached_property
    def _results(self) -> xr.Dataset:
        return self.scored()

    def scored(self, *folder: str) -> xr.Dataset:
        """What results.zarr in a folder of the run holds, checked and lazily."""
        group = self._open_group(*folder, "results.zarr")
        present = set(group.array_keys())
        scores = {"candidate_influence", "candidate_id", "candidate_source"} if "candidate_id" in present else {"influence", "train"}
        required = scores | {"method", "query"}
        schema.validate(group, sorted(required | (present & set(schema.SPECS))))
        data = _with_labels(lazy(group))
        labels = [name for name in ("query_label", "train_label", "candidate_label", "candidate_id") if name in data]
        described = {key: self.manifest[key] for key in ("units", "damping", "measurement") if key in self.manifest}
        for name in ("influence", "self_influence", "stderr", "candidate_influence", "candidate_stderr"):
            if name in data:
                data[name].attrs.update(described)
        return data.set_coords(labels)

    def _array(self, name: str, source: str) -> xr.DataArray:
        if name not in self._results:
            if "candidate_id" in self._results:
                raise NotStored(f"run {self.id} has no {name}, since it scored candidates only: run.candidates has what there is")
            raise NotStored(f"run {self.id} has no {name}; {source} stores it")
        return self._results[name]

    def _open_group(self, *parts: str) -> zarr.Group:
        url = location.join(self.url, *parts)
        try:
            return location.open_group(url)
        except FileNotFoundError as error:
            raise InputError(
                f"run {self.id} has no {'/'.join(parts)}; it was interrupted early or deleted: run its config again"
            ) from error


def ranking(scores: np.ndarray[Any, Any], *, kind: Kind, better: Literal["lower", "higher"]) -> np.ndarray[Any, Any]:
    """Positions of `scores` (train,) from the most helpful (or harmful) on; ties by position, NaN left out."""
    ascending = (kind == "helpful") == (better == "lower")
    order = np.argsort(scores if ascending else -scores, kind="stable")  # NaN sorts last either way
    return order[: np.count_nonzero(~np.isnan(scores))]


def lazy(group: zarr.Group) -> xr.Dataset:
    """A group's arrays, of which only coordinates along their own dim are read now; attributes and numbers as they are stored."""
    return xr.open_dataset(xr.backends.ZarrStore(group, mode="r"), decode_cf=False, chunks=None)


def _with_labels(data: xr.Dataset) -> xr.Dataset:
    """Methods as plain strings: pandas and xarray select by them, whatever NumPy's string type of the day is."""
    return data.assign_coords(method=[str(label) for label in data["method"].to_numpy()])


def _manifests(store: str, prefix: str | None = None) -> dict[str, dict[str, Any]]:
    """run.json by run id, {} where it is damaged, of the runs whose id begins with `prefix` (or is it); no folder without one."""
    runs = location.join(store, "runs")
    names = [name for name in location.list_names(runs) if prefix is None or name.startswith(prefix)]
    if prefix in names:
        names = [prefix]
    found = location.read_json_many([location.join(runs, name, "run.json") for name in names])
    return {name: manifest for name, manifest in zip(names, found, strict=True) if manifest is not None}


def _latest(store: str, manifests: dict[str, dict[str, Any]], *, incomplete: bool) -> str:
    candidates = [name for name, manifest in manifests.items() if manifest.get("complete") or (incomplete and manifest)]
    if not candidates:
        damaged = [name for name, manifest in manifests.items() if not manifest]
        told = f", run.json of {', '.join(damaged)} is damaged" if damaged else ""
        unfinished = f" ({len(manifests)} incomplete{told})" if manifests else ""
        raise InputError(f"no complete run in {store}{unfinished}; `tda run CONFIG` makes one, or give another store")
    return max(candidates, key=lambda name: (str(manifests[name].get("created", "")), name))


def _by_prefix(store: str, prefix: str, manifests: dict[str, dict[str, Any]]) -> str:
    if len(manifests) == 1:
        return next(iter(manifests))
    if manifests:
        some = ", ".join(sorted(manifests)[:4])
        raise InputError(f"run {prefix!r} in {store} could be any of {len(manifests)}: {some}; give more of the id")
    raise InputError(f"no run {prefix!r} in {store}; `tda runs --store {store}` lists what is there")


def _row(run_id: str, manifest: dict[str, Any]) -> dict[str, Any]:
    shape = manifest.get("shape", {})
    return {
        "run": run_id,
        "created": manifest.get("created"),
        "complete": bool(manifest.get("complete")),
        "problem": manifest.get("problem") if manifest else "run.json is damaged",
        "methods": ", ".join(map(str, manifest.get("methods", []))),
        "train": shape.get("train"),
        "query": shape.get("query"),
        "reused": ", ".join(name for name, reused in manifest.get("reused", {}).items() if reused),
    }
