"""The manifest and the report: what a run states about itself, written last."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

import tda
from infra import storage
from tasks.prepare import Plan, described, results_attrs
from tasks.report import write_report
from tasks.subject import open_subject
from tda import location, results
from tda.modules import Attributed
from tda.problem import measurement_of
from tda.schema import SCHEMA_VERSION, SIGN

_LIBRARIES = ("torch", "numpy", "zarr", "xarray", "dask", "prefect", "s3fs")


def first_manifest(plan: Plan, run_id: str, created: str, config: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that starts: complete is False."""
    opened, methods = open_subject(plan.subject), plan.scores.parsed()
    problem = opened.attributed.problem
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
        "measurement": measurement_of(problem),
        "methods": [method.title for method in methods],
        "shape": {"train": plan.inputs.examples, "query": plan.inputs.queries},
        "coverage": coverage(opened.attributed),
        "sign": SIGN,
        "units": {method.title: method.unit for method in methods},
        "noise": {},
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
    if "sampled" in plan.fits:
        said.append('the Fisher\'s labels are sampled, one per example: its noise is not part of the scores; fisher = "exact" has none')
    return said


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


def publish(plan: Plan, run_url: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the report, then the manifest with complete = True in one object: from then on readers see the run."""
    finished = {**manifest, "complete": True}
    run = results.Run(run_url, finished)
    page = write_report(run, open_subject(plan.subject).attributed.problem)
    storage.write_bytes(location.join(run_url, "report.html"), page)
    storage.write_json(location.join(run_url, "run.json"), finished)
    return finished


__all__ = ["coverage", "first_manifest", "layer_share", "publish", "results_attrs", "used_damping"]
