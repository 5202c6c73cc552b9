"""What the page says of a method that samples: its chains' traces, whether to trust them, and the scores of single tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tasks.report_traces import COLOURS, Traces, traces
from tda.results import NotStored
from tda.sampled import stored, token_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tda.results import Run
    from tda.sampling.stored import Trajectories

    _Array = np.ndarray[Any, Any]

#: Shades of a token: the strongest of a sequence's scores is the darkest.
SHADES = 6
#: Points of the trace of the batches' losses: one step's is mostly noise of its batch.
SMOOTHED = 150
#: Tokens of a sequence that are shown.
MOST_TOKENS = 256


class Speaks(Protocol):
    """The part of a problem that token heat maps need."""

    def train_data(self) -> Any:
        """The training set."""

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Texts of tokens by their places in the vocabulary."""


@dataclass(frozen=True)
class Token:
    """One token: its text, its score, and how it is shaded: "helpful-3", "harmful-1", or "" where it is near 0."""

    text: str
    score: float
    shade: str


@dataclass(frozen=True)
class Shaded:
    """One training example as its tokens. omitted: how many are not shown; score: of the whole."""

    id: int
    score: float
    tokens: tuple[Token, ...]
    omitted: int


def sampled(run: Run, place: int) -> dict[str, Any] | None:
    """Of a method of a run: its options, diagnostics, verdict and charts; None where it does not sample."""
    title = run.methods[place]
    told = run.manifest.get("sampling", {}).get(title)
    if told is None:
        return None
    data = run.trajectories_of(title)
    steps, burn_in, thinning = int(data.sizes["step"]), int(told["options"]["burn_in"]), int(told["options"]["thinning"])
    drawn = burn_in + thinning * (1 + np.arange(data.sizes["draw"]))
    width = -(-steps // SMOOTHED)
    each = data["batch_loss"].to_numpy()
    losses = np.stack([each[:, k : k + width].mean(1) for k in range(0, steps, width)], 1)
    charts = {
        "Loss of the batches": traces(losses, np.arange(0, steps, width), steps, burn_in),
        "Training loss above the checkpoint's": traces(data["mean_loss_train"].to_numpy(), drawn, steps, burn_in),
        "Distance from the checkpoint": traces(data["distance"].to_numpy(), drawn, steps, burn_in),
    }
    numbers = [
        {"name": "largest R-hat", "value": _known(told["r_hat"], max), "error": None},
        {"name": "effective draws, least", "value": _known(told["ess"], min), "error": None},
        {"name": "local learning coefficient", "value": told["llc"], "error": told["llc_stderr"]},
        {"name": "distance from the checkpoint", "value": told["distance"], "error": None},
    ]
    return {**told, "charts": charts, "numbers": numbers, "smoothed": width, "colours": min(COLOURS, data.sizes["chain"])}


def _known(by_series: dict[str, float | None], of: Callable[[list[float]], float]) -> float:
    found = [value for value in by_series.values() if value is not None]
    return of(found) if found else float("nan")


def heat_map(run: Run, problem: Speaks, place: int, query: int, train: Sequence[int]) -> list[Shaded] | None:
    """Training examples with their tokens shaded by their scores on a query; None where no losses of tokens are stored."""
    found = _with_tokens(run, run.methods[place])
    if found is None:
        return None
    scores = token_scores(found, query, train)
    data = problem.train_data()
    return [_sequence(problem, data, i, row, run.better) for i, row in zip(train, scores, strict=True)]


def _with_tokens(run: Run, title: str) -> Trajectories | None:
    try:
        found = stored(run, title)
    except NotStored:
        return None
    return found if found.told["tokens"] else None


def _sequence(problem: Speaks, data: Any, i: int, scores: _Array, better: str) -> Shaded:
    ids = np.asarray(data[i][1]).reshape(-1)
    labelled = np.flatnonzero(ids >= 0)
    shown = labelled[:MOST_TOKENS]
    largest = float(np.abs(scores).max(initial=0)) or 1.0
    texts = _texts(problem, [int(k) for k in ids[shown]])
    values = [float(score) for score in scores[shown]]
    tokens = [Token(text, score, _shade(score / largest, better)) for text, score in zip(texts, values, strict=True)]
    return Shaded(i, float(scores.sum()), tuple(tokens), len(labelled) - len(shown))


def _texts(problem: Speaks, ids: list[int]) -> list[str]:
    """What the problem calls tokens; their places in the vocabulary where it cannot."""
    try:
        texts = [str(text) for text in problem.tokens(ids)]
    except Exception:  # noqa: BLE001  (a user's tokens may raise anything, and must not cost the report of a finished run)
        texts = []
    return texts if len(texts) == len(ids) else [str(i) for i in ids]


def _shade(share: float, better: str) -> str:
    """The class of a score that is `share` of the largest."""
    level = round(SHADES * abs(share))
    return f"{'helpful' if (share < 0) == (better == 'lower') else 'harmful'}-{level}" if level else ""


__all__ = ["SHADES", "Traces", "heat_map", "sampled"]
