"""The league table as the terminal shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flows.tables import cell, print_table

if TYPE_CHECKING:
    import xarray as xr

#: Metrics that do not depend on alpha: their columns, shown where any method has them, and whether with their interval.
CHECKS = {
    "leave_one_out": ("leave-one-out", True),
    "mislabelled_auc": ("mislabelled AUC", True),
    "retrieval": ("same class", False),
    "randomised": ("untrained", False),
    "harm": ("harm", True),
}


def print_league(data: xr.Dataset) -> None:
    """A table per alpha, methods by their LDS, of each damping sweep the chosen one alone; then what does not depend on alpha."""
    for a in range(data.sizes["alpha"]):
        head, *rows = league_rows(data, a)
        print_table(head, rows, title=_title(data, a))
    head, *rows = check_rows(data)
    if len(head) > 1:
        print_table(head, rows, title="Checks")


def league_rows(data: xr.Dataset, a: int) -> list[list[str]]:
    """The head and a row per compared method, at one alpha."""
    many = bool(np.isfinite(data["league"].sel(metric="single_lds", statistic="estimate")).any())
    table = [["method", "damping", "LDS", "of ceiling", "behind the best", *(["one model"] if many else []), "seconds"]]
    for m in _order(data, a):
        row, family = data["league"][m, a], str(data["family"][m].item())
        tried, damping = int((data["family"] == family).sum()), str(data["damping"][m].item())
        behind = _told(row, "behind", bounds=True) if float(row.sel(metric="behind", statistic="estimate")) else ""
        some = [family, f"{damping} (of {tried})" if tried > 1 else damping, _told(row, "lds", bounds=True), _share(row), behind]
        table.append([*some, *([_told(row, "single_lds", bounds=False)] if many else []), cell(float(data["seconds"][m]))])
    return table


def check_rows(data: xr.Dataset) -> list[list[str]]:
    """The head and a row per compared method, with the metrics that any of them has."""
    order = _order(data, 0)
    league = data["league"][:, 0]
    here = [name for name in CHECKS if np.isfinite(league.sel(metric=name, statistic="estimate").to_numpy()[order]).any()]
    table = [["method", *(CHECKS[name][0] for name in here)]]
    return table + [[str(data["family"][m].item()), *(_told(league[m], name, bounds=CHECKS[name][1]) for name in here)] for m in order]


def _order(data: xr.Dataset, a: int) -> list[int]:
    """The compared methods, the best first."""
    order = np.argsort(-data["league"][:, a].sel(metric="lds", statistic="estimate").to_numpy(), kind="stable")
    return [m for m in order.tolist() if bool(data["chosen"][m])]


def _told(row: xr.DataArray, metric: str, *, bounds: bool) -> str:
    estimate, low, high = (float(v) for v in row.sel(metric=metric))
    if np.isnan(estimate):
        return ""
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]" if bounds and np.isfinite(low) else f"{estimate:.3f}"


def _share(row: xr.DataArray) -> str:
    share = float(row.sel(metric="of_ceiling", statistic="estimate"))
    return "" if np.isnan(share) else f"{share:.0%}"


def _title(data: xr.Dataset, a: int) -> str:
    reported, made = ~data["tuning_query"].to_numpy(), data.attrs["retrained"]
    top, low, high = (float(v) for v in data["mean_ceiling"][a])
    ceiling = f"noise ceiling {top:.3f} [{low:.3f}, {high:.3f}]" if np.isfinite(top) else "noise ceiling not known"
    subsets = f"{made['subsets']} subsets of {float(data['alpha'][a]):.0%} x {made['seeds']} models"
    return f"LDS over {subsets}, mean over {int(reported.sum())} reported queries; {ceiling}"
