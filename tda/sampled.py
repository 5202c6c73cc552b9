"""The chains of a run, as a notebook opens them: trajectories of losses, and the influence of single tokens computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from tda import location, schema
from tda.errors import InputError
from tda.sampling.covariance import CORRELATION, covariance
from tda.sampling.stored import Trajectories, open_trajectories

if TYPE_CHECKING:
    from tda.results import Run


def stored(run: Run, method: str | None = None, member: int = 0) -> Trajectories:
    """The trajectories behind a method of a run; of its last one that samples when absent.

    Raises:
        NotStored: the method does not sample, or none does.
        InputError: the artifact is gone.
    """
    from tda.results import NotStored

    prints = run.manifest.get("fingerprints", {})
    prints = run.manifest.get("members", [prints])[member]
    marks = set(prints.get("trajectories", {}).values())
    found = {title: mark for title, fits in prints.get("fits", {}).items() for mark in fits.values() if mark in marks}
    if not found:
        raise NotStored(
            f"run {run.id} has no trajectories; methods that sample (bif) store them, and none of {', '.join(run.methods)} does"
        )
    if method is not None and method not in found:
        raise NotStored(f"run {run.id} has no trajectories of {method!r}; it has those of {', '.join(found)}")
    mark = found[method] if method is not None else found[[title for title in run.methods if title in found][-1]]
    return open_trajectories(location.join(run.store, "artifacts", "trajectories", mark))


def trajectories(run: Run, method: str | None, member: int) -> xr.Dataset:
    """As `Run.trajectories_of` says."""
    from tda.results import lazy

    found = stored(run, method, member)
    group = location.open_group(found.zarr)
    schema.check_version(group.attrs, found.zarr)
    schema.validate(group, sorted(group.array_keys()))
    data = lazy(group)
    known = run.scored()
    coords = {name: known.coords[name] for name in ("train", "query", "train_label", "query_label") if name in known.coords}
    sampling = {key: value for key, value in found.told["sampling"].items() if key not in ("together", "segment", "compiled")}
    attrs = sampling | {"step_size_convention": found.told["step_size_convention"], "lost": found.told["lost"]}
    attrs |= {"diagnostics": location.read_json(location.join(found.url, "diagnostics.json"))}
    return data.assign_coords(coords).assign_coords(chain=np.arange(found.sampling.chains)).assign_attrs(attrs)


def token_influence(run: Run, query: int, train: Sequence[int], method: str | None, member: int, *, by_query_token: bool) -> xr.DataArray:
    """As `Run.token_influence` says."""
    from tda.results import NotStored

    for name, ids in (("query", [query]), ("train", train)):
        known = run.manifest["shape"][name]
        if bad := [i for i in ids if not 0 <= i < known]:
            raise InputError(f"run {run.id} has no {name} example {bad[0]}; it has {known}, counted from 0")
    if not _samples(run, method):
        from tda import stored_tokens

        return stored_tokens.token_influence(run, query, train, method, member, by_query_token=by_query_token)
    found = stored(run, method, member)
    if not found.told["tokens"]:
        raise NotStored(f"run {run.id} has no losses of single tokens; tokens = true in the method's table stores them")
    title = method or [title for title in run.methods if _samples(run, title)][-1]
    normalized = run.manifest["units"][title] == CORRELATION
    values = token_scores(found, query, list(train), by_query_token=by_query_token, normalized=normalized)
    dims = ("train", "train_token", "query_token")[: values.ndim]
    attrs: dict[str, Any] = {"units": CORRELATION if normalized else schema.UNITS, "sign": schema.SIGN, "query": int(query)}
    return xr.DataArray(values, dims=dims, coords={"train": list(train)}, attrs=attrs, name="token_influence")


def _samples(run: Run, method: str | None) -> bool:
    """Whether the method, or where none is named any of the run's, has trajectories."""
    prints = run.manifest.get("fingerprints", {})
    each = prints if "fits" in prints else run.manifest.get("members", [prints])[0]
    marks = set(each.get("trajectories", {}).values())
    found = [title for title, fits in each.get("fits", {}).items() if marks & set(fits.values())]
    return method in found if method is not None else bool(found)


def token_scores(
    found: Trajectories, query: int, train: Sequence[int], *, by_query_token: bool = False, normalized: bool = False
) -> np.ndarray[Any, Any]:
    """-(n_beta / N) Cov of the losses of single tokens with a query's measurement (train, token), or with its tokens' losses.

    (train, train_token, query_token) float32 with by_query_token; in units of the measurement, or of the loss. They add up over tokens to
    the sequence's influence, where the measurement is the loss. normalized: -Corr of the same, each in [-1, 1], which do not add up; 0
    where there is no label.
    """
    tokens = found.columns("token_loss_train", train)
    asked = found.columns("token_loss_query", [query])[:, :, 0] if by_query_token else found.measurement([query])
    factor = -1.0 if normalized else -found.scale
    scores = factor * torch.movedim(covariance(tokens, asked, normalized=normalized)[0], 0, -1)
    whole: np.ndarray[Any, Any] = (scores if by_query_token else scores[..., 0]).numpy()
    return whole
