"""What `tda evaluate` has stored of a run, as one Dataset.

<run>/evaluation.json             which of the run's evaluations is the latest, and what it states about itself; written last
<run>/evaluation/<fingerprint>/   results.zarr, league.csv, report.html of one
"""

from __future__ import annotations

from typing import Any

import xarray as xr

from tda import location, schema
from tda.errors import InputError
from tda.results import NotStored, lazy

_TRUTH = ("masks", "measurement", "training_seed")


def evaluation_manifest(run_url: str) -> dict[str, Any] | None:
    """evaluation.json of a run, None where it was not evaluated.

    Raises:
        InputError: a newer tda wrote it.
    """
    url = location.join(run_url, "evaluation.json")
    found = location.read_json_many([url])[0]
    if not found:
        return None
    schema.check_version(found, url)
    manifest: dict[str, Any] = found
    return manifest


def open_evaluation(run_url: str) -> xr.Dataset:
    """The latest evaluation of a run, lazily: what was found, with the ground truth that it was found by.

    Raises:
        NotStored: the run was not evaluated.
        InputError: what it names is gone from the store, or a newer tda wrote it.
    """
    manifest = evaluation_manifest(run_url)
    if manifest is None:
        raise NotStored(f"run {run_url.rpartition('/')[2]} has no evaluation; `tda evaluate CONFIG` stores it")
    data = read_results(location.join(run_url, "evaluation", manifest["folder"]))
    if manifest.get("kind") == "tracing":
        data.attrs.update(
            {key: manifest[key] for key in ("created", "folder", "options", "chosen", "runs", "chance", "documents", "notes")}
        )
        return data
    store = run_url.rpartition("/")[0].rpartition("/")[0]
    url = location.join(store, "artifacts", "retraining", manifest["retraining"], "truth.zarr")
    data.update(_opened(url)[list(_TRUTH)])
    data.attrs.update({key: manifest[key] for key in ("created", "folder", "options", "chosen", "mislabelled", "retrained", "notes")})
    return data


def read_results(folder: str) -> xr.Dataset:
    """The arrays of one evaluation by its folder, without the ground truth; texts as plain strings."""
    data = _opened(location.join(folder, "results.zarr"))
    texts = {name: [str(text) for text in data[name].to_numpy()] for name in ("method", "metric", "statistic", "curve") if name in data}
    data = data.assign_coords(texts)
    for name in [name for name in ("family", "damping", "at") if name in data]:
        data[name] = ("method", [str(text) for text in data[name].to_numpy()], data[name].attrs)
    return data


def _opened(url: str) -> xr.Dataset:
    try:
        group = location.open_group(url)
    except FileNotFoundError as error:
        raise InputError(f"{url} is gone from the store; run `tda evaluate` again") from error
    schema.validate(group, sorted(group.array_keys()))
    return lazy(group)
