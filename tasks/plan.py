"""What a run will do, decided before it is done: its members, their fits, directions and scores, and the fingerprint of each."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from tasks import chain, choose
from tasks.candidates import CandidateJob
from tasks.chain import Earlier, training_artifact
from tasks.cutter import ARTIFACTS, Cutter, FitJob, Member, sized
from tasks.prepare import Inputs, Request
from tasks.scores import ScoreJob
from tasks.subject import open_subject, read_checkpoint
from tda import checkpoint, location
from tda.fingerprint import fingerprint
from tda.methods import Method, parse_all
from tda.problem import measurement_of
from tda.schema import SIGN

__all__ = ["ARTIFACTS", "FitJob", "Member", "Plan", "plan", "seeds", "training_artifact"]


@dataclass(frozen=True)
class Plan:
    """What a run will do: one member per trained model (usually one), and the fingerprint of the whole.

    stages: those before the one that is attributed, the latest first, where a method attributes to them. candidates: what chooses the
    training examples that are scored, where not all of one set are.
    """

    request: Request
    inputs: Inputs
    members: tuple[Member, ...]
    fingerprint: str
    stages: tuple[Earlier, ...] = ()
    candidates: CandidateJob | None = None

    @property
    def first(self) -> Member:
        """The member that stands for all where they are alike: blocks, methods, sizes."""
        return self.members[0]

    @property
    def methods(self) -> list[Method]:
        """The methods, in the order of the configuration."""
        return parse_all([json.loads(text) for text in self.request.methods])

    def placed(self, run_url: str) -> Plan:
        """The same, with results in a run's folder: members of an ensemble have their own folders in it."""
        many = len(self.members) > 1
        members = []
        for m, member in enumerate(self.members):
            url = location.join(run_url, "members", str(m)) if many else run_url
            job = replace(member.scores, results=location.join(url, "results.zarr"), receipts=location.join(url, "receipts"))
            members.append(replace(member, scores=job))
        return replace(self, members=tuple(members), stages=tuple(stage.placed(run_url) for stage in self.stages))


def seeds(request: Request) -> range:
    """The seed of each member."""
    return range(request.seed, request.seed + request.ensemble)


def plan(request: Request, inputs: Inputs) -> Plan:
    """Decide a run. Where the request names no checkpoint, the trained artifacts are used; they must be there."""
    members = tuple(_member(request, inputs, seed) for seed in seeds(request))
    asked = [[*member.fingerprints()["directions"].values(), *member.scores.cut] for member in members]
    titles = [method.title for method in parse_all([json.loads(text) for text in request.methods])]
    stages = chain.plan(request, inputs, members[0])
    more: dict[str, Any] = {"stages": [stage.asked for stage in stages]} if stages else {}
    chosen, members, stages = choose.plan(request, inputs, members, stages)
    more |= {"candidates": [chosen.asked.on, chosen.url.rpartition("/")[2]]} if chosen else {}
    # Where candidates are scored there is no self-influence, and asking for it makes no other run.
    own = members[0].scores.self_influence
    whole = fingerprint("run", members=asked, titles=titles, self_influence=own, seed=request.seed, **more)
    return Plan(request, inputs, members, whole, stages, chosen)


def _member(request: Request, inputs: Inputs, seed: int) -> Member:
    subject = request.subject
    if not subject.checkpoint:
        artifact = training_artifact(request, inputs, seed, chain.start(request, inputs))
        subject = replace(subject, checkpoint=location.join(artifact, "weights.safetensors"))
    weights = checkpoint.digest(read_checkpoint(subject.checkpoint))
    seen = fingerprint("inputs", digests=[inputs.problem, inputs.train, inputs.query])
    subject = replace(subject, weights=weights, source=inputs.problem, inputs=seen)
    methods = parse_all([json.loads(text) for text in request.methods])
    cut = sized(request, inputs, open_subject(subject).attributed, [rank for method in methods for rank in [method.rank] * method.passes])
    cutter = Cutter(request, inputs, subject, seed, cut.batch, cut.shard, cut.tokens)
    fits: dict[str, FitJob] = {}
    scored = tuple(cutter.scored(method, cut.block(method, 1), fits) for method in methods)
    job = ScoreJob(
        subject, scored, "", "", inputs.examples, inputs.queries, cut.shard, cut.queries, cut.scoring, request.products,
        request.self_influence, scoring_tokens=cut.scoring_tokens,
    )  # fmt: skip
    return Member(subject, seed, fits, job)


def stated(plan: Plan) -> dict[str, Any]:
    """What stands both in the manifest and beside the arrays: methods, sign, units and the measurement."""
    return {
        "methods": [method.title for method in plan.methods],
        "sign": SIGN,
        "units": {method.title: method.unit for method in plan.methods},
        "measurement": measurement_of(open_subject(plan.first.subject).attributed.problem),
    }


def results_attrs(plan: Plan, run_id: str) -> dict[str, Any]:
    """Attributes of results.zarr: sign, units, damping and the measurement stand beside the numbers."""
    damping = {method.title: getattr(method, "damping", None) for method in plan.methods}
    return {"run_id": run_id, **stated(plan), "damping": damping}


def described(plan: Plan) -> dict[str, Any]:
    """The plan's fingerprints, for the manifest; of an ensemble's artifacts those of the first member."""
    chosen = plan.candidates
    urls = [chosen.url, *(job.url for job in chosen.embedded)] if chosen else []
    return {
        **plan.first.fingerprints(),
        **({"candidates": [url.rpartition("/")[2] for url in urls]} if urls else {}),
        "train_data": plan.inputs.train,
        "query_data": plan.inputs.query,
        "problem": plan.inputs.problem,
        "run": plan.fingerprint,
    }
