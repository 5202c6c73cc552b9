"""What a run states of the stages before the one that it attributes: in its manifest under "stages", by name."""

from __future__ import annotations

import json
from typing import Any

from tasks.chain import Earlier, asked
from tasks.plan import Plan
from tda.methods.multistage import Multistage
from tda.problem import load_problem, measurement_of
from tda.recipe import Recipe
from tda.schema import SIGN

#: Beyond this relative shift of the parameters, a quadratic around where fine-tuning began says little of where it ended.
LARGEST_SHIFT = 0.1


def first(plan: Plan) -> dict[str, Any]:
    """What is known when the run starts: problem, shape, fingerprints, methods, what the stage after shares with it, how far that moved."""
    by = {stage.name: stage.by for stage in asked(plan.request)}
    return {stage.name: _facts(stage, {title: each.proximity for title, (_, each) in by[stage.name].items()}) for stage in plan.stages}


def _facts(stage: Earlier, proximity: dict[str, float]) -> dict[str, Any]:
    found = stage.matched
    return {
        "problem": stage.member.subject.problem,
        "checkpoint": stage.member.subject.checkpoint,
        "methods": stage.titles,
        "shape": {"train": stage.inputs.examples, "query": stage.inputs.queries},
        "fingerprints": {**stage.member.fingerprints(), "train_data": stage.inputs.train, "problem": stage.inputs.problem},
        "proximity": proximity,
        "shared": {
            "parameters": found.shared,
            "share": found.shared / found.later,
            "share_of_stage": found.shared / found.earlier,
            "only_later": list(found.only_later),
            "only_here": list(found.only_earlier),
        },
        "shift": stage.shift,
    }


def attrs(plan: Plan, stage: Earlier, run_id: str) -> dict[str, Any]:
    """Attributes of a stage's results.zarr, beside the numbers: sign, units, damping, and that N is of this stage."""
    units = {method.title: method.unit for method in stage.member.scores.parsed()}
    problem = load_problem(plan.first.subject.problem, json.loads(plan.first.subject.options))
    damping = {method.title: getattr(method, "damping", None) for method in stage.member.scores.parsed()}
    stated = {"methods": stage.titles, "sign": SIGN, "units": units, "measurement": measurement_of(problem), "damping": damping}
    return {"run_id": run_id, "stage": stage.name, "examples": stage.inputs.examples, **stated}


def warnings(plan: Plan) -> list[str]:
    """A line for every stage that was left far behind or shares not all, and where a recipe pulled otherwise than a method says."""
    said = []
    for stage in plan.stages:
        if stage.shift > LARGEST_SHIFT:
            said.append(
                f"{stage.name}: the weights moved by {stage.shift:.1%} of their norm from there, more than {LARGEST_SHIFT:.0%}; "
                "the chain takes the objective as quadratic that far, so check scores by retraining, or raise the proximity"
            )
        found = stage.matched
        if lost := (*found.only_later, *found.only_earlier):
            said.append(
                f"{stage.name}: {found.shared / found.later:.1%} of the later stage's attributed parameters are shared; left out of the "
                f"chain: {', '.join(lost[:5])}{f' and {len(lost) - 5} more' if len(lost) > 5 else ''}"
            )
    return said + _recipes(plan)


def _recipes(plan: Plan) -> list[str]:
    """A line where the run trained the fine-tuned model by a recipe of another proximity than a method's."""
    if plan.request.subject.checkpoint:
        return []
    recipe: Recipe | None = load_problem(plan.first.subject.problem, json.loads(plan.first.subject.options)).recipe()
    return [
        f"{method.title}: proximity is {method.proximity:g}, and that of the training's recipe {recipe.proximity:g}; make them the same"
        for method in plan.methods
        if isinstance(method, Multistage) and recipe is not None and recipe.proximity != method.proximity
    ]
