"""The page of an evaluation: one HTML file without scripts and without any request."""

from __future__ import annotations

import base64
import hashlib
import math
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from infra import storage
from tasks.evaluate import Evaluation, Given, given
from tasks.evaluate_charts import Curve, Entry, Plot, forest, plot, told
from tasks.evaluate_results import METRICS
from tasks.report_text import date, number, percent, seconds
from tasks.templates import TEMPLATES
from tda import location
from tda.evaluated import read_results
from tda.evaluation.checks import chance

#: Metrics of the table of checks, in its order.
CHECKS = ("leave_one_out", "harm", "mislabelled_auc", "mislabelled_precision", "retrieval", "randomised")


def write_page(job: Evaluation, manifest: dict[str, Any]) -> None:
    """Write report.html of an evaluation whose arrays are all there."""
    storage.write_bytes(location.join(job.url, "report.html"), page(read_results(job.url).load(), given(job), manifest))


def page(data: xr.Dataset, known: Given, manifest: dict[str, Any]) -> bytes:
    """The page as UTF-8 HTML. data: of `read_results`."""
    league = data["league"]
    alphas = [float(alpha) for alpha in data["alpha"]]
    tops = [float(top) for top in data["mean_ceiling"].sel(statistic="estimate")]
    order = [m for m in np.argsort(-league[:, 0, 0, 0].to_numpy(), kind="stable").tolist() if bool(data["chosen"][m])]
    content = {
        "manifest": manifest,
        "run": known.run,
        "created": date(manifest["created"]),
        "measurement": known.run.manifest.get("measurement", {}).get("name", "measurement"),
        "alphas": alphas,
        "ceilings": tops,
        "best": _entry(league[order[0], 0], str(data["family"][order[0]].item()), "lds"),
        "leagues": [_forest(data, order, a, tops[a]) for a in range(len(alphas))],
        "rows": [_row(data, m, a) for a in range(len(alphas)) for m in _sorted(league, order, a)],
        "ensemble": "member_lds" in data,
        "sweeps": [found for a in range(len(alphas)) if (found := _sweep(data, known, a, tops[a])) is not None],
        "costs": _costs(data, order, tops[0]),
        "by_alpha": _by_alpha(data, order) if len(alphas) > 1 else None,
        "removal": _removal(data, order) if "harm" in data else None,
        "checks": _checks(data, order),
        "check_names": METRICS,
        "retrieval_chance": _chance(known),
        "inspected": [int(k) for k in data["inspected"]] if "inspected" in data else [],
        "alone_ceiling": _alone_ceiling(data),
        "left_out": data.sizes.get("left_out", 0),
    }
    return rendered("evaluate.html.j2", content)


def rendered(template: str, content: dict[str, Any]) -> bytes:
    """A page of evaluations, with their style sheet."""
    environment = _environment()
    style = "".join(environment.get_template(name).render(methods=[]) for name in ("report.css.j2", "decompose.css.j2", "evaluate.css.j2"))
    # The policy admits this very style sheet by its digest: no style or script from the data could ever apply.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    html = environment.get_template(template).render(content, style=Markup(style), style_digest=digest)  # noqa: S704  (our own)
    return html.encode()


def _sorted(league: xr.DataArray, order: list[int], a: int) -> list[int]:
    return sorted(order, key=lambda m: -float(league[m, a, 0, 0]))


def _entry(row: xr.DataArray, name: str, metric: str, hollow: float = math.nan) -> Entry:
    estimate, low, high = (float(v) for v in row.sel(metric=metric))
    return Entry(name, estimate, low, high, hollow)


def _forest(data: xr.Dataset, order: list[int], a: int, top: float) -> Any:
    league = data["league"]
    entries = []
    for m in _sorted(league, order, a):
        single = float(league[m, a].sel(metric="single_lds", statistic="estimate"))
        entries.append(_entry(league[m, a], str(data["family"][m].item()), "lds", single))
    return forest(f"alpha = {float(data['alpha'][a]):g}", entries, top)


def _row(data: xr.Dataset, m: int, a: int) -> dict[str, Any]:
    """A row of the league table."""
    row, family = data["league"][m, a], str(data["family"][m].item())
    tried = int((data["family"] == family).sum())
    return {
        "alpha": float(data["alpha"][a]),
        "name": family,
        "damping": str(data["damping"][m].item()),
        "tried": tried,
        "lds": told(_entry(row, family, "lds")),
        "of_ceiling": float(row.sel(metric="of_ceiling", statistic="estimate")),
        "behind": told(_entry(row, family, "behind")) if float(row.sel(metric="behind", statistic="estimate")) else "",
        "single": float(row.sel(metric="single_lds", statistic="estimate")),
        "seconds": float(data["seconds"][m]),
    }


