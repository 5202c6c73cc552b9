"""The candidates of a run, before anything is done: what a user can get wrong, and the jobs that choose them."""

from __future__ import annotations

from dataclasses import asdict, replace

from tasks import chain, layout
from tasks.candidates import CandidateJob, EmbeddingJob, parsed
from tasks.chain import Earlier
from tasks.cutter import Member
from tasks.prepare import PROBED, Inputs, Request, telling
from tasks.subject import Subject, open_problem, open_subject
from tda.errors import InputError
from tda.fingerprint import fingerprint
from tda.retrieval import candidates
from tda.retrieval.embedding import encoder_digest, open_encoder

OWN = "train"


def examine(request: Request, inputs: Inputs) -> Inputs:
    """Look at what the candidates are chosen by, and add its digests to a run's inputs; nothing is written.

    Only the first texts are read here; an empty one behind them is told by the shard that meets it.

    Raises:
        InputError: in one line, what cannot be used: the training set's name, counts, texts, ids, the encoder, an ensemble.
    """
    asked = parsed(request.candidates)
    if asked is None:
        return inputs
    if request.ensemble > 1:
        raise InputError(f"ensemble = {request.ensemble} averages scores of all training examples; leave it or [candidates] out")
    stages = {stage.name: stage.request.subject for stage in chain.asked(request)}
    if asked.on != OWN and asked.on not in stages:
        raise InputError(f'candidates.on = "{asked.on}" is no training set of this run; it has {", ".join([OWN, *stages])}')
    subject = request.subject if asked.on == OWN else stages[asked.on]
    examples = inputs.examples if asked.on == OWN else inputs.stages[asked.on].examples
    candidates.check_counts(asked, examples)
    asking, found = open_subject(request.subject).attributed.problem, {}
    with telling(request.subject.problem):
        if asked.gold:
            named = candidates.gold(asking, inputs.queries, examples, asked.on)
            found["gold"] = fingerprint("gold", ids=named)
        if asked.needs_text:
            candidates.texts(asking, "query", range(min(PROBED, inputs.queries)))
    if asked.embedding:
        try:
            open_encoder(asked.model)
        except InputError as error:
            raise InputError(f"candidates.model: {error}") from error
        found["encoder"] = encoder_digest(asked.model)
    if asked.needs_text:
        with telling(subject.problem):
            candidates.texts(open_problem(subject), "train", range(min(PROBED, examples)))
    return replace(inputs, candidates=found)


def plan(
    request: Request, inputs: Inputs, members: tuple[Member, ...], stages: tuple[Earlier, ...]
) -> tuple[CandidateJob | None, tuple[Member, ...], tuple[Earlier, ...]]:
    """The job that chooses the candidates, and members and stages of which one scores these alone; all as they are where none are asked."""
    asked = parsed(request.candidates)
    if asked is None:
        return None, members, stages
    own = members[0]
    corpus = own if asked.on == OWN else next(stage.member for stage in stages if stage.name == asked.on)
    data = inputs if asked.on == OWN else inputs.stages[asked.on]
    embedded = _embeddings(request, inputs, asked.model, (corpus.subject, data), own.subject) if asked.embedding else ()
    key = fingerprint(
        "candidates",
        asked={key: value for key, value in asdict(asked).items() if key not in ("on", "model")},
        train=[data.problem, data.train],
        query=[inputs.problem, inputs.query],
        digests=dict(inputs.candidates),
        seed=request.seed if asked.random else 0,
    )
    url = layout.artifact(request.store, "candidates", key)
    job = CandidateJob(url, asked, corpus.subject, own.subject, data.examples, inputs.queries, request.seed, embedded)
    sparse = replace(corpus, scores=replace(corpus.scores, candidates=url, self_influence=False))
    if asked.on == OWN:
        return job, (sparse,), stages
    return job, members, tuple(replace(stage, member=sparse) if stage.name == asked.on else stage for stage in stages)


def _embeddings(
    request: Request, inputs: Inputs, folder: str, corpus: tuple[Subject, Inputs], asking: Subject
) -> tuple[EmbeddingJob, EmbeddingJob]:
    """Those of the training set and of the queries, by one encoder."""
    encoder, (subject, data) = inputs.candidates["encoder"], corpus

    def job(subject: Subject, split: str, digests: list[str], examples: int) -> EmbeddingJob:
        url = layout.artifact(request.store, "embeddings", fingerprint("embeddings", encoder=encoder, split=split, data=digests))
        return EmbeddingJob(url, subject, split, folder, encoder, examples)  # type: ignore[arg-type]

    return (
        job(subject, "train", [data.problem, data.train], data.examples),
        job(asking, "query", [inputs.problem, inputs.query], inputs.queries),
    )
