"""The tiny problem of the flows' tests as jobs of tasks, run in this process."""

import json
from pathlib import Path

from flows.attribute import request_of
from flows.config import load_config
from tasks import factors, layout, prepare, training
from tasks import plan as plans
from tests.flows.runs import CONFIG, PROBLEM, write_config


def planned(folder: Path, store: str, *overrides: str, text: str = CONFIG, problem: str = PROBLEM) -> plans.Plan:
    """A trained checkpoint in the store, and the plan of the run."""
    request = request_of(load_config(write_config(folder, text, problem), overrides, store))
    inputs = prepare.examine(request)
    if not request.subject.checkpoint:
        for seed in plans.seeds(request):
            training.train((request.subject, seed, plans.training_artifact(request, inputs, seed)))
    return plans.plan(request, inputs)


def fit(job: factors.FactorJob, order: int = 1) -> None:
    """All tasks of a fit; within a stage in order (1) or backwards (-1)."""
    factors.create_factors(job)
    for sums in ("covariance", "eigenvalues"):
        nodes = factors.leaves(job, sums)
        for stage, level in ((factors.sum_shard, nodes), *((factors.reduce_node, level) for level in factors.levels(job, sums))):
            for node in level[::order]:
                stage(node)
        if sums == "covariance":
            for layer in list(range(3))[::order]:
                factors.decompose_layer((job, layer))
    factors.finish_factors(job)
    assert layout.is_complete(job.url)


def options(plan: plans.Plan) -> list[dict]:
    return [json.loads(text) for text in plan.request.methods]
