"""The league table as the terminal shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flows.tables import cell, print_table

if TYPE_CHECKING:
    import xarray as xr

#: Columns shown where any method has the metric, with whether their interval is shown too.
COLUMNS = {
    "single_lds": ("one model", False),
    "leave_one_out": ("leave-one-out", True),
    "mislabelled_auc": ("mislabelled AUC", True),
    "retrieval": ("same class", False),
    "randomised": ("untrained", False),
    "harm": ("harm", True),
}


def print_league(data: xr.Dataset) -> None:
    """Methods by their LDS at the first alpha, of each damping sweep the chosen one alone."""
    rows = league_rows(data)
    print_table(rows[0], rows[1:], title=_title(data))


def league_rows(data: xr.Dataset) -> list[list[str]]:
    """The head and a row per compared method."""
    alphas = data["alpha"].to_numpy().tolist()
    league = data["league"].load()
    order = np.argsort(-league.sel(metric="lds", statistic="estimate").isel(alpha=0).to_numpy(), kind="stable")
    rows = [m for m in order.tolist() if bool(data["chosen"][m])]
    further = [name for name in COLUMNS if np.isfinite(league.sel(metric=name, statistic="estimate").to_numpy()[rows]).any()]
    head = ["method", "damping"]
    for alpha in alphas:
        head += [f"LDS at {alpha:g}" if len(alphas) > 1 else "LDS", "of ceiling", "behind the best"]
    table = [[*head, *(COLUMNS[name][0] for name in further), "seconds"]]
    for m in rows:
        family, tried = str(data["family"][m].item()), int((data["family"] == data["family"][m]).sum())
        damping = str(data["damping"][m].item())
        row = [family, f"{damping} (of {tried})" if tried > 1 else damping]
        for a in range(len(alphas)):
            here = league[m, a]
            row += [_told(here, "lds", bounds=True), _share(here), _told(here, "behind", bounds=True)]
        row += [_told(league[m, 0], name, bounds=COLUMNS[name][1]) for name in further]
        table.append([*row, cell(float(data["compute"][m]))])
    return table


def _told(row: xr.DataArray, metric: str, *, bounds: bool) -> str:
    estimate, low, high = (float(v) for v in row.sel(metric=metric))
    if np.isnan(estimate):
        return ""
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]" if bounds and np.isfinite(low) else f"{estimate:.3f}"


def _share(row: xr.DataArray) -> str:
    share = float(row.sel(metric="of_ceiling", statistic="estimate"))
    return "" if np.isnan(share) else f"{share:.0%}"


def _title(data: xr.Dataset) -> str:
    reported = int((~data["tuning_query"].to_numpy()).sum())
    made = data.attrs["retrained"]
    some = data["ceiling"].to_numpy()[:, ~data["tuning_query"].to_numpy()].mean(1)
    tops = ", ".join(f"{top:.3f} at {alpha:g}" for alpha, top in zip(data["alpha"].to_numpy().tolist(), some.tolist(), strict=True))
    ceiling = f"noise ceiling {tops}" if np.isfinite(some).all() else "noise ceiling not known"
    return f"LDS over {made['subsets']} subsets x {made['seeds']} models, mean over {reported} reported queries; {ceiling}"
