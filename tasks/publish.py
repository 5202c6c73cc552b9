"""The manifest and the report: what a run states about itself, written last."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from typing import Any

import torch

import tda
from infra import storage
from tasks import stage_facts
from tasks.dense import load_spectra
from tasks.directions import load_fit, told
from tasks.factors import FactorJob
from tasks.plan import Member, Plan, described, stated
from tasks.report import write_report
from tasks.report_parts import parting
from tasks.subject import open_subject
from tda import checksums, location, results
from tda.attributed import Attributed
from tda.problem import load_problem
from tda.schema import SCHEMA_VERSION

_LIBRARIES = ("torch", "numpy", "zarr", "xarray", "dask", "prefect", "s3fs")


def first_manifest(plan: Plan, run_id: str, created: str, config: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that starts: complete is False."""
    seeds = {"run": plan.request.seed} | {f"fisher ({key})": seed for key, seed in _sampled(plan).items()}
    told_of_stages = {"stages": stage_facts.first(plan)} if plan.stages else {}
    if len(plan.members) > 1:
        seeds |= {f"member {m}": member.seed for m, member in enumerate(plan.members)}
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "complete": False,
        "created": created,
        "problem": plan.first.subject.problem,
        "config": config,
        "versions": {"tda": tda.__version__, "python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "fingerprints": described(plan),
        "seeds": seeds,
        "shape": {"train": plan.inputs.examples, "query": plan.inputs.queries},
        "coverage": coverage(open_subject(plan.first.subject).attributed),
        **stated(plan),
        **({"members": [member.fingerprints() for member in plan.members]} if len(plan.members) > 1 else {}),
        "noise": noise(plan),
        "notes": notes(plan),
        **told_of_stages,
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
    attributed = open_subject(plan.first.subject).attributed
    blocks = attributed.blocks
    said = list(attributed.problem.notes())
    said += [f"{b.name}: diagonal curvature ({b.size} parameters without Kronecker structure)" for b in blocks if b.structure == "diagonal"]
    said += [f"{b.name}: {b.remark}" for b in blocks if b.remark]
    said += [f"{m.title}: a cosine; it ranks examples and predicts no change" for m in plan.methods if m.cosine]
    said += [f"{m.title}: a correlation; it ranks examples and predicts no change" for m in plan.methods if m.unit == "correlation"]
    return said


def noise(plan: Plan) -> dict[str, str]:
    """What was sampled, and how; empty where nothing was."""
    found = {}
    if sampled := sorted(set(_sampled(plan).values())):
        drawn = f"one draw per example, seed {', '.join(map(str, sampled))}"
        found["the Fisher's labels"] = f'{drawn}; the scores hold its noise, fisher = "exact" has none'
    for method in plan.methods:
        if method.stochastic:
            found[method.title] = method.noise
    if len(plan.members) > 1:
        found["the training's seed"] = f"scores are means over {len(plan.members)} models, with standard errors in run.stderr"
    return found


def _sampled(plan: Plan) -> dict[str, int]:
    """The seeds of the fits whose labels are drawn."""
    each = list(plan.first.fits.items())
    each += [(f"{key}, {stage.name}", job) for stage in plan.stages for key, job in stage.member.fits.items()]
    return {key: job.seed for key, job in each if isinstance(job, FactorJob) and job.fisher == "sampled"}


def used_damping(member: Member) -> dict[str, dict[str, float]]:
    """lambda by method and layer, for the methods that have one."""
    blocks = open_subject(member.subject).attributed.blocks
    found: dict[str, dict[str, float]] = {}
    for scored in member.scores.methods:
        job, method = scored.directions, scored.directions.parsed()
        each_fit = zip(method.fits, job.fits, strict=True)
        curvature = [load_spectra(url, vectors=False) if fit.kind == "dense" else load_fit(fit, url, job.subject) for fit, url in each_fit]
        used = method.damping_of(curvature)
        if used is None:
            used = told(job)[0].get("damping")
        if used is not None:
            each = used if isinstance(used, list) else [used] * len(blocks)
            found[method.title] = {block.name: value for block, value in zip(blocks, each, strict=True)}
    return found


def layer_share(member: Member, receipts: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each layer's share of the sum of absolute scores, by method."""
    mass = torch.tensor([receipt["mass"] for receipt in receipts], dtype=torch.float64).sum(0)
    share = mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    names = [block.name for block in open_subject(member.subject).attributed.blocks]
    rows = zip(member.scores.parsed(), share.tolist(), strict=True)
    return {method.title: dict(zip(names, row, strict=True)) for method, row in rows if any(row)}  # direct scores have no layers


def write_page(plan: Plan, run_url: str, manifest: dict[str, Any]) -> None:
    """Write the report of a run whose arrays are all there."""
    run = results.Run(run_url, {**manifest, "complete": True})
    stages = {stage.name: load_problem(stage.member.subject.problem, json.loads(stage.member.subject.options)) for stage in plan.stages}
    page = write_report(run, open_subject(plan.first.subject).attributed.problem, stages=stages, parting=parting(plan))
    storage.write_bytes(location.join(run_url, "report.html"), page)


def complete(run_url: str, manifest: dict[str, Any]) -> None:
    """Write the manifest with complete = True in one object: from then on readers see the run."""
    storage.write_json(location.join(run_url, "run.json"), checksums.signed({**manifest, "complete": True}))
