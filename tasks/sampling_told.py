"""What a run states of its chains: their numbers, whether to trust them, and which were lost."""

from __future__ import annotations

from typing import Any

from tasks.plan import Plan
from tasks.sampling import SampleJob, diagnostics_of, settled_of


def summarize(plan: Plan) -> dict[str, Any]:
    """For the manifest: "sampling", by method the options as they were used, diagnostics and verdict.

    Of an ensemble, those of the first member; the verdicts of the others are in "members".
    """
    found: dict[str, dict[str, Any]] = {}
    for m, member in enumerate(plan.members):
        for scored in member.scores.methods:
            title = scored.directions.parsed().title
            for job in member.fits.values():
                if isinstance(job, SampleJob) and job.url in scored.directions.fits:
                    told = diagnostics_of(job)
                    if m == 0:
                        found[title] = {"options": settled_of(job)["sampling"], **told}
                    else:
                        found[title].setdefault("members", []).append({"seed": member.seed, "verdict": told["verdict"]})
    return {"sampling": found}


def warnings(sampling: dict[str, dict[str, Any]]) -> list[str]:
    """A line for every sentence of every verdict."""
    said = []
    for title, told in sampling.items():
        said += [f"{title}: {sentence}" for sentence in told["verdict"]]
        said += [f"{title}, seed {member['seed']}: {line}" for member in told.get("members", []) for line in member["verdict"]]
    return said
