"""The page of a study: how much each rung of the ladder errs, where the error comes from, and what of the paper's claims holds here.

One HTML file without scripts and without any request, as a run's report is.
"""

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
from tasks.decompose_charts import Chart, Series, ladder_chart, legend, limits_of, share_chart, signed, spectrum_chart
from tasks.decompose_claims import claims
from tasks.report_text import date, number, percent, seconds
from tasks.templates import TEMPLATES
from tda import location
from tda.study import Study

#: Rungs as the page calls them.
NAMES = {"hessian": "Hessian", "ggn": "GGN", "block_ggn": "block GGN", "ekfac": "EK-FAC", "kfac": "K-FAC"}
#: Charts of spectra take much room: of more points, evenly chosen ones are shown.
MOST_SPECTRA = 12


def write_page(url: str, manifest: dict[str, Any]) -> None:
    """Write report.html of a study whose arrays are all there."""
    storage.write_bytes(location.join(url, "report.html"), page(Study(url, {**manifest, "complete": True})))


def page(study: Study) -> bytes:
    """The page of a study as UTF-8 HTML."""
    data = study.points
    measured = data.isel(point=np.flatnonzero(data["refused"].to_numpy() == ""))
    points = [point for point in study.manifest["points"] if not point["refused"]]
    options = _options(study.manifest)
    inverses = [str(label) for label in data["inverse"].to_numpy()]
    names = [_named(point, options) for point in points]
    content = {
        "study": study,
        "manifest": study.manifest,
        "created": date(study.manifest["created"]),
        "refused": [{**point, "name": _named(point, options)} for point in study.manifest["points"] if point["refused"]],
        "smallest": min(point["parameters"] for point in points),
        "largest": max(point["parameters"] for point in points),
        "inverses": [_inverse(data, measured, points, options, label) for label in inverses],
        "bases": _bases(measured, points, options),
        "spectra": _spectra(measured, names),
        "rows": [_row(measured.isel(point=i), name, point) for i, (name, point) in enumerate(zip(names, points, strict=True))],
        "claims": {label: claims(data, label) for label in inverses},
        "option_names": options,
        "rung_names": NAMES,
    }
    environment = _environment()
    style = environment.get_template("report.css.j2").render(methods=range(len(inverses)))
    style += environment.get_template("decompose.css.j2").render()
    # The policy admits this very style sheet by its digest: no style or script from the data could ever apply.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    html = environment.get_template("decompose.html.j2").render(content, style=Markup(style), style_digest=digest)  # noqa: S704  (our own)
    return html.encode()


def _options(manifest: dict[str, Any]) -> list[str]:
    """What points differ in; the last is what a chart's lines differ in, the others set charts apart."""
    points = manifest["points"]
    return [*points[0]["swept"], *(["progress"] if any(point["progress"] != 1 for point in points) else [])]


def _values(point: dict[str, Any], options: list[str]) -> list[str]:
    every = point["swept"] | {"progress": point["progress"]}
    return [f"{name} {every[name]}" for name in options]


def _named(point: dict[str, Any], options: list[str]) -> str:
    return " · ".join(_values(point, options)) or "the model"


def _facets(points: list[dict[str, Any]], options: list[str]) -> dict[str, dict[str, int]]:
    """Title of each chart -> name of each line -> position of its point."""
    found: dict[str, dict[str, int]] = {}
    for i, point in enumerate(points):
        *chart, line = _values(point, options) or ["the model"]
        found.setdefault(" · ".join(chart), {})[line] = i
    return found


def _colours(points: list[dict[str, Any]], options: list[str]) -> dict[str, int]:
    """The number of each line's colour, by its name alone: that of an option's value, the same in every chart."""
    names = dict.fromkeys((_values(point, options) or ["the model"])[-1] for point in points)
    return {name: i for i, name in enumerate(names)}


def _inverse(data: xr.Dataset, measured: xr.Dataset, points: list[dict[str, Any]], options: list[str], label: str) -> dict[str, Any]:
    """What the page says under one inverse."""
    here = measured.sel(inverse=label)
    errors = here["error"].sel(reference="hessian")

    def charts(values: np.ndarray[Any, Any]) -> list[Chart]:
        return _charts(points, options, values)

    return {
        "label": label,
        "errors": {str(d): charts(errors.sel(definition=d).to_numpy()) for d in data["definition"].to_numpy()},
        "agreement": charts(here["agreement"].to_numpy()),
        "lds": _lds(here, points, options) if "rung_lds" in here else [],
        "shares": [_shares(here.isel(point=i), point, options) for i, point in enumerate(points)],
        "layers": [_layers(here.isel(point=i), point, options) for i, point in enumerate(points)],
        "kept": [[float(v) for v in here["kept"].isel(point=i)] for i in range(len(points))],
    }


def _lds(here: xr.Dataset, points: list[dict[str, Any]], options: list[str]) -> list[Chart]:
    """Charts of the mean LDS over queries with its interval and its ceiling, alpha by alpha."""
    found = []
    for alpha in here["alpha"].to_numpy().tolist():
        at = here.sel(alpha=alpha)
        mean = at["rung_lds"].mean("query").transpose("point", "rung").to_numpy()
        bounds = at["rung_lds_bound"].transpose("point", "rung", "bound").to_numpy()
        title = f"alpha {alpha:g}" if here.sizes["alpha"] > 1 else ""
        found += _charts(points, options, mean, title, bounds, at["rung_lds_ceiling"].to_numpy())
    return found


