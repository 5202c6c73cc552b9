"""The stages of training before the one that a run attributes, where a method attributes to them: the latest first.

Each is a problem at a checkpoint, like the run's own: with fits that other runs share, directions (made of what the stage after it passes
on, `tda.carried`), and scores of its training set, which lie in the run's folder:

    stages/<name>/results.zarr, stages/<name>/receipts      name: "pretraining", "pretraining.pretraining", ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tasks import layout
from tasks.cutter import Cutter, FitJob, Member, sized
from tasks.directions import Carried, DirectionJob
from tasks.prepare import Inputs, Request, check_batches, check_method, check_precision, digested, probe, telling
from tasks.scores import ScoreJob
from tasks.subject import Subject, open_subject, read_checkpoint
from tda import carried, checkpoint, location
from tda.carried import Matched
from tda.data import length
from tda.errors import InputError
from tda.fingerprint import fingerprint
from tda.methods import parse_all
from tda.methods.multistage import Multistage, Pretraining, Stage
from tda.problem import can_fit, problem_digest


@dataclass(frozen=True)
class Asked:
    """A stage as methods name it: the request for a run of its problem, and by method's title how it is asked."""

    name: str
    request: Request
    by: Mapping[str, tuple[Multistage, Stage]]


@dataclass(frozen=True)
class Earlier:
    """What is done for one stage. matched: parameters shared with the stage after it; shift: relative, between their checkpoints."""

    name: str
    member: Member
    inputs: Inputs
    matched: Matched
    shift: float

    @property
    def asked(self) -> list[Any]:
        """What its scores depend on."""
        return [self.name, *self.member.fingerprints()["directions"].items(), *self.member.scores.cut]

    @property
    def titles(self) -> list[str]:
        """The labels of the methods that attribute to it."""
        return [method.title for method in self.member.scores.parsed()]

    def placed(self, run_url: str) -> Earlier:
        """The same, with results in a run's folder."""
        url = location.join(run_url, "stages", self.name)
        job = replace(self.member.scores, results=location.join(url, "results.zarr"), receipts=location.join(url, "receipts"))
        return replace(self, member=replace(self.member, scores=job))


def asked(request: Request) -> list[Asked]:
    """The stages that a request's methods name, the latest first.

    Raises:
        InputError: two methods mean different stages by one name.
    """
    found: dict[str, Asked] = {}
    methods = [method for method in parse_all([json.loads(text) for text in request.methods]) if isinstance(method, Multistage)]
    for method in methods:
        for stage in method.stages:
            table, own = stage.table, request.subject
            subject = Subject(
                table.problem,
                json.dumps(table.problem_options, sort_keys=True),
                table.checkpoint or "",
                own.modules if table.modules is None else tuple(table.modules),
                own.exclude if table.exclude is None else tuple(table.exclude),
                own.dtype,
                autocast=own.autocast,
                recompute=own.recompute,
                device=own.device,
                scale=own.scale,
            )
            known = found.setdefault(stage.name, Asked(stage.name, replace(request, subject=subject), {}))
            others = [f"{title!r}" for title, (_, other) in known.by.items() if _meant(other.table) != _meant(table)]
            if others:
                raise InputError(
                    f"methods {others[0]} and {method.title!r} name different stages {stage.name!r}; give each a configuration of its own"
                )
            found[stage.name] = replace(known, by={**known.by, method.title: (method, stage)})
    return list(found.values())


def _meant(table: Pretraining) -> Any:
    """What of a table says which stage it is: not how its inverse is damped."""
    before = _meant(table.pretraining) if table.pretraining is not None and table.checkpoint is None else None
    return table.problem, table.problem_options, table.checkpoint, table.modules, table.exclude, before


def examine(request: Request, inputs: Inputs) -> Inputs:
    """Look at the earlier stages as `prepare.examine` does at the run's own, and add what they are to its inputs; nothing is written.

    Raises:
        InputError: in one line, what cannot be used: their problems and checkpoints, parameters that do not match by name, an ensemble.
    """
    stages = asked(request)
    if not stages:
        return inputs
    _check_company(request)
    found, later = {}, open_subject(request.subject).attributed.blocks
    for stage in stages:
        subject = stage.request.subject
        with telling(subject.problem):
            opened = open_subject(subject)
            if not subject.checkpoint and not can_fit(opened.attributed.problem):
                raise InputError(f"problem {subject.problem!r} has no fit method and stage {stage.name!r} no checkpoint; give one of them")
            check_precision(stage.request, opened)
            check_batches(stage.request, opened, ("train",))
            digest, labels = digested(opened, "train")
            probe(opened, "train")
            for method, each in stage.by.values():
                check_method(each.inverse, opened)
                carried.match(later, opened.attributed.blocks, stage.name, method.unmatched)
        later = opened.attributed.blocks
        found[stage.name] = replace(
            inputs,
            problem=problem_digest(subject.problem, json.loads(subject.options)),
            train=digest,
            examples=length(opened.train, "train"),
            train_labels=labels,
        )
    return replace(inputs, stages=found)


