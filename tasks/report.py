"""The page of a run that is read every morning: what helped and harmed which query, and how far to trust it.

One HTML file without scripts and without any request: pictures are data URIs, and its Content-Security-Policy forbids the rest.
Whatever comes from the data (texts, labels, names) is escaped: a training example may be hostile HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tasks.report_charts import histogram
from tasks.report_content import Describes, Split, described
from tasks.report_sampling import sampled
from tasks.report_stages import Stages
from tasks.report_text import date, number, percent, seconds
from tasks.report_tokens import HeatMap, Parting, Speaks, heat_map
from tasks.templates import TEMPLATES
from tda.results import NotStored, ranking
from tda.rows import Row, Rows, rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tda.results import Kind, Run

    class Shows(Describes, Speaks, Protocol):
        """The part of a problem that the page needs."""

    _Examples = Callable[[int], dict[str, Any]]
    _Heat = Callable[[int, int, list[int]], HeatMap | None]
    _Array = np.ndarray[Any, Any]

OUTLIERS = 12
HEATED = 2  # examples at each end of a query's ranking whose tokens are shown
MOST_SCORES = 4_000_000  # per method, in the histogram: 16 MB; of larger runs, some queries are drawn


def write_report(
    run: Run,
    problem: Shows,
    *,
    queries: int = 6,
    k: int = 5,
    stages: Mapping[str, Describes] | None = None,
    parting: Parting | None = None,
) -> bytes:
    """The report of a run as one self-contained HTML page, UTF-8.

    Args:
        run: an opened run; rows of its scores are read for the queries shown, and up to MOST_SCORES per method for the distribution.
        problem: describes its examples as image, text or dict, and names tokens where a method scores them.
        queries: how many are shown: those whose measurement is worst.
        k: how many helpful, and how many harmful examples are shown for each.
        stages: what describes the examples of earlier stages, by name.
        parting: what single tokens add to scores of gradient methods, where that is known.
    """
    scored = rows(run)
    asked, train = _examples(run, scored, problem, "query"), _examples(run, scored, problem, "train")
    earlier = Stages(run, stages or {})
    heat = partial(heat_map, run, problem, parting=parting)
    page = {
        "run": run,
        "manifest": run.manifest,
        "created": date(run.manifest.get("created", "")),
        "measurement": run.manifest.get("measurement", {}).get("name", "measurement"),
        "queries": [_query(run, scored, heat, asked(place), train, earlier, place, k) for place in _worst_queries(run, scored, queries)],
        "stages": earlier.facts,
        "methods": [_method(run, scored, train, place) for place in range(len(run.methods))],
        "timings": _timings(run.manifest.get("timings", {})),
        "coverage": run.manifest.get("coverage", {}),
        "fingerprints": _shortened(run.manifest.get("fingerprints", {})),
        "sampled_queries": len(_sampled_queries(scored)),
        "sizes": run.manifest["shape"],
        "opens": "candidates" if scored.sparse else "influence",
    }
    environment = _environment()
    style = environment.get_template("report.css.j2").render(methods=range(len(run.methods)))
    # The policy admits this very style sheet by its digest: no style or script from the data could ever apply.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    html = environment.get_template("report.html.j2").render(page, style=Markup(style), style_digest=digest)  # noqa: S704  (our own file)
    return html.encode()


def _examples(run: Run, scored: Rows, problem: Describes, split: Split) -> _Examples:
    """A function from an example's id to what the page says about it; each is described once, however often it stands.

    Ids count from 0, so they are places too. Labels and values (measurement or loss) are read here, whole: they are short, and one by one
    each would be a request. Of candidates, labels come with the rows.
    """
    labels = scored.data.coords.get(f"{split}_label")
    known = None if labels is None else labels.to_numpy()
    values = _stored(run, "query_measurement" if split == "query" else "train_loss")

    @cache
    def example(i: int) -> dict[str, Any]:
        return {
            "id": i,
            "label": None if known is None else int(known[i]),
            "value": None if values is None else float(values[i]),
            "content": described(problem, split, i),
        }

    return example


def _stored(run: Run, name: str) -> _Array | None:
    """An array of one number per example, or None where the run has none."""
    try:
        return np.asarray(getattr(run, name))
    except NotStored:
        return None


def _worst_queries(run: Run, scored: Rows, count: int) -> list[int]:
    """Positions of the queries whose measurement is worst, the worst first; the first ones where it is not stored."""
    values = _stored(run, "query_measurement")
    if values is None:
        return list(range(min(count, len(scored.queries))))
    return [int(place) for place in np.argsort(values if run.better == "higher" else -values, kind="stable")[:count]]


def _query(
    run: Run,
    scored: Rows,
    heat: Callable[..., HeatMap | None],
    query: dict[str, Any],
    train: _Examples,
    earlier: Stages,
    place: int,
    k: int,
) -> dict[str, Any]:
    """One query with its most helpful and most harmful examples by every method; reads one row of the scores per method."""
    methods: list[dict[str, Any]] = []
    every = scored.of(place)
    for m in range(len(scored.methods)):
        row = replace(every, score=every.score[m])
        found: dict[str, Any] = {kind: _ranked(run, query, train, row, kind, k) for kind in ("helpful", "harmful")}
        shown = [example["id"] for kind in ("helpful", "harmful") for example in found[kind][:HEATED]]
        stages = earlier.of(run.methods[m], place, lambda shows, row, kind: _ranked(run, query, shows, row, kind, k))
        methods.append(found | {"of": row.of, "heat": heat(m, query["id"], shown), "stages": stages})
    return query | {"methods": methods}


def _ranked(run: Run, query: dict[str, Any], train: _Examples, row: Row, kind: Kind, k: int) -> list[dict[str, Any]]:
    largest = float(np.abs(np.nan_to_num(row.score)).max(initial=0)) or 1.0
    found = []
    for place in ranking(row.score, kind=kind, better=run.better)[:k].tolist():
        label, score = None if row.label is None else int(row.label[place]), row.score[place]
        shown = train(int(row.train[place])) | {"label": label, "differs": label != query["label"]}
        found.append(shown | {"score": score, "weight": 100 * abs(score) / largest})
    return found


def _method(run: Run, scored: Rows, train: _Examples, place: int) -> dict[str, Any]:
    """What the page says about one method: distributions, outliers, and the layers with their damping."""
    own = _own_influence(run, place)
    outliers = ranking(-np.abs(own), kind="helpful", better="lower")[:OUTLIERS].tolist()
    return {
        "name": run.methods[place],
        "scores": histogram(scored.data[place, _sampled_queries(scored)].to_numpy()),
        "own": histogram(own),
        "outliers": [train(i) | {"score": own[i]} for i in outliers],
        "layers": _layers(run.manifest, run.methods[place]),
        "unit": _unit(run, place),
        "cosine": _unit(run, place).startswith("cosine"),
        "solve": run.manifest.get("solves", {}).get(run.methods[place]),
        "sampling": sampled(run, place),
        "separable": run.manifest.get("separable_errors", {}).get(run.methods[place]),
    }


def _own_influence(run: Run, place: int) -> _Array:
    try:
        own = run.self_influence[place].to_numpy()
    except NotStored:
        return np.empty(0)
    return own if np.isfinite(own).any() else np.empty(0)  # methods that would need a solve for each example have none


def _sampled_queries(scored: Rows) -> list[int]:
    """Positions of the queries in the histogram: all, or evenly drawn ones where all would be too many scores."""
    _, queries, train = scored.data.shape
    count = min(queries, max(1, MOST_SCORES // max(1, train)))
    return [int(place) for place in np.linspace(0, queries - 1, count).round()]


def _layers(manifest: dict[str, Any], method: str) -> list[dict[str, Any]]:
    shares, damping = manifest.get("layer_share", {}).get(method, {}), manifest.get("damping", {}).get(method, {})
    layers = manifest.get("coverage", {}).get("layers", [])
    return [{**layer, "share": shares.get(layer["name"]), "damping": damping.get(layer["name"])} for layer in layers]


def _unit(run: Run, place: int) -> str:
    units = run.manifest.get("units", "")
    return str(units.get(run.methods[place], "") if isinstance(units, dict) else units)


def _shortened(fingerprints: dict[str, Any]) -> dict[str, Any]:
    """Digests by their first characters; the manifest has the whole."""
    return {name: _shortened(value) if isinstance(value, dict) else str(value)[:12] for name, value in fingerprints.items()}


def _timings(timings: dict[str, Any]) -> dict[str, Any]:
    """Stages with their bars as percent of the longest, and "total": the run's own where it states one, else the sum."""
    stages = {name: timing for name, timing in timings.items() if name != "total"}
    total = timings.get("total") or {kind: sum(timing[kind] for timing in stages.values()) for kind in ("wall", "compute")}
    longest = max((timing["wall"] for timing in stages.values()), default=0.0) or 1.0
    rows = [{"name": name, **timing, "wall_share": 100 * timing["wall"] / longest} for name, timing in stages.items()]
    return {"stages": rows, "total": total}


def _environment() -> Environment:
    environment = Environment(loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number,
        "score": partial(number, padded=True),
        "seconds": seconds,
        "percent": percent,
        "pretty": _pretty,
    }
    return environment


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