def _sweep(data: xr.Dataset, known: Given, a: int, top: float) -> Plot | None:
    """LDS by damping of every family that was swept, on the reported queries (lines) and on the tuning ones (dashed)."""
    league, families = data["league"], [str(family) for family in data["family"].to_numpy()]
    curves = []
    for colour, family in enumerate(dict.fromkeys(f for f in families if families.count(f) > 1)):
        places = [(lam, m) for m, f in enumerate(families) if f == family and (lam := _lambda(data, known, m)) > 0]
        places.sort()
        if not places:
            continue
        xs = [lam for lam, _ in places]
        ring = frozenset(i for i, (_, m) in enumerate(places) if not _plain(data, m))
        named = [f"{family}, damping {data['damping'][m].item()}" for _, m in places]
        told = [_entry(league[m, a], name, "lds") for (_, m), name in zip(places, named, strict=True)]
        tuned = [
            Entry(f"{name}, tuning queries", float(league[m, a].sel(metric="tuning_lds", statistic="estimate")), math.nan, math.nan)
            for (_, m), name in zip(places, named, strict=True)
        ]
        curves += [Curve("", xs, tuned, dashed=True, colour=colour), Curve(family, xs, told, ring, colour=colour)]
    return plot(f"alpha = {float(data['alpha'][a]):g}", curves, "damping", level=top) if curves else None


def _plain(data: xr.Dataset, m: int) -> bool:
    return str(data["damping"][m].item()) != "heuristic"


def _lambda(data: xr.Dataset, known: Given, m: int) -> float:
    """The damping of a method as a number: as configured, or the mean over layers where it came from the heuristic; 0 where not known."""
    if _plain(data, m):
        said = str(data["damping"][m].item())
        return float(said) if said else 0.0
    used = known.run.manifest.get("damping", {}).get(str(data["method"][m].item()), {})
    return float(np.mean(list(used.values()))) if used else 0.0


def _costs(data: xr.Dataset, order: list[int], top: float) -> Plot | None:
    """LDS at the first alpha against seconds."""
    curves = []
    for colour, m in enumerate(order):
        spent, name = float(data["seconds"][m]), str(data["family"][m].item())
        if math.isfinite(spent) and spent > 0:
            entry = _entry(data["league"][m, 0], f"{name}, {seconds(spent)}", "lds")
            curves.append(Curve(name, [spent], [entry], colour=colour))
    return plot("", curves, "seconds of work", joined=False, level=top) if len(curves) > 1 else None


def _by_alpha(data: xr.Dataset, order: list[int]) -> Plot:
    alphas = [float(alpha) for alpha in data["alpha"]]
    places = sorted(range(len(alphas)), key=lambda a: alphas[a])
    curves = []
    for colour, m in enumerate(order):
        name = str(data["family"][m].item())
        told = [_entry(data["league"][m, a], f"{name}, alpha = {alphas[a]:g}", "lds") for a in places]
        curves.append(Curve(name, [alphas[a] for a in places], told, colour=colour))
    return plot("", curves, "alpha", log=False)


def _removal(data: xr.Dataset, order: list[int]) -> Plot:
    """Mean harm over the queries by share removed, with twice its standard error over them."""
    curves, shares = [], data["share"].to_numpy()
    places = np.argsort(shares)
    names = dict(zip(data["method"].to_numpy().tolist(), data["family"].to_numpy().tolist(), strict=True))
    colours = {str(data["method"][m].item()): colour for colour, m in enumerate(order)}
    for row, curve in enumerate(data["curve"].to_numpy().tolist()):
        rows, name = data["harm"][row].to_numpy(), names.get(curve, curve)
        spread = 2 * rows.std(1, ddof=1) / rows.shape[1] ** 0.5 if rows.shape[1] > 1 else np.full(len(rows), np.nan)
        means = rows.mean(1)
        told = [Entry(f"{name}, {percent(shares[i])} removed", means[i], means[i] - spread[i], means[i] + spread[i]) for i in places]
        curves.append(Curve(name, shares[places].tolist(), told, dashed=curve not in names, colour=colours.get(curve, -1)))
    return plot("", curves, "share of the training set removed", log=False)


def _checks(data: xr.Dataset, order: list[int]) -> dict[str, Any]:
    """A column per metric that any method has, and a row per method."""
    league = data["league"][:, 0]
    here = [name for name in CHECKS if np.isfinite(league.sel(metric=name, statistic="estimate").to_numpy()[order]).any()]
    rows = []
    for m in order:
        entries = [_entry(league[m], "", name) for name in here]
        rows.append({"name": str(data["family"][m].item()), "values": [told(e) if math.isfinite(e.value) else "" for e in entries]})
    return {"columns": here, "rows": rows if here else []}


def _chance(known: Given) -> float | None:
    coords = known.run.influence.coords
    if "query_label" not in coords or "train_label" not in coords:
        return None
    return chance(coords["query_label"].to_numpy()[known.reported], coords["train_label"].to_numpy())


def _alone_ceiling(data: xr.Dataset) -> float | None:
    if "leave_one_out_mean_ceiling" not in data:
        return None
    return float(data["leave_one_out_mean_ceiling"].sel(statistic="estimate"))


def _environment() -> Environment:
    environment = Environment(loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "padded": partial(number, padded=True), "seconds": seconds, "percent": percent}
    return environment
