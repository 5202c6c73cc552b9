"""The spectra of a run's factors, as a notebook opens them: read from the artifacts that the run names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr
import zarr

from tda import location, schema
from tda.errors import InputError
from tda.results import NotStored, lazy

if TYPE_CHECKING:
    from tda.results import Run

STORED = ("eigenvalues", "kfac_in", "kfac_out")


def spectra(run: Run) -> xr.Dataset:
    """`Run.factors`.

    Raises:
        NotStored: no method of the run has factors.
    """
    fits = dict(run.manifest.get("fingerprints", {}).get("factors", {}))
    if not fits:
        raise NotStored(f"run {run.id} has no factors; methods such as ekfac and kfac store them (it has {', '.join(run.methods)})")
    found = xr.Dataset()
    for key, fingerprint in fits.items():
        found.update(_of_fit(run, fingerprint, f"{key}/" if len(set(fits.values())) > 1 else ""))
    return found


def _of_fit(run: Run, fingerprint: str, prefix: str) -> xr.Dataset:
    url = location.join(run.store, "artifacts", "factors", fingerprint, "factors.zarr")
    try:
        group = location.open_group(url)
    except FileNotFoundError as error:
        raise InputError(f"the factors of run {run.id} are gone from {url}; run its config again to fit them") from error
    schema.check_version(group.attrs, url)
    found = xr.Dataset()
    for index, layer in enumerate(run.manifest.get("coverage", {}).get("layers", [])):
        folder = group.get(f"layers/{index}")
        if not isinstance(folder, zarr.Group):
            continue  # no Kronecker factors: an exact block or a diagonal
        name = f"{prefix}{layer['name']}"
        spectra = lazy(folder)[[key for key in STORED if key in folder]]
        schema.validate(group, [f"layers/{index}/{key}" for key in spectra])
        for array in spectra.data_vars.values():
            array.attrs.update(layer=layer["name"], kind=layer.get("kind", ""))
        found.update(spectra.rename({key: f"{name}.{key}" for key in (*spectra.data_vars, *spectra.dims)}))
    return found
