"""The arrays, the league table and the page of an evaluation of fact tracing, written once its ranks are all there."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np
import xarray as xr

from infra import storage
from tasks import layout
from tasks.evaluate_charts import Curve, Entry, Plot, forest, plot, told
from tasks.evaluate_page import rendered
from tasks.report_text import date
from tasks.tracing import NEAREST, Found, Tracing, choose, documents_of, gold_of
from tda import location, schema
from tda.evaluated import read_results
from tda.evaluation import tracing
from tda.evaluation.lds import interval

METRICS = {"mrr": "MRR", "recall": f"Recall@{NEAREST}", "behind": "behind the best", "mrr_by_seed": "MRR, least and most of the trainings"}
STATISTICS = ("estimate", "low", "high")
_Array = np.ndarray[Any, Any]


def publish(job: Tracing, found: Found, created: str, wall: float) -> None:
    """Write arrays, table, page and manifest; the manifest last. wall: seconds that all of it took."""
    arrays = arrays_of(job, found)
    url = location.join(job.url, "results.zarr")
    group = location.open_group(url, "a")
    run_id = job.run.rpartition("/")[2]
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, "run_id": run_id})
    for name, values in arrays.items():
        array = layout.ensure_array(group, name, values.shape, None, None, "str" if values.dtype.kind == "U" else None)
        array[...] = values
    location.seal(url)
    schema.validate(group, sorted(group.array_keys()))
    storage.write_bytes(location.join(job.url, "league.csv"), _csv(arrays).encode())
    manifest = manifest_of(job, found, arrays, created, wall)
    storage.write_bytes(location.join(job.url, "report.html"), page(read_results(job.url).load(), manifest))
    complete(job, manifest)


def complete(job: Tracing, manifest: dict[str, Any]) -> None:
    """Mark the folder complete, then point the run at it."""
    storage.write_json(location.join(job.url, "complete.json"), manifest)
    storage.write_json(location.join(job.run, "evaluation.json"), manifest)
    storage.sweep(job.url)


def manifest_of(job: Tracing, found: Found, arrays: dict[str, _Array], created: str, wall: float) -> dict[str, Any]:
    """evaluation.json of a run."""
    ids = gold_of(job)
    documents = documents_of(job)
    mrr, recall = tracing.expected_at_random([each for each, t in zip(ids, found.tuning, strict=True) if not t], documents, NEAREST)
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "kind": "tracing",
        "folder": job.url.rpartition("/")[2],
        "created": created,
        "run": job.run.rpartition("/")[2],
        "runs": {row.label: [url.rpartition("/")[2] for url in row.runs] for row in job.rows},
        "problem": job.problem[0],
        "corpus": job.corpus[0],
        "options": job.told,
        "seeds": list(job.seeds),
        "documents": documents,
        "gold": float(np.mean([len(each) for each in ids])),
        "chosen": arrays["method"][arrays["chosen"]].tolist(),
        "queries": {"tuning": int(found.tuning.sum()), "reported": int((~found.tuning).sum()), "all": len(ids)},
        "chance": {"mrr": mrr, "recall": recall},
        "answer": [float(row[~found.tuning].mean()) for row in found.answer],
        "seconds": wall,
        "notes": [],
    }


def arrays_of(job: Tracing, found: Found) -> dict[str, _Array]:
    """Everything that is stored, by the names of the schema."""
    told, some = job.told, ~found.tuning
    families = [row.family for row in job.rows]
    draws = tracing.bootstrap_queries(1 / found.rank[..., some], draws=told["draws"], seed=told["seed"])
    shares = tracing.bootstrap_queries(found.recall[..., some], draws=told["draws"], seed=told["seed"])
    chosen = choose(families, (1 / found.rank).mean(1), found.tuning)
    table = np.full((len(families), len(METRICS), len(STATISTICS)), np.nan)
    means = (1 / found.rank[..., some]).mean(-1)
    best = max(chosen, key=lambda m: float(means[m].mean()))
    for m in range(len(families)):
        gap = float(means[best].mean() - means[m].mean())
        table[m, 0] = _told(draws[m], float(means[m].mean()), 0.0)
        table[m, 1] = _told(shares[m], float(found.recall[m][:, some].mean()), 0.0)
        table[m, 2] = _told(draws[best] - draws[m], gap, -1.0)
        table[m, 3] = means[m].mean(), means[m].min(), means[m].max()
    return {
        "method": np.array([row.label for row in job.rows]),
        "query": np.arange(len(some)),
        "run_seed": np.array(job.seeds, np.int64),
        "metric": np.array(list(METRICS)),
        "statistic": np.array(STATISTICS),
        "gold_rank": found.rank,
        "gold_recall": found.recall,
        "answer": found.answer,
        "tuning_query": found.tuning,
        "chosen": np.isin(np.arange(len(families)), chosen),
        "family": np.array(families),
        "damping": np.array([row.damping for row in job.rows]),
        "at": np.array([row.at for row in job.rows]),
        "tracing": table,
    }


def _told(draws: _Array, estimate: float, least: float) -> tuple[float, float, float]:
    bounds = interval(draws, estimate, within=1.0)
    return estimate, max(bounds.low, least), bounds.high


def _csv(arrays: dict[str, _Array]) -> str:
    """One row per method, the best first."""
    columns = ["method", "family", "chosen", "damping", "at", *(f"{name}{suffix}" for name in METRICS for suffix in ("", "_low", "_high"))]
    into = io.StringIO()
    writer = csv.writer(into, lineterminator="\n")
    writer.writerow([*columns, *(f"mrr_seed_{seed}" for seed in arrays["run_seed"].tolist())])
    table, means = arrays["tracing"], (1 / arrays["gold_rank"][..., ~arrays["tuning_query"]]).mean(-1)
    for m in np.argsort(-table[:, 0, 0], kind="stable").tolist():
        head = [arrays["method"][m], arrays["family"][m], bool(arrays["chosen"][m]), arrays["damping"][m], arrays["at"][m]]
        writer.writerow([*head, *(f"{v:.6g}" for v in (*table[m].ravel(), *means[m]))])
    return into.getvalue()


def page(data: xr.Dataset, manifest: dict[str, Any]) -> bytes:
    """The page as UTF-8 HTML. data: of `read_results`."""
    order = ordered(data)
    rows = [row_of(data, m) for m in order]
    charts = [forest(title, [_entry(data, m, name) for m in order]) for name, title in list(METRICS.items())[:2]]
    content = {
        "manifest": manifest,
        "created": date(manifest["created"]),
        "rows": rows,
        "charts": charts,
        "sweep": _sweep(data),
        "nearest": NEAREST,
    }
    return rendered("tracing.html.j2", content)


def ordered(data: xr.Dataset) -> list[int]:
    """The compared methods, the best mean reciprocal rank first."""
    order = np.argsort(-data["tracing"].sel(metric="mrr", statistic="estimate").to_numpy(), kind="stable")
    return [m for m in order.tolist() if bool(data["chosen"][m])]


def row_of(data: xr.Dataset, m: int) -> dict[str, str]:
    """A row of the league table, as it is shown."""
    family, damping = str(data["family"][m].item()), str(data["damping"][m].item())
    tried = int((data["family"] == family).sum())
    least, most = (float(data["tracing"][m].sel(metric="mrr_by_seed", statistic=s)) for s in ("low", "high"))
    return {
        "name": family,
        "damping": f"{damping} (of {tried})" if tried > 1 else damping,
        "mrr": told(_entry(data, m, "mrr")),
        "seeds": f"{least:.3f} to {most:.3f}",
        "recall": told(_entry(data, m, "recall")),
        "behind": told(_entry(data, m, "behind")) if float(data["tracing"][m].sel(metric="behind", statistic="estimate")) else "",
    }


def _entry(data: xr.Dataset, m: int, metric: str) -> Entry:
    estimate, low, high = (float(v) for v in data["tracing"][m].sel(metric=metric))
    return Entry(str(data["family"][m].item()), estimate, low, high)


def _sweep(data: xr.Dataset) -> Plot | None:
    """Mean reciprocal rank by damping of every family that was swept."""
    families = [str(family) for family in data["family"].to_numpy()]
    curves = []
    for colour, family in enumerate(dict.fromkeys(f for f in families if families.count(f) > 1)):
        places = sorted((lam, m) for m, f in enumerate(families) if f == family and (lam := _number(str(data["damping"][m].item()))) > 0)
        if places:
            entries = [_entry(data, m, "mrr") for _, m in places]
            curves.append(Curve(family, [lam for lam, _ in places], entries, colour=colour))
    return plot("", curves, "damping") if curves else None


def _number(damping: str) -> float:
    """0 where it is none."""
    try:
        found = float(damping)
    except ValueError:
        return 0.0
    return found if math.isfinite(found) else 0.0
