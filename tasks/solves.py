"""What iterative methods tell of their solves: residuals by step and query, stored beside the results."""

from __future__ import annotations

from typing import Any

import numpy as np

from infra import storage
from tasks import layout
from tasks.directions import DirectionJob, told
from tasks.plan import Plan
from tda import location, lowrank, schema


def summarize(plan: Plan) -> dict[str, Any]:
    """For the manifest, by method, the worst over query blocks, segments and members.

    separable_errors; low_rank: errors of directions by layer (`tda.lowrank.stated`); solves: steps, evaluations, largest residual, and how
    many solves of a query did not reach the tolerance; segments: of the training, with their horizons and dampings, for methods that unroll
    it (those of the first member). Solves of an earlier stage have its name in brackets.
    """
    errors: dict[str, float] = {}
    solves: dict[str, dict[str, Any]] = {}
    segments: dict[str, Any] = {}
    low: dict[str, dict[str, Any]] = {}
    members = [(member, "") for member in plan.members] + [(stage.member, f" ({stage.name})") for stage in plan.stages]
    for member, of in members:
        for scored in member.scores.methods:
            title, each = scored.directions.parsed().title + of, told(scored.directions)
            for one in each:
                if "separable_error" in one:
                    errors[title] = max(errors.get(title, 0.0), one["separable_error"])
                if "low_rank" in one:
                    low[title] = lowrank.together(low.get(title), one["low_rank"])
                if "segments" in one:
                    segments.setdefault(title, one["segments"])
                for solve in one.get("solves", []):
                    solves[title] = _worse(solves.get(title), solve)
    return {"separable_errors": errors, "low_rank": low, "solves": solves, "segments": segments}


def warnings(found: dict[str, Any]) -> list[str]:
    """A line for every method some of whose solves ended before their tolerance, or whose low rank keeps too little. found: summarized."""
    solves = found["solves"]
    return lowrank.warnings(found["low_rank"]) + [
        f"{title}: {solve['unconverged']} of {solve['solved']} solves did not reach the tolerance {solve['tolerance']:g} in "
        f"{solve['steps']} steps (largest residual {solve['residual']:.3g}); see docs/solvers.md for what brings them further"
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
        "solved": len(solve["converged"]),
        "tolerance": solve["tolerance"],
    }
    if known is None:
        return found
    counted = ("unconverged", "solved")
    return {key: known[key] + value if key in counted else max(known[key], value) for key, value in found.items()}


def write_solves(plan: Plan) -> None:
    """Write solves.zarr/<label>/<solve>/{residual, evaluations} beside every member's results; nothing where no method solves.

    A solve: one per segment of the training for methods that unroll it, else one.
    """
    for member in plan.members:
        done = location.join(member.scores.receipts, "solves.json")
        found = {scored.directions.parsed().title: _joined(scored.directions) for scored in member.scores.methods}
        for stage in plan.stages:  # there is one member then
            found |= {f"{s.directions.parsed().title} ({stage.name})": _joined(s.directions) for s in stage.member.scores.methods}
        if not any(found.values()) or location.exists(done):
            continue
        url = location.join(member.scores.results.rpartition("/")[0], "solves.zarr")
        group = location.open_group(url, "a")
        group.attrs.update({"schema_version": schema.SCHEMA_VERSION})
        for title, solves in found.items():
            for s, (residual, evaluations) in enumerate(solves):
                for name, values in (("residual", residual), ("evaluations", evaluations)):
                    layout.ensure_array(group, f"{title}/{s}/{name}", values.shape)[...] = values
        location.seal(url)
        storage.write_json(done, {})


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
