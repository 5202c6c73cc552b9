"""How well scores of the pre-training set find the documents that state what is asked: ranks by method, training and query.

<first run>/evaluation/<fingerprint>/    results.zarr, league.csv, report.html; complete.json last
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

import tda
from tda import location
from tda.errors import InputError
from tda.evaluation import subsets, tracing
from tda.fingerprint import fingerprint
from tda.problem import Problem, Split, load_problem
from tda.results import Run
from tda.retrieval.embedding import encoder_digest, open_encoder

#: Raised by one when what is computed or stored here changes.
ARRAYS = 2
#: How many of the nearest documents recall looks at.
NEAREST = 10
At = Literal["both", "finetuned", "pretrained", "text"]
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """One line of the league table.

    label, family: its name, and that of its damping sweep. damping: as configured. at: "both" checkpoints for a method that knows both
    stages, "finetuned" or "pretrained" for one that scores at one, "text" for what sees no weights. runs: URLs, one per training, empty
    where texts are compared. title: the method's name in them.
    """

    label: str
    family: str
    damping: str
    at: At
    runs: tuple[str, ...]
    title: str


@dataclass(frozen=True)
class Tracing:
    """One evaluation of fact tracing.

    run: URL of the run of the first training; answers: the URLs of those of all trainings. problem, corpus: the fine-tuning's and the
    pre-training's problem with their options as JSON. seeds: of the trainings. options: JSON of the [evaluation] table.
    """

    run: str
    rows: tuple[Row, ...]
    answers: tuple[str, ...]
    problem: tuple[str, str]
    corpus: tuple[str, str]
    seeds: tuple[int, ...]
    options: str

    @property
    def told(self) -> dict[str, Any]:
        """The [evaluation] table."""
        found: dict[str, Any] = json.loads(self.options)
        return found

    @cached_property
    def url(self) -> str:
        """Where it lies, by everything that determines it."""
        names = [{**asdict(row), "runs": [url.rpartition("/")[2] for url in row.runs]} for row in self.rows]
        told = self.told
        folder = told.pop("embedding")  # where an encoder lies says nothing about its numbers
        asked = {"rows": names, "seeds": self.seeds, "options": told, "version": tda.__version__, "arrays": ARRAYS}
        asked |= {"gold": [ids.tolist() for ids in gold_of(self)]}
        if folder:
            asked |= {"encoder": encoder_digest(folder)}
        return location.join(self.run, "evaluation", fingerprint("tracing", **asked))


def gold_of(job: Tracing) -> list[_Array]:
    """The gold documents of every query, as the fine-tuning's problem says.

    Raises:
        InputError: it does not say, or names documents that are not there.
    """
    return gold(_opened(job.problem), documents_of(job))


def documents_of(job: Tracing) -> int:
    """How many documents the pre-training has."""
    return len(_opened(job.corpus).train_data())


def gold(problem: Problem, documents: int) -> list[_Array]:
    """The same of a problem. Raises InputError where it does not say, or names documents that are not there."""
    found = [problem.gold(query) for query in range(len(problem.query_data()))]
    silent = next((query for query, ids in enumerate(found) if ids is None), None)
    if silent is not None:
        name = type(problem).__name__
        raise InputError(
            f"{name}.gold({silent}) does not say which documents state what is asked; let it return ids in the pre-training set"
        )
    return tracing.check_gold([ids for ids in found if ids is not None], documents)


def check_encoder(folder: str) -> None:
    """InputError where evaluation.embedding is no folder of an encoder."""
    try:
        open_encoder(folder)
    except InputError as error:
        raise InputError(f"evaluation.embedding: {error}") from error


def _opened(named: tuple[str, str]) -> Problem:
    return load_problem(named[0], json.loads(named[1]))


@dataclass(frozen=True)
class Found:
    """rank, recall (method, seed, query); answer (seed, query): the measurement of the fine-tuned model; tuning (query,) bool."""

    rank: _Array
    recall: _Array
    answer: _Array
    tuning: _Array


def measure(job: Tracing) -> Found:
    """Rank every query's gold documents under every method and training, one method's scores in memory at a time."""
    ids = gold_of(job)
    texts = dict(_by_text(job))
    ranks = np.empty((len(job.rows), len(job.seeds), len(ids)))
    shares = np.empty_like(ranks)
    for r, row in enumerate(job.rows):
        for s in range(len(job.seeds)):
            if s and not row.runs:  # no training changes it
                ranks[r, s], shares[r, s] = ranks[r, 0], shares[r, 0]
                continue
            scores = relevance(_run(row.runs[s]), row) if row.runs else texts[row.title]()
            ranks[r, s], shares[r, s] = tracing.first_ranks(scores, ids), tracing.recalls(scores, ids, NEAREST)
    answers = np.stack([_run(url).query_measurement.to_numpy().astype(np.float64) for url in job.answers])
    return Found(ranks, shares, answers, subsets.tuning(len(ids), job.told["tuning_queries"], job.told["seed"]))


def _run(url: str) -> Run:
    return Run(url, location.read_json(location.join(url, "run.json")))


def relevance(run: Run, row: Row) -> _Array:
    """Scores (query, train) of the pre-training set by one method, higher where a document helps more."""
    scores = run.influence_on("pretraining") if row.at == "both" else run.influence
    found: _Array = scores.sel({"method": row.title}).to_numpy().astype(np.float64)
    return -found if run.better == "lower" else found


def _by_text(job: Tracing) -> Iterator[tuple[str, Any]]:
    """What compares texts, by title: functions that give scores (query, train)."""
    from tda.retrieval.bm25 import bm25_scores
    from tda.retrieval.embedding import embed

    def scored(kind: str, answer: bool) -> _Array:
        asked, documents = texts(_opened(job.problem), "query", answer=answer), texts(_opened(job.corpus), "train")
        if kind == "bm25":
            return bm25_scores(asked, documents)
        folder = job.told["embedding"].removeprefix("file://")
        found: _Array = embed(asked, folder) @ embed(documents, folder).T
        return found

    for kind in ("bm25", "embedding"):
        for answer in (False, True):
            yield text_title(kind, answer), lambda kind=kind, answer=answer: scored(kind, answer)


def text_title(kind: str, answer: bool) -> str:
    """The label of a comparison of texts: of the question alone, or with its answer."""
    return f"{kind}-with-answer" if answer else kind


def texts(problem: Problem, split: Split, *, answer: bool = True) -> list[str]:
    """The texts of a split, as `describe` shows them: a prompt with its completion, or alone.

    Raises:
        InputError: an example is shown by something else.
    """
    data = problem.train_data() if split == "train" else problem.query_data()
    found = []
    for i in range(len(data)):
        shown = problem.describe(split, i)
        if isinstance(shown, Mapping) and {"prompt", "completion"} <= shown.keys():
            shown = f"{shown['prompt']} {shown['completion']}" if answer else shown["prompt"]
        if not isinstance(shown, str):
            raise InputError(
                f"{type(problem).__name__}.describe({split!r}, {i}) is a {type(shown).__name__}, and BM25 and embeddings compare texts; "
                "return text, or set evaluation.bm25 = false and leave evaluation.embedding out"
            )
        found.append(shown)
    return found


def choose(families: Sequence[str], reciprocal: _Array, tuning: _Array) -> list[int]:
    """The methods that are compared: of each sweep the one with the largest mean reciprocal rank (method, query) on the tuning queries."""
    best: dict[str, int] = {}
    for m, family in enumerate(families):
        if family not in best or (tuning.any() and reciprocal[m, tuning].mean() > reciprocal[best[family], tuning].mean()):
            best[family] = m
    return sorted(best.values())
