"""What a notebook opens of a study of the curvature ladder.

study = tda.open_study("file:./store")               # the newest complete one
study.results.error.sel(rung="ekfac", reference="hessian")
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from tda import location, schema
from tda.errors import InputError

if TYPE_CHECKING:
    import os


def open_study(store: str | os.PathLike[str], study: str = "latest", *, incomplete: bool = False) -> Study:
    """Open a study of the curvature ladder; only its manifest is read now.

    Args:
        store: "file:./store", a folder, or "s3://bucket/prefix".
        study: its id, a beginning of the id that no other study shares, or "latest": the newest complete one.
        incomplete: also open one that has not finished.

    Raises:
        InputError: no such study, several begin so, it is incomplete, a newer tda wrote it, or the store cannot be read.
    """
    url = location.resolve(str(store))
    folder = location.join(url, "studies")
    names = location.list_names(folder)
    manifests = dict(zip(names, location.read_json_many([location.join(folder, n, "study.json") for n in names]), strict=True))
    known = {name: found for name, found in manifests.items() if found}
    wanted = [n for n, found in known.items() if (study in ("latest", n) or n.startswith(study)) and (incomplete or found["complete"])]
    if study in wanted:
        wanted = [study]
    if study == "latest":
        wanted = sorted(wanted, key=lambda name: str(known[name]["created"]))[-1:]
    if len(wanted) > 1:
        raise InputError(f"study {study!r} in {url} could be any of {len(wanted)}: {', '.join(wanted[:4])}; give more of the id")
    if not wanted:
        there = f"{len(known)} there: {', '.join(sorted(known)[-4:])}" if known else "none there"
        raise InputError(
            f"no complete study {study!r} in {url} ({there}); `tda decompose CONFIG` makes one, and finishes an interrupted one"
        )
    manifest = known[wanted[0]]
    schema.check_version(manifest, location.join(folder, wanted[0], "study.json"))
    return Study(location.join(folder, wanted[0]), manifest)


@dataclass(frozen=True, eq=False)
class Study:
    """A study's results. manifest: its study.json: configuration, versions, points, seeds, timings."""

    url: str
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        points = self.manifest.get("points", [])
        refused = sum(bool(point["refused"]) for point in points)
        return f"<Study {self.id} of {self.manifest.get('problem')}: {len(points) - refused} points, {refused} refused>"

    @property
    def id(self) -> str:
        """The study's id: its folder's name."""
        return self.url.rpartition("/")[2]

    @cached_property
    def points(self) -> xr.Dataset:
        """Everything that was measured, one row per point; the swept options are coordinates of the dimension `point`.

        An option whose name an array has already is called option_<name>. `share` is the share of the training's steps at which a point
        was measured: that of the checkpoint which was nearest to the `progress` asked for.

        Raises:
            InputError: the study is not finished, and nothing to read is there yet.
        """
        if not self.manifest.get("complete") and not self._written():
            raise InputError(f"study {self.id} has no results yet; the `tda decompose CONFIG` that began it, given again, finishes it")
        group = location.open_group(location.join(self.url, "results.zarr"))
        schema.validate(group, sorted(group.array_keys()))
        data = xr.open_dataset(xr.backends.ZarrStore(group, mode="r"), decode_cf=False, chunks=None).load()
        for name in [n for n in (*data.data_vars, *data.coords) if data[n].dtype.kind in "TU"]:
            data[name] = data[name].dims, np.array(data[name].to_numpy(), dtype=object).astype(str), data[name].attrs
        options = [point["swept"] for point in self.manifest["points"]]
        taken = {*data.variables, *data.dims, "share", "progress"}
        swept = {f"option_{k}" if k in taken else k: ("point", [_plain(each[k]) for each in options]) for k in options[0]}
        if any(point["progress"] != 1 for point in self.manifest["points"]):
            swept["progress"] = ("point", [point["progress"] for point in self.manifest["points"]])
        told = {"long_name": "share of the training's steps before the checkpoint that was measured"}
        shares = [math.nan if point.get("share") is None else point["share"] for point in self.manifest["points"]]
        return data.assign(share=("point", shares, told)).assign_coords(swept)

    def _written(self) -> bool:
        """Whether all arrays are there: they are sealed last."""
        try:
            return bool(location.read_json(location.join(self.url, "results.zarr", "zarr.json")).get("consolidated_metadata"))
        except FileNotFoundError:
            return False

    @cached_property
    def results(self) -> xr.Dataset:
        """As `points`, with one dimension per swept option in place of `point`; NaN where a point was refused."""
        data = self.points
        swept = [name for name in data.coords if data[name].dims == ("point",)]
        if len(swept) < 2:
            return data.swap_dims(point=swept[0]) if swept else data.isel(point=0)
        return data.set_index(point=swept).unstack("point")


def _plain(value: Any) -> Any:
    """An option's value as a coordinate: numbers and texts as they are."""
    return value if isinstance(value, int | float | str) else json.dumps(value)
