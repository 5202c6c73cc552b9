"""The page of a run that is read every morning: what helped and harmed which query, and how far to trust it.

One HTML file without scripts and without any request: pictures are data URIs, and its Content-Security-Policy forbids the rest.
Whatever comes from the data (texts, labels, names) is escaped: a training example may be hostile HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tasks.report_charts import histogram
from tasks.report_content import Content, Describes, described
from tasks.report_text import date, number, percent, seconds
from tda.results import NotStored, ranking

if TYPE_CHECKING:
    from collections.abc import Callable

    from tda.results import Kind, Run

    _Show = Callable[[Literal["train", "query"], int], Content]
    _Array = np.ndarray[Any, Any]

OUTLIERS = 12
MOST_SCORES = 4_000_000  # per method, in the histogram: 16 MB; of larger runs, some queries are drawn


def write_report(run: Run, problem: Describes, *, queries: int = 6, k: int = 5) -> bytes:
    """The report of a run as one self-contained HTML page, UTF-8.

    Args:
        run: an opened run; rows of its scores are read for the queries shown, and up to MOST_SCORES per method for the distribution.
        problem: describes its examples as image, text or dict.
        queries: how many are shown: those whose measurement is worst.
        k: how many helpful, and how many harmful examples are shown for each.
    """
    # An example may stand beside several queries and methods: each is described once.
    show = cache(partial(described, problem))
    page = {
        "run": run,
        "manifest": run.manifest,
        "created": date(run.manifest.get("created", "")),
        "measurement": run.manifest.get("measurement", {}).get("name", "measurement"),
        "queries": [_query(run, show, place, k) for place in _worst_queries(run, queries)],
        "methods": [_method(run, show, place) for place in range(len(run.methods))],
        "timings": _timings(run.manifest.get("timings", {})),
        "coverage": run.manifest.get("coverage", {}),
        "sampled_queries": len(_sampled_queries(run)),
    }
    environment = _environment()
    style = environment.get_template("report.css.j2").render(methods=range(len(run.methods)))
    # The policy admits this very style sheet by its digest: no style or script from the data could ever apply.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    html = environment.get_template("report.html.j2").render(page, style=Markup(style), style_digest=digest)  # noqa: S704  (our own file)
    return html.encode()


def _worst_queries(run: Run, count: int) -> list[int]:
    """Positions of the queries whose measurement is worst, the worst first; the first ones where it is not stored."""
    try:
        values = run.query_measurement.to_numpy()
    except NotStored:
        return list(range(min(count, run.influence.sizes["query"])))
    return [int(place) for place in ranking(values, kind="harmful", better=run.better)[:count]]


def _query(run: Run, show: _Show, place: int, k: int) -> dict[str, Any]:
    """One query with its most helpful and most harmful examples by every method; reads one row of the scores per method."""
    rows = run.influence[:, place]
    scores = rows.to_numpy()
    query = int(rows["query"])
    label = int(rows["query_label"]) if "query_label" in rows.coords else None
    return {
        "id": query,
        "label": label,
        "content": show("query", query),
        "measurement": _value(run, "query_measurement", place),
        "methods": [{kind: _ranked(run, show, row, label, kind, k) for kind in ("helpful", "harmful")} for row in scores],
    }


def _ranked(run: Run, show: _Show, scores: _Array, query_label: int | None, kind: Kind, k: int) -> list[dict[str, Any]]:
    order = ranking(scores, kind=kind, better=run.better)[:k]
    largest = float(np.nanmax(np.abs(scores), initial=0)) or 1.0
    examples = [_example(run, show, int(place), float(scores[place])) for place in order]
    for example in examples:
        example["weight"] = 100 * abs(example["score"]) / largest
        example["differs"] = query_label is not None and example["label"] not in (None, query_label)
    return examples


def _example(run: Run, show: _Show, place: int, score: float) -> dict[str, Any]:
    example = int(run.influence["train"][place])
    labels = run.influence.coords.get("train_label")
    return {"id": example, "label": None if labels is None else int(labels[place]), "content": show("train", example), "score": score}


def _method(run: Run, show: _Show, place: int) -> dict[str, Any]:
    """What the page says about one method: distributions, outliers, and the layers with their damping."""
    name = run.methods[place]
    own = _own_influence(run, place)
    outliers = ranking(-np.abs(own), kind="helpful", better="lower")[:OUTLIERS]
    return {
        "name": name,
        "scores": histogram(run.influence[place, _sampled_queries(run)].to_numpy()),
        "own": histogram(own),
        "outliers": [_example(run, show, int(i), float(own[i])) | {"loss": _value(run, "train_loss", int(i))} for i in outliers],
        "layers": _layers(run.manifest, name),
    }


def _own_influence(run: Run, place: int) -> _Array:
    try:
        return run.self_influence[place].to_numpy()
    except NotStored:
        return np.empty(0)


def _sampled_queries(run: Run) -> list[int]:
    """Positions of the queries in the histogram: all, or evenly drawn ones where all would be too many scores."""
    queries, train = run.influence.sizes["query"], run.influence.sizes["train"]
    count = min(queries, max(1, MOST_SCORES // max(1, train)))
    return [int(place) for place in np.linspace(0, queries - 1, count).round()]


def _value(run: Run, name: Literal["query_measurement", "train_loss"], place: int) -> float | None:
    """One stored number, or None where the run has no such array."""
    try:
        array = run.query_measurement if name == "query_measurement" else run.train_loss
    except NotStored:
        return None
    return float(array.load()[place])


def _layers(manifest: dict[str, Any], method: str) -> list[dict[str, Any]]:
    shares, damping = manifest.get("layer_share", {}).get(method, {}), manifest.get("damping", {}).get(method, {})
    layers = manifest.get("coverage", {}).get("layers", [])
    return [{**layer, "share": shares.get(layer["name"]), "damping": damping.get(layer["name"])} for layer in layers]


def _timings(timings: dict[str, Any]) -> dict[str, Any]:
    """Stages with their bars as percent of the longest, and the sums in seconds."""
    longest = max((float(t["wall"]) for t in timings.values()), default=0.0) or 1.0
    stages = [
        {
            "name": name,
            "wall": t["wall"],
            "compute": t["compute"],
            "wall_share": 100 * t["wall"] / longest,
            "compute_share": 100 * min(t["compute"], t["wall"]) / longest,
        }
        for name, t in timings.items()
    ]
    return {"stages": stages, "wall": sum(s["wall"] for s in stages), "compute": sum(s["compute"] for s in stages)}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "score": partial(number, padded=True), "seconds": seconds, "percent": percent, "pretty": _pretty}
    return environment


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