def _check_company(request: Request) -> None:
    """InputError where what else is asked of a run does not go with earlier stages."""
    if request.ensemble > 1:
        raise InputError(f"ensemble = {request.ensemble} trains that many models, and multistage is about one; leave one of the two out")
    for method in parse_all([json.loads(text) for text in request.methods]):
        if any(fit.kind == "retraining" for fit in method.fits):
            raise InputError(
                f"{method.title} retrains models from fresh weights, and multistage is about one that starts from others; leave one out"
            )


def training_artifact(request: Request, inputs: Inputs, seed: int, start: Subject | None = None) -> str:
    """The folder of a training of the flow's: problem, data, seed, precision and the weights that it starts from determine it.

    start: whose weights these are; None: fresh ones.
    """
    parts = {"problem": inputs.problem, "train": inputs.train, "seed": seed, "dtype": request.subject.dtype}
    parts |= {"start": start.weights} if start is not None else {}
    return layout.artifact(request.store, "checkpoint", fingerprint("checkpoint", **parts))


def subjects(stages: Sequence[Asked], inputs: Inputs) -> list[Subject]:
    """Stages at their checkpoints, the latest first. Where one names none, it is where its training ended, which must be done."""
    found: list[Subject] = []
    for stage in reversed(stages):
        subject, own = stage.request.subject, inputs.stages[stage.name]
        if not subject.checkpoint:
            folder = training_artifact(stage.request, own, stage.request.seed, found[0] if found else None)
            subject = replace(subject, checkpoint=location.join(folder, "weights.safetensors"))
        weights = checkpoint.digest(read_checkpoint(subject.checkpoint))
        seen = fingerprint("inputs", digests=[own.problem, own.train])
        found.insert(0, replace(subject, weights=weights, source=own.problem, inputs=seen))
    return found


def start(request: Request, inputs: Inputs) -> Subject | None:
    """Where the run's own training starts; None: from fresh weights."""
    return next(iter(subjects(asked(request), inputs)), None)


def training(request: Request, inputs: Inputs, name: str) -> tuple[Subject, int, str, Subject | None] | None:
    """The job of tasks.training.train for a stage; None where it names a checkpoint. Those before it must be trained already."""
    stages = asked(request)
    k = next(place for place, stage in enumerate(stages) if stage.name == name)
    own = stages[k].request
    if own.subject.checkpoint:
        return None
    before = next(iter(subjects(stages[k + 1 :], inputs)), None)
    return own.subject, request.seed, training_artifact(own, inputs.stages[name], request.seed, before), before


def plan(request: Request, inputs: Inputs, member: Member) -> tuple[Earlier, ...]:
    """Decide what is done for the earlier stages, member being that of the run's own model. Trained artifacts must be there."""
    stages, found = asked(request), list[Earlier]()
    for stage, subject in zip(stages, subjects(stages, inputs), strict=True):
        found.append(_planned(stage, inputs.stages[stage.name], subject, found[-1].member if found else member))
    return tuple(found)


def _planned(stage: Asked, inputs: Inputs, subject: Subject, later: Member) -> Earlier:
    moved = open_subject(later.subject).attributed
    attributed, request, blocks = open_subject(subject).attributed, stage.request, moved.blocks
    matched = carried.match(blocks, attributed.blocks, stage.name, "drop")  # what is refused was, when it was examined
    cut = sized(request, inputs, attributed, [None] * len(stage.by))
    cutter = Cutter(request, inputs, subject, request.seed, cut.batch, cut.shard, cut.tokens)
    passed: dict[str, DirectionJob] = {scored.directions.parsed().title: scored.directions for scored in later.scores.methods}
    fits: dict[str, FitJob] = {}
    scored = tuple(
        cutter.carried(each.inverse, Carried(passed[title], blocks, each.proximity), cut.block(each.inverse, 2), fits)
        for title, (_, each) in stage.by.items()
    )
    job = ScoreJob(
        subject, scored, "", "", inputs.examples, inputs.queries, cut.shard, cut.queries, cut.scoring, request.products,
        self_influence=False, scoring_tokens=cut.scoring_tokens,
    )  # fmt: skip
    weights = [dict(each.model.named_parameters()) for each in (moved, attributed)]
    shift = carried.shift(weights[0], weights[1], matched.names)
    return Earlier(stage.name, Member(subject, request.seed, fits, job), inputs, matched, shift)