def _charts(
    points: list[dict[str, Any]],
    options: list[str],
    values: np.ndarray[Any, Any],
    title: str = "",
    bounds: np.ndarray[Any, Any] | None = None,
    ceilings: np.ndarray[Any, Any] | None = None,
) -> list[Chart]:
    """One chart per facet, all on the axis of the largest; values: (point, rung), bounds: (point, rung, bound), ceilings: (point,)."""
    colours = _colours(points, options)
    limits = limits_of(np.concatenate([part.ravel() for part in (values, bounds, ceilings) if part is not None]))
    found = []
    for facet, lines in _facets(points, options).items():
        series = {
            name: Series(
                values[i], colours[name], None if bounds is None else bounds[i], math.nan if ceilings is None else float(ceilings[i])
            )
            for name, i in lines.items()
        }
        found.append(ladder_chart(" · ".join(part for part in (facet, title) if part), series, list(NAMES.values()), limits))
    return found


def _shares(point: xr.Dataset, described: dict[str, Any], options: list[str]) -> dict[str, Any]:
    """A row of each table of shares: K-FAC's error and every step's share of it."""
    told: dict[str, Any] = {"name": _named(described, options)}
    for key, definition, reference in (("inverse", "inverse", 0), ("product", "product", 0), ("from_ggn", "inverse", 1)):
        here = point.sel(definition=definition).isel(reference=reference)
        told[key] = {"total": float(here["error"].sel(rung="kfac")), "shares": [float(v) for v in here["error_share"][reference:]]}
    return told


def _layers(point: xr.Dataset, described: dict[str, Any], options: list[str]) -> dict[str, Any]:
    """A row per layer: the errors of the inverse's diagonal block by rung, and K-FAC's and EK-FAC's basis against the block's own."""
    rows = []
    for i, layer in enumerate(described["layers"]):
        here = point.isel(layer=i)
        errors = here["layer_error"].sel(reference="hessian").to_numpy()[1:]
        own = here["layer_error"].sel(reference="block_ggn").to_numpy()[3:]
        rows.append({"name": layer["name"], "parameters": layer["parameters"], "errors": errors.tolist(), "own": own.tolist()})
    return {"name": _named(described, options), "rows": rows}


def _bases(measured: xr.Dataset, points: list[dict[str, Any]], options: list[str]) -> dict[str, list[Chart]]:
    """How far the Kronecker basis is that of the blocks, and the blocks' basis that of the whole GGN."""
    tops, facets, colours = measured["top"].to_numpy(), _facets(points, options), _colours(points, options)

    def charts(reference: str, rung: str) -> list[Chart]:
        values = measured["basis_overlap"].sel(reference=reference, rung=rung).to_numpy()
        series = {title: {name: Series(values[i], colours[name]) for name, i in lines.items()} for title, lines in facets.items()}
        return [share_chart(title, tops, some) for title, some in series.items()]

    return {"of EK-FAC with the block GGN": charts("block_ggn", "ekfac"), "of the block GGN with the GGN": charts("ggn", "block_ggn")}


def _spectra(measured: xr.Dataset, names: list[str]) -> list[Chart]:
    chosen = sorted(set(np.linspace(0, len(names) - 1, min(len(names), MOST_SPECTRA)).round().astype(int).tolist()))
    curves, quantiles = measured["spectrum_curve"].to_numpy(), measured["quantile"].to_numpy()
    return [spectrum_chart(names[i], quantiles, dict(zip(NAMES.values(), curves[i], strict=True))) for i in chosen]


def _row(point: xr.Dataset, name: str, described: dict[str, Any]) -> dict[str, Any]:
    """What a point is, whatever the inverse."""
    layers = len(described["layers"])
    masses = point["layer_mass"].sel(reference="ggn").to_numpy()[:layers, :layers]
    return {
        "name": name,
        "parameters": described["parameters"],
        "step": described.get("step"),
        "share": described.get("share"),
        "train": float(point["mean_loss"].sel(split="train")),
        "query": float(point["mean_loss"].sel(split="query")),
        "gradient": float(point["gradient_norm"]),
        "negative": float(point["negative_mass"]),
        "off_block": {str(r): float(point["off_block_mass"].sel(reference=r)) for r in ("hessian", "ggn")},
        "matrix": [float(v) for v in point["matrix_error"].sel(reference="hessian")][1:],
        "spectrum": [float(v) for v in point["spectrum_overlap"].sel(reference="hessian")][1:],
        "coupling": (masses / np.sqrt(np.outer(masses.diagonal(), masses.diagonal()))).tolist(),
        "layers": [layer["name"] for layer in described["layers"]],
    }


def _environment() -> Environment:
    environment = Environment(loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "legend": legend,
        "number": number,
        "padded": partial(number, padded=True),
        "seconds": seconds,
        "percent": percent,
        "signed": signed,
    }
    return environment
