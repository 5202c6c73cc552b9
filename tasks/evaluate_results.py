"""The arrays, the league table and the manifest of an evaluation, written once its numbers are all there."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr

from infra import storage
from tasks import layout
from tasks.evaluate import Evaluation, Given, Numbers, ceilings, given
from tasks.evaluate_cost import compute_seconds
from tda import location, schema
from tda.evaluation.checks import auc, mean_interval
from tda.evaluation.lds import interval
from tda.results import Run

_Array = np.ndarray[Any, Any]
#: estimate, low, high
Told = tuple[float, float, float]
STATISTICS = ("estimate", "low", "high")
#: What the league table compares, by the name of its columns, with what a reader sees.
METRICS = {
    "lds": "LDS",
    "behind": "behind the best",
    "of_ceiling": "share of the ceiling",
    "single_lds": "LDS of one model",
    "tuning_lds": "LDS on tuning queries",
    "leave_one_out": "leave-one-out",
    "mislabelled_auc": "mislabelled, AUC",
    "mislabelled_precision": "mislabelled, precision",
    "retrieval": "class retrieval",
    "randomised": "untrained model",
    "harm": "harm of removal",
}
_NAN = float("nan")


@dataclass(frozen=True)
class Found:
    """Everything that an evaluation has computed.

    chosen: positions of the methods compared. harm (curve, share, asked) with its coordinates, and randomised (method, query), where they
    were asked for.
    """

    numbers: Sequence[Numbers]
    chosen: Sequence[int]
    removal: dict[str, _Array] = field(default_factory=dict)
    randomised: _Array | None = None


def write_results(job: Evaluation, found: Found) -> None:
    """Write results.zarr and league.csv of an evaluation."""
    known = given(job)
    arrays = _arrays(job, known, found)
    url = location.join(job.url, "results.zarr")
    group = location.open_group(url, "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, "run_id": known.run.id})
    for name, values in arrays.items():
        _write(group, name, values)
    location.seal(url)
    schema.validate(group, sorted(group.array_keys()))
    storage.write_bytes(location.join(job.url, "league.csv"), _csv(arrays).encode())


def _write(group: zarr.Group, name: str, values: _Array) -> None:
    array = layout.ensure_array(group, name, values.shape, None, None, "str" if values.dtype.kind == "U" else None)
    array[...] = values


def _arrays(job: Evaluation, known: Given, found: Found) -> dict[str, _Array]:
    run, numbers = known.run, found.numbers
    lds = np.stack([each["lds"] for each in numbers])
    draws = np.stack([each["lds_draws"] for each in numbers])
    arrays = {
        "method": np.array(run.methods),
        "query": np.arange(lds.shape[2]),
        "alpha": np.array(known.truth.alphas),
        "bound": np.array([0.025, 0.975]),
        "metric": np.array(list(METRICS)),
        "statistic": np.array(STATISTICS),
        "lds": lds,
        "lds_draws": draws,
        "interval": _intervals(draws, lds[..., known.reported].mean(-1)),
        "tuning_query": known.tuning,
        "chosen": np.isin(np.arange(len(numbers)), found.chosen),
        "family": np.array(job.families),
        "damping": np.array([_damping(run, method) for method in run.methods]),
        "seconds": compute_seconds(run),
    }
    if "member_lds" in numbers[0]:
        arrays["member_lds"] = np.stack([each["member_lds"] for each in numbers], 1)
    if known.alone is not None:
        arrays |= {"left_out": known.left_out, "effect": known.effects}
        arrays["leave_one_out"] = np.stack([each["leave_one_out"] for each in numbers])
    if "retrieval" in numbers[0]:
        arrays["retrieval"] = np.stack([each["retrieval"] for each in numbers])
    if known.wrong is not None:
        nothing = np.full(len(known.inspected), np.nan)
        arrays |= {"inspected": known.inspected}
        arrays["mislabelled_precision"] = np.stack([each.get("mislabelled_precision", nothing) for each in numbers])
    if found.randomised is not None:
        arrays["randomised"] = found.randomised
    arrays |= found.removal | ceilings(job)
    return arrays | {"league": _league(arrays, known, found)}


def _intervals(draws: _Array, means: _Array) -> _Array:
    """(method, alpha, bound)."""
    rows = np.empty((*means.shape, 2))
    for place in np.ndindex(*means.shape):
        bounds = interval(draws[place], float(means[place]), within=1.0)
        rows[place] = bounds.low, bounds.high
    return rows


def _damping(run: Run, method: str) -> str:
    """As configured: a number, "heuristic", or nothing."""
    damping = run.influence.attrs.get("damping", {})
    used = damping.get(method) if isinstance(damping, dict) else None
    configured = _configured(run).get(method)
    said = configured if configured is not None else used
    return "" if said is None or isinstance(said, dict) else (said if isinstance(said, str) else f"{said:g}")


def _configured(run: Run) -> dict[str, Any]:
    from tda.methods import parse_all
    from tda.methods.sweep import expand

    methods = parse_all([swept.table for swept in expand(run.manifest["config"]["methods"])])
    return {method.title: getattr(method, "damping", None) for method in methods}


def _league(arrays: dict[str, _Array], known: Given, found: Found) -> _Array:
    """(method, alpha, metric, statistic)."""
    methods, alphas = arrays["lds"].shape[:2]
    table = np.full((methods, alphas, len(METRICS), len(STATISTICS)), np.nan)
    for a in range(alphas):
        means = arrays["lds"][:, a][:, known.reported].mean(1)
        best = max(found.chosen, key=lambda m, means=means: float(means[m]))  # type: ignore[misc]
        for m in range(methods):
            told = _lds_metrics(arrays, known, m, a, best) | _other_metrics(arrays, known, found, m)
            for name, values in told.items():
                table[m, a, list(METRICS).index(name)] = values
    return table


def _lds_metrics(arrays: dict[str, _Array], known: Given, m: int, a: int, best: int) -> dict[str, Told]:
    some, lds, draws = known.reported, arrays["lds"], arrays["lds_draws"]
    mean = float(lds[m, a, some].mean())
    low, high = (float(v) for v in arrays["interval"][m, a])
    top = float(arrays["mean_ceiling"][a, 0])
    behind = float(lds[best, a, some].mean()) - mean
    apart = interval(draws[best, a] - draws[m, a], behind)
    told: dict[str, Told] = {"lds": (mean, low, high), "behind": (behind, apart.low, apart.high)}
    if top > 0:
        told["of_ceiling"] = (mean / top, low / top, high / top)
    if known.tuning.any():
        told["tuning_lds"] = (float(lds[m, a, known.tuning].mean()), _NAN, _NAN)
    if "member_lds" in arrays:
        told["single_lds"] = (float(arrays["member_lds"][:, m, a][:, some].mean()), _NAN, _NAN)
    return told


def _other_metrics(arrays: dict[str, _Array], known: Given, found: Found, m: int) -> dict[str, Told]:
    """What does not depend on alpha."""
    numbers, some = found.numbers[m], known.reported
    told: dict[str, Told] = {}
    if "leave_one_out" in numbers:
        low, high = (float(v) for v in numbers["leave_one_out_bounds"])
        told["leave_one_out"] = (float(numbers["leave_one_out"][some].mean()), low, high)
    if "mislabelled_auc" in numbers:
        auc, low, high = (float(v) for v in numbers["mislabelled_auc"])
        told |= {"mislabelled_auc": (auc, low, high), "mislabelled_precision": (float(numbers["mislabelled_precision"][-1]), _NAN, _NAN)}
    for name in ("retrieval", "randomised"):
        if name in arrays and np.isfinite(arrays[name][m]).all():
            told[name] = _mean(arrays[name][m, some])
    if "harm" in arrays and arrays["method"][m] in arrays["curve"]:
        curve = arrays["curve"].tolist().index(arrays["method"][m])
        told["harm"] = _mean(arrays["harm"][curve].mean(0))
    return told


def _mean(values: _Array) -> Told:
    bounds = mean_interval(values)
    return float(values.mean()), bounds.low, bounds.high


def _csv(arrays: dict[str, _Array]) -> str:
    """One row per method and alpha; the best of all first."""
    columns = ["method", "family", "chosen", "damping", "alpha", "seconds"]
    columns += [f"{name}{suffix}" for name in METRICS for suffix in ("", "_low", "_high")]
    into = io.StringIO()
    writer = csv.writer(into, lineterminator="\n")
    writer.writerow(columns)
    league = arrays["league"]
    for a, alpha in enumerate(arrays["alpha"].tolist()):
        for m in np.argsort(-league[:, a, 0, 0], kind="stable").tolist():
            head = [arrays["method"][m], arrays["family"][m], bool(arrays["chosen"][m]), arrays["damping"][m], alpha]
            values = [arrays["seconds"][m], *league[m, a].ravel()]
            writer.writerow([*head, *("" if np.isnan(v) else f"{v:.6g}" for v in values)])
    return into.getvalue()


def manifest(job: Evaluation, found: Found, created: str, timings: dict[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """evaluation.json of a run."""
    known = given(job)
    truth = known.truth
    alphas, subsets, seeds, queries = truth.measurement.shape
    alone = location.read_json(location.join(job.truth, "complete.json"))["alone"]
    told: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION,
        "folder": job.url.rpartition("/")[2],
        "created": created,
        "run": known.run.id,
        "retraining": job.truth.rpartition("/")[2],
        "options": job.told,
        "chosen": [known.run.methods[m] for m in found.chosen],
        "retrained": {"models": alphas * subsets * seeds, "subsets": subsets, "seeds": seeds, "one_by_one": alone},
        "queries": {"tuning": int(known.tuning.sum()), "reported": int(known.reported.sum()), "all": queries},
        "mislabelled": {},
        "timings": timings,
        "notes": list(notes),
    }
    if known.wrong is not None:
        told["mislabelled"] = {"wrong": int(known.wrong.sum()), "share": float(known.wrong.mean()), "auc_of_loss": _auc_of_loss(known)}
    told["notes"] += _not_finite(job, found)
    if alone:
        told["notes"].append(f"models were retrained one by one: {alone}")
    if seeds < 2:
        told["notes"].append("one model per subset: the noise of retraining is not known, and there is no ceiling")
    return told


def _not_finite(job: Evaluation, found: Found) -> list[str]:
    """A note for each method whose self-influence finds no wrong labels because it has no value somewhere."""
    return [
        f"the self-influence of {given(job).run.methods[m]} is not finite for {len(numbers['not_finite'])} training examples, the first of "
        f"which is {int(numbers['not_finite'][0])}: it is not held against the wrong labels"
        for m, numbers in enumerate(found.numbers)
        if "not_finite" in numbers
    ]


def _auc_of_loss(known: Given) -> float:
    """What the training loss alone finds: a mislabelled example that the model has not learnt has a large one."""
    assert known.wrong is not None
    loss = known.run.train_loss.to_numpy()
    return float(auc(loss[known.wrong], loss[~known.wrong]))


def complete(job: Evaluation, manifest: dict[str, Any]) -> None:
    """Mark the folder complete, then point the run at it; drop what is no longer needed."""
    storage.write_json(location.join(job.url, "complete.json"), manifest)
    storage.write_json(location.join(job.run, "evaluation.json"), manifest)
    storage.delete_tree(location.join(job.url, "parts"))
    storage.sweep(job.url)
