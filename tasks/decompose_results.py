"""The arrays and the manifest of a study, written once its points are measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import zarr

import tda
from infra import storage
from tasks import layout
from tasks.decompose import TOPS, Point, Study, fingerprint_of, moment_of
from tasks.decompose_measure import DEFINITIONS, QUANTILES, steps
from tasks.tensors import read_tensors
from tda import location, schema
from tda.decomposition import REFERENCES, RUNGS

_LIBRARIES = ("torch", "numpy", "scipy", "zarr", "xarray", "dask", "prefect")
#: Axes along which points differ in length: shorter ones are filled up.
_RAGGED = ("layer", "other_layer")


def study_url(store: str, study_id: str) -> str:
    """The folder of a study."""
    return location.join(store, "studies", study_id)


def manifest(study: Study, points: Sequence[Point], study_id: str, created: str, config: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a study that starts: complete is False."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "study_id": study_id,
        "complete": False,
        "created": created,
        "problem": study.problem,
        "config": config,
        "versions": {"tda": tda.__version__, "python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "fingerprints": {"study": fingerprint_of(study, points)},
        "seeds": {"training": study.seed},
        "inverses": {label: json.loads(text) for label, text in study.inverses},
        "points": [described(point) for point in points],
        "shape": {"train": points[0].inputs.examples, "query": points[0].inputs.queries},
        "notes": [
            "float64 throughout; K-FAC and EK-FAC with the exact Fisher (expectation over labels): nothing is sampled",
            'where "negative" is "drop", directions of negative curvature are left out of the Hessian\'s inverse',
        ],
    }


def described(point: Point, *, trained: bool = False) -> dict[str, Any]:
    """A point as the manifest tells of it. trained: the moment at which it is measured is known."""
    layers = [{"name": name, "parameters": size} for name, size in zip(point.layers, point.sizes, strict=True)]
    moment = moment_of(point) if trained and not point.refused else None
    return {
        "swept": json.loads(point.swept),
        "progress": point.progress,
        "share": None if moment is None else moment.share,
        "step": None if moment is None else moment.step,
        "parameters": point.parameters,
        "projected_bytes": point.bytes,
        "refused": point.refused,
        "layers": layers,
        "checkpoint": point.training[2].rpartition("/")[2],
    }


def write_results(url: str, study: Study, points: Sequence[Point], jobs: Sequence[Sequence[str]]) -> None:
    """Write results.zarr of a study in `url`. jobs: for each point the artifacts that hold its numbers; none where it was refused."""
    group = location.open_group(location.join(url, "results.zarr"), "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, "study_id": url.rpartition("/")[2]})
    found = [_numbers(urls) for urls in jobs]
    layers = max(len(point.layers) for point in points)
    for name, values in coordinates(study).items():
        _write(group, name, values)
    names = np.array([[*point.layers, *[""] * (layers - len(point.layers))] for point in points])
    _write(group, "layer_name", names)
    _write(group, "parameters", np.array([point.parameters for point in points]))
    _write(group, "projected_bytes", np.array([point.bytes for point in points]))
    _write(group, "refused", np.array([point.refused for point in points]))
    for name in sorted({name for each in found for name in each}):
        shapes = [each[name].shape for each in found if name in each]
        whole = np.full((len(points), *np.max(shapes, 0).tolist()), np.nan)
        for i, each in enumerate(found):
            if name in each:
                some: Any = (i, *(slice(n) for n in each[name].shape))
                whole[some] = each[name]
        _write(group, name, _widened(whole, name, layers))
    location.seal(location.join(url, "results.zarr"))
    schema.validate(group, sorted(group.array_keys()))


def coordinates(study: Study) -> dict[str, np.ndarray[Any, Any]]:
    """The labels of every dimension but the points and their layers."""
    evaluated = {"alpha": np.array(json.loads(study.evaluation)["alphas"]), "bound": np.array([0.025, 0.975])} if study.evaluation else {}
    return evaluated | {
        "definition": np.array(DEFINITIONS),
        "inverse": np.array([label for label, _ in study.inverses]),
        "reference": np.array(REFERENCES),
        "rung": np.array(RUNGS),
        "split": np.array(["train", "query"]),
        "step": np.array(steps()),
        "quantile": QUANTILES,
        "top": np.array(TOPS),
    }


def _numbers(urls: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    for url in urls:
        found |= {name: tensor.numpy() for name, tensor in read_tensors(location.join(url, "numbers.safetensors")).items()}
    return found


def _widened(values: np.ndarray[Any, Any], name: str, layers: int) -> np.ndarray[Any, Any]:
    """Filled up with NaN to the number of layers of the deepest point, which may have been refused."""
    missing = [(0, layers - n if dim in _RAGGED else 0) for dim, n in zip(schema.spec_of(name).dims, values.shape, strict=True)]
    return np.pad(values, missing, constant_values=np.nan)


def _write(group: zarr.Group, name: str, values: np.ndarray[Any, Any]) -> None:
    dtype = "str" if values.dtype.kind == "U" else None
    array = layout.ensure_array(group, name, values.shape, None, None, dtype)
    array[...] = values


def complete(url: str, manifest: dict[str, Any]) -> None:
    """Write the manifest with complete = True in one object: from then on readers see the study."""
    storage.write_json(location.join(url, "study.json"), {**manifest, "complete": True})
