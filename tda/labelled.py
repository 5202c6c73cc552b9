"""Scores by method: arrays in which a method's label selects, whatever xarray's own argument of that name does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xarray as xr

from tda.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

_INEXACT = ("nearest", "pad", "ffill", "backfill", "bfill")


class Scores(xr.DataArray):  # type: ignore[no-untyped-call]  # of its own __init_subclass__
    """Influences by method, with one difference to a DataArray: sel(method="ekfac") selects by label.

    xarray's sel has an argument of that name, for inexact matches ("nearest"), and passes over it where there is nothing to match.
    """

    __slots__ = ()

    def sel(
        self, indexers: Mapping[Any, Any] | None = None, method: str | None = None, tolerance: Any = None, drop: bool = False, **labels: Any
    ) -> Self:
        """As DataArray.sel, but `method` is the label of a method.

        Raises:
            InputError: no such method.
        """
        if method is None or method in _INEXACT:
            return super().sel(indexers, method, tolerance, drop, **labels)
        return super().sel({**_chosen(self, method), **(indexers or {}), **labels}, None, tolerance, drop)


class ScoreSet(xr.Dataset):  # type: ignore[no-untyped-call]  # of its own __init_subclass__
    """Scores with what belongs to them, by method: sel(method="ekfac") selects by label, of the whole and of each array of it."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        """As Dataset; arrays of scores are `Scores`."""
        found = super().__getitem__(key)
        return Scores(found) if isinstance(found, xr.DataArray) and "method" in found.dims and found.name != "method" else found

    def sel(
        self, indexers: Mapping[Any, Any] | None = None, method: str | None = None, tolerance: Any = None, drop: bool = False, **labels: Any
    ) -> Self:
        """As Dataset.sel, but `method` is the label of a method.

        Raises:
            InputError: no such method.
        """
        if method is None or method in _INEXACT:
            return super().sel(indexers, method, tolerance, drop, **labels)
        return super().sel({**_chosen(self, method), **(indexers or {}), **labels}, None, tolerance, drop)


def _chosen(data: xr.DataArray | xr.Dataset, method: str) -> dict[str, str]:
    """The indexer of a method's label; none where one is selected already, which must be it."""
    known = [str(label) for label in np.atleast_1d(data.coords["method"].to_numpy())] if "method" in data.coords else []
    if method not in known:
        raise InputError(f"no method {method!r} here; there is {', '.join(known) or 'none'}")
    return {"method": method} if "method" in data.dims else {}
