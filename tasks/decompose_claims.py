"""What "Better Hessians Matter" (arXiv 2509.23437) says of the ladder, beside what a study measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from tasks.decompose_charts import signed
from tasks.report_text import number

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Claim:
    """A claim, what was measured, and whether that agrees; None where the study cannot tell."""

    said: str
    measured: str
    holds: bool | None


def claims(points: xr.Dataset, inverse: str) -> list[Claim]:
    """The paper's claims under one inverse, with the first definition of the error and the Hessian as the reference."""
    data = points.isel(point=np.flatnonzero(points["refused"].to_numpy() == ""))
    error = data["error"].sel(definition="inverse", inverse=inverse, reference="hessian")
    share = data["error_share"].sel(definition="inverse", inverse=inverse, reference="hessian")
    kronecker = share.sel(step=["block_ggn to ekfac", "ekfac to kfac"]).sum("step").to_numpy()
    middle, first = (share.sel(step=step).to_numpy() for step in ("ggn to block_ggn", "hessian to ggn"))
    rising: _Array = np.asarray((_finite(error.diff("rung").to_numpy()) >= -1e-9).all(1))
    mass = data["off_block_mass"].sel(reference="ggn")
    found = [
        Claim("the error grows with every step down the ladder", f"at {rising.sum()} of {len(rising)} points", _all(rising)),
        Claim("the Kronecker steps carry about 60% of the error", _range(kronecker), _within(kronecker, 0.4, 0.8)),
        Claim("the block-diagonal step carries 10% to 25%", _range(middle), _within(middle, 0.1, 0.25)),
        Claim("the GGN step carries 0% to 4%", _range(first), _within(first, -0.005, 0.045)),
        _versus(data, "depth", share.sel(step="ggn to block_ggn"), "the block-diagonal step's share grows with depth", grows=True),
        _versus(data, "depth", mass, "off-block mass of the GGN grows with depth", grows=True),
        _versus(data, "epochs", mass, "off-block mass of the GGN falls in training", grows=False),
        _versus(data, "depth", _basis(data), "the Kronecker basis overlaps less in deeper networks", grows=False),
        _versus(data, "epochs", _basis(data), "the Kronecker basis overlaps more later in training", grows=True),
    ]
    if "rung_lds_step_bound" in data:
        found.append(_falling(data["rung_lds_step_bound"].sel(inverse=inverse)))
    return found


def _falling(bounds: xr.DataArray) -> Claim:
    """Judge each step of each point by the interval of the paired difference of the two rungs' LDS, (point, alpha, step, bound)."""
    low, high = _finite(bounds.transpose("point", "alpha", "step", "bound").to_numpy()).reshape(-1, 2).T
    falls, rises = int((high < 0).sum()), int((low > 0).sum())
    told = f"of {len(low)} steps {falls} fall, {rises} rise, {len(low) - falls - rises} are within the noise (95% intervals hold 0)"
    holds = False if rises else True if falls == len(low) > 0 else None
    return Claim("LDS falls with every step down the ladder", told, holds)


def _finite(rows: _Array) -> _Array:
    """The points (point, ...) at which everything is measured: elsewhere there is nothing that could hold or fail."""
    return rows[np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))]


def _basis(data: xr.Dataset) -> xr.DataArray:
    """Overlap of the top 10% of the block GGN's eigenvectors with EK-FAC's."""
    return data["basis_overlap"].sel(reference="block_ggn", rung="ekfac", top=0.1)


def _versus(data: xr.Dataset, option: str, values: xr.DataArray, said: str, *, grows: bool) -> Claim:
    """Compare the largest with the smallest value of an option, everything else being equal."""
    if option not in data.coords or len(np.unique(data[option])) < 2:
        return Claim(said, f"the study has one {option}", None)
    if data[option].dtype.kind not in "iuf":
        return Claim(said, f"the study's {option} are no numbers", None)
    others = [str(name) for name in data.coords if data[name].dims == ("point",) and name != option]
    groups: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for i in np.flatnonzero(np.isfinite(values.to_numpy())):
        key = tuple(data[name].to_numpy()[i] for name in others)
        groups.setdefault(key, []).append((float(data[option][i]), float(values[i])))
    pairs = [(min(group), max(group)) for group in groups.values() if len(group) > 1]
    if not pairs:
        return Claim(said, f"no two points differ in {option} alone", None)
    right = np.array([last[1] > first[1] if grows else last[1] < first[1] for first, last in pairs])
    told = "; ".join(f"{number(first[1], 2)} at {first[0]:g}, {number(last[1], 2)} at {last[0]:g}" for first, last in pairs[:3])
    rest = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return Claim(said, f"in {right.sum()} of {len(right)} comparisons ({told}{rest})", _all(right))


def _all(right: _Array) -> bool | None:
    return None if not len(right) else bool(right.all())


def _range(values: _Array) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "not measured"
    return f"median {signed(float(np.median(finite)))}, from {signed(float(finite.min()))} to {signed(float(finite.max()))}"


def _within(values: _Array, low: float, high: float) -> bool | None:
    finite = values[np.isfinite(values)]
    return None if not len(finite) else bool(low <= np.median(finite) <= high)
