"""The manifest and the report: what a run states about itself, written last."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

import tda
from infra import storage
from tasks.prepare import Plan, described, stated
from tasks.report import write_report
from tasks.subject import open_subject
from tda import location, results
from tda.attributed import Attributed
from tda.schema import SCHEMA_VERSION

_LIBRARIES = ("torch", "numpy", "zarr", "xarray", "dask", "prefect", "s3fs")


def first_manifest(plan: Plan, run_id: str, created: str, config: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that starts: complete is False."""
    seeds = {"run": plan.request.seed} | {f"fisher ({key})": job.seed for key, job in plan.fits.items() if key == "sampled"}
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "complete": False,
        "created": created,
        "problem": plan.subject.problem,
        "config": config,
        "versions": {"tda": tda.__version__, "python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "fingerprints": described(plan),
        "seeds": seeds,
        "shape": {"train": plan.inputs.examples, "query": plan.inputs.queries},
        "coverage": coverage(open_subject(plan.subject).attributed),
        **stated(plan),
        "noise": noise(plan),
        "notes": notes(plan),
    }


def coverage(attributed: Attributed) -> dict[str, Any]:
    """Which share of the parameters is attributed, how each layer is treated, and what is left out, by name and reason."""
    layers = [
        {
            "name": block.name,
            "kind": block.kind,
            "parameters": block.size,
            "shape": [block.out * block.groups, block.in_],
            "positions": block.positions,
            "structure": block.structure,
            "note": block.remark,
        }
        for block in attributed.blocks
    ]
    skipped = [{"name": s.name, "parameters": s.parameters, "reason": s.reason} for s in attributed.skipped]
    attributed_count = sum(block.size for block in attributed.blocks)
    return {"parameters": attributed.total, "attributed": attributed_count, "share": attributed.share, "layers": layers, "skipped": skipped}


def notes(plan: Plan) -> list[str]:
    """What a reader of the scores should know."""
    blocks = open_subject(plan.subject).attributed.blocks
    said = [f"{b.name}: diagonal curvature ({b.size} parameters without Kronecker structure)" for b in blocks if b.structure == "diagonal"]
    said += [f"{b.name}: {b.remark}" for b in blocks if b.remark]
    said += [f"{m.title}: a cosine; it ranks examples and predicts no change" for m in plan.scores.parsed() if m.cosine]
    return said


def noise(plan: Plan) -> dict[str, str]:
    """What was sampled, and how; empty where nothing was."""
    fit = plan.fits.get("sampled")
    if fit is None:
        return {}
    return {"the Fisher's labels": f'one draw per example, seed {fit.seed}; the scores hold its noise, fisher = "exact" has none'}


def separable_errors(plan: Plan, found: dict[str, float]) -> dict[str, float]:
    """The relative error reached, for the methods that allow a separable form."""
    return {method.title: found[method.title] for method in plan.scores.parsed() if getattr(method, "separable", 0.0) > 0}


def used_damping(plan: Plan) -> dict[str, dict[str, float]]:
    """lambda by method and layer, for the methods that have one."""
    blocks = open_subject(plan.subject).attributed.blocks
    found = {}
    for method, factors in zip(plan.scores.parsed(), plan.scores.factors(), strict=True):
        if method.curvature:
            used = [method.damping_of(factor) or 0.0 for factor in factors]
            found[method.title] = {block.name: value for block, value in zip(blocks, used, strict=True)}
    return found


def layer_share(plan: Plan, receipts: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each layer's share of the sum of absolute scores, by method."""
    mass = torch.tensor([receipt["mass"] for receipt in receipts], dtype=torch.float64).sum(0)
    share = mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    names = [block.name for block in open_subject(plan.subject).attributed.blocks]
    return {method.title: dict(zip(names, row, strict=True)) for method, row in zip(plan.scores.parsed(), share.tolist(), strict=True)}


def write_page(plan: Plan, run_url: str, manifest: dict[str, Any]) -> None:
    """Write the report of a run whose arrays are all there."""
    run = results.Run(run_url, {**manifest, "complete": True})
    storage.write_bytes(location.join(run_url, "report.html"), write_report(run, open_subject(plan.subject).attributed.problem))


def complete(run_url: str, manifest: dict[str, Any]) -> None:
    """Write the manifest with complete = True in one object: from then on readers see the run."""
    storage.write_json(location.join(run_url, "run.json"), {**manifest, "complete": True})
