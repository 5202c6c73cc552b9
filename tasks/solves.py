"""What iterative methods tell of their solves: residuals by step and query, stored beside the results."""

from __future__ import annotations

from typing import Any

import numpy as np

from infra import storage
from tasks import layout
from tasks.directions import DirectionJob, told
from tasks.plan import Plan
from tda import location, schema


def summarize(plan: Plan) -> dict[str, dict[str, Any]]:
    """For the manifest, by method: separable_errors, and of each solve the steps, evaluations, worst residual and unconverged queries."""
    errors: dict[str, float] = {}
    solves: dict[str, dict[str, Any]] = {}
    for member in plan.members:
        for scored in member.scores.methods:
            title, each = scored.directions.parsed().title, told(scored.directions)
            for one in each:
                if "separable_error" in one:
                    errors[title] = max(errors.get(title, 0.0), one["separable_error"])
                for solve in one.get("solves", []):
                    solves[title] = _worse(solves.get(title), solve)
    return {"separable_errors": errors, "solves": solves}


def warnings(solves: dict[str, dict[str, Any]]) -> list[str]:
    """A line for every method some of whose solves ended before their tolerance."""
    return [
        f"{title}: {solve['unconverged']} queries did not reach the tolerance {solve['tolerance']:g} in {solve['steps']} steps "
        f"(largest residual {solve['residual']:.3g}); raise max_steps, or the damping"
        for title, solve in solves.items()
        if solve["unconverged"]
    ]


def _worse(known: dict[str, Any] | None, solve: dict[str, Any]) -> dict[str, Any]:
    """The larger numbers of two solves."""
    found = {
        "steps": solve["steps"],
        "evaluations": solve["evaluations"][-1],
        "residual": max(solve["residual"][-1]),
        "unconverged": len(solve["converged"]) - sum(solve["converged"]),
        "tolerance": solve["tolerance"],
    }
    if known is None:
        return found
    return {key: known[key] + value if key == "unconverged" else max(known[key], value) for key, value in found.items()}


def write_solves(plan: Plan, run_url: str) -> None:
    """Write solves.zarr/<label>/<solve>/{residual, evaluations}; nothing where no method of the run solves. A solve: one per segment."""
    url = location.join(run_url, "solves.zarr")
    jobs = [scored.directions for scored in plan.first.scores.methods]
    found = {job.parsed().title: _joined(job) for job in jobs}
    if not any(found.values()) or location.exists(location.join(run_url, "receipts", "solves.json")):
        return
    group = location.open_group(url, "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION})
    for title, solves in found.items():
        for s, (residual, evaluations) in enumerate(solves):
            for name, values in (("residual", residual), ("evaluations", evaluations)):
                layout.ensure_array(group, f"{title}/{s}/{name}", values.shape)[...] = values
    location.seal(url)
    storage.write_json(location.join(run_url, "receipts", "solves.json"), {})


def _joined(job: DirectionJob) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each solve of a method: residuals (step, query) of all query blocks, NaN after a block's last step; evaluations (step,)."""
    each = [one.get("solves", []) for one in told(job)]
    joined = []
    for parts in zip(*each, strict=True):
        steps = max(len(part["residual"]) for part in parts)
        columns = [np.asarray(part["residual"], np.float64) for part in parts]
        padded = [np.pad(c, ((0, steps - len(c)), (0, 0)), constant_values=np.nan) for c in columns]
        longest = max(parts, key=lambda part: len(part["residual"]))
        joined.append((np.concatenate(padded, 1).astype(np.float32), np.asarray(longest["evaluations"], np.float64)))
    return joined
