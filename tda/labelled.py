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
        known = [str(label) for label in np.atleast_1d(self.coords["method"].to_numpy())] if "method" in self.coords else []
        if method not in known:
            raise InputError(f"no method {method!r} here; there is {', '.join(known) or 'none'}")
        chosen = {"method": method} if "method" in self.dims else {}
        return super().sel({**chosen, **(indexers or {}), **labels}, None, tolerance, drop)
