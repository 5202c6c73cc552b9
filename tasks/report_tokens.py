"""Heat maps over text: what single tokens of training examples, and of the query, add to a score.

Under bif by the tokens whose loss it is, from the stored losses of tokens; under gradient methods by the tokens as inputs, from the
directions and factors of the run (`tda.token_scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tda.results import NotStored
from tda.rows import rows
from tda.sampled import stored, token_scores
from tda.sampling.covariance import CORRELATION

if TYPE_CHECKING:
    from tda.results import Run
    from tda.sampling.stored import Trajectories

    _Array = np.ndarray[Any, Any]

#: Shades of a token: the strongest of a sequence's scores is the darkest.
SHADES = 6
#: Tokens of a sequence that are shown.
MOST_TOKENS = 256


class Speaks(Protocol):
    """The part of a problem that token heat maps need."""

    def train_data(self) -> Any:
        """The training set."""

    def query_data(self) -> Any:
        """The queries."""

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Texts of tokens by their places in the vocabulary."""


@dataclass(frozen=True)
class Parts:
    """Of one query and some training examples: train (train, token), and query (train, query token), where that is known.

    in_full: the query's parts are of directions in full, where those of the scores are approximated.
    """

    train: _Array
    query: _Array | None
    in_full: bool = False


#: Gives the parts under the method at a place of the run, for a query and training examples; None where it has none.
Parting = Callable[[int, int, Sequence[int]], Parts | None]


@dataclass(frozen=True)
class Token:
    """One token: its text, its score, and how it is shaded: "helpful-3", "harmful-1", or "" where it is near 0."""

    text: str
    score: float
    shade: str


@dataclass(frozen=True)
class Line:
    """A sequence as its tokens; omitted: how many are not shown."""

    tokens: tuple[Token, ...]
    omitted: int


@dataclass(frozen=True)
class Shaded:
    """One training example: its score, its tokens, and the query's tokens by what they add to that score."""

    id: int
    score: float
    train: Line
    query: Line | None


@dataclass(frozen=True)
class HeatMap:
    """Examples of one query under one method. by: "loss", the tokens whose loss it is, or "input". in_full: as `Parts` says."""

    by: str
    examples: tuple[Shaded, ...]
    in_full: bool = False


def heat_map(run: Run, problem: Speaks, place: int, query: int, train: Sequence[int], parting: Parting | None) -> HeatMap | None:
    """Training examples with their tokens shaded by their scores on a query; None where no scores of tokens are known."""
    found = _with_tokens(run, run.methods[place])
    if found is not None:
        data, title = problem.train_data(), run.methods[place]
        normalized = run.manifest.get("units", {}).get(title) == CORRELATION
        scores = token_scores(found, query, train, normalized=normalized)
        rows = [_line(problem, _labels(data[i]), row, run.better) for i, row in zip(train, scores, strict=True)]
        # Correlations of tokens do not add up to the sequence's.
        whole = _scores(run, title, query, train) if normalized else scores.sum(1)
        return HeatMap("loss", tuple(Shaded(i, float(of), line, None) for i, of, line in zip(train, whole, rows, strict=True)))
    parts = parting(place, query, train) if parting is not None and train else None
    if parts is None:
        return None
    data, asked = problem.train_data(), _inputs(problem.query_data()[query])
    examples = []
    for k, i in enumerate(train):
        of_query = None if parts.query is None else _line(problem, asked, parts.query[k], run.better)
        examples.append(Shaded(i, float(parts.train[k].sum()), _line(problem, _inputs(data[i]), parts.train[k], run.better), of_query))
    return HeatMap("input", tuple(examples), parts.in_full)


def _scores(run: Run, title: str, query: int, train: Sequence[int]) -> _Array:
    """The stored scores of training examples on a query."""
    row = rows(run).of(query, title)
    places = {int(i): place for place, i in enumerate(row.train)}
    return row.score[[places[i] for i in train]]


def _with_tokens(run: Run, title: str) -> Trajectories | None:
    try:
        found = stored(run, title)
    except NotStored:
        return None
    return found if found.told["tokens"] else None


def _labels(example: Any) -> dict[int, int]:
    """The labelled tokens of an example, by position."""
    ids = np.asarray(example[1]).reshape(-1)
    return {int(t): int(ids[t]) for t in np.flatnonzero(ids >= 0)}


def _inputs(example: Any) -> dict[int, int]:
    """The tokens that an example puts in, by position, up to the last that is followed by a labelled one; -1 where they are not known."""
    inputs, labels = example[0], np.asarray(example[1]).reshape(-1)
    labelled = np.flatnonzero(labels >= 0)
    length = int(labelled[-1]) + 1 if len(labelled) else 0
    ids = np.asarray(inputs.get("input_ids", ()) if isinstance(inputs, Mapping) else inputs)
    known = ids.dtype.kind in "iu" and ids.ndim == 1 and len(ids) >= length
    return {t: int(ids[t]) if known else -1 for t in range(length)}


def _line(problem: Speaks, ids: Mapping[int, int], scores: _Array, better: str) -> Line:
    shown = list(ids)[:MOST_TOKENS]
    largest = float(np.abs(scores).max(initial=0)) or 1.0
    texts = _texts(problem, [ids[t] for t in shown])
    tokens = (Token(text, float(scores[t]), _shade(float(scores[t]) / largest, better)) for text, t in zip(texts, shown, strict=True))
    return Line(tuple(tokens), len(ids) - len(shown))


def _texts(problem: Speaks, ids: list[int]) -> list[str]:
    """What the problem calls tokens; their places in the vocabulary where it cannot, their positions where these are not known."""
    if any(i < 0 for i in ids):
        return [str(t) for t in range(len(ids))]
    try:
        texts = [str(text) for text in problem.tokens(ids)]
    except Exception:  # noqa: BLE001  (a user's tokens may raise anything, and must not cost the report of a finished run)
        texts = []
    return texts if len(texts) == len(ids) else [str(i) for i in ids]


def _shade(share: float, better: str) -> str:
    """The class of a score that is `share` of the largest."""
    level = round(SHADES * abs(share))
    return f"{'helpful' if (share < 0) == (better == 'lower') else 'harmful'}-{level}" if level else ""
