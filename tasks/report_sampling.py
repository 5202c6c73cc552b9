"""What the page says of a method that samples: its chains' traces, and whether to trust them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.report_traces import COLOURS, Traces, traces

if TYPE_CHECKING:
    from collections.abc import Callable

    from tda.results import Run

    _Array = np.ndarray[Any, Any]

#: Points of the trace of the batches' losses: one step's is mostly noise of its batch.
SMOOTHED = 150


def sampled(run: Run, place: int) -> dict[str, Any] | None:
    """Of a method of a run: its options, diagnostics, verdict and charts; None where it does not sample."""
    title = run.methods[place]
    told = run.manifest.get("sampling", {}).get(title)
    if told is None:
        return None
    data = run.trajectories_of(title)
    steps, burn_in, thinning = int(data.sizes["step"]), int(told["options"]["burn_in"]), int(told["options"]["thinning"])
    drawn = burn_in + thinning * (1 + np.arange(data.sizes["draw"]))
    width = -(-steps // SMOOTHED)
    each = data["batch_loss"].to_numpy()
    losses = np.stack([each[:, k : k + width].mean(1) for k in range(0, steps, width)], 1)
    charts = {
        "Loss of the batches": traces(losses, np.arange(0, steps, width), steps, burn_in),
        "Training loss above the checkpoint's": traces(data["mean_loss_train"].to_numpy(), drawn, steps, burn_in),
        "Distance from the checkpoint": traces(data["distance"].to_numpy(), drawn, steps, burn_in),
    }
    numbers = [
        {"name": "largest R-hat", "value": _known(told["r_hat"], max), "error": None},
        {"name": "effective draws, least", "value": _known(told["ess"], min), "error": None},
        {"name": "local learning coefficient", "value": told["llc"], "error": told["llc_stderr"]},
        {"name": "distance from the checkpoint", "value": told["distance"], "error": None},
    ]
    return {**told, "charts": charts, "numbers": numbers, "smoothed": width, "colours": min(COLOURS, data.sizes["chain"])}


def _known(by_series: dict[str, float | None], of: Callable[[list[float]], float]) -> float:
    found = [value for value in by_series.values() if value is not None]
    return of(found) if found else float("nan")


__all__ = ["Traces", "sampled"]
