"""Leaving out one example, or the most helpful ones: what is retrained, and how predictions are held against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tda.evaluation import subsets
from tda.results import ranking


def leave_one_out(examples: int, ids: np.ndarray) -> np.ndarray:
    """Subsets (1 + left_out, train) bool: everything, then everything but each of the examples `ids`."""
    return subsets.without(examples, [np.empty(0, np.int64), *(np.array([i]) for i in ids)])


def effects(measurement: np.ndarray) -> np.ndarray:
    """What adding each example did, (left_out, seed, query): f(everything) - f(all but i), paired by seed.

    measurement (1 + left_out, seed, query) of the subsets of `leave_one_out`. In the sign of influence, which predicts it.
    """
    found: np.ndarray = measurement[:1] - measurement[1:]
    return found


def alone(examples: int, ids: np.ndarray) -> np.ndarray:
    """Groups of one example each, (left_out, train) bool: with these as masks, a prediction is the example's own influence."""
    return ~subsets.without(examples, [np.array([i]) for i in ids])


def removed_count(examples: int, share: float) -> int:
    """How many examples a share of the training set is: at least one, and not all."""
    return min(max(1, round(share * examples)), examples - 1)


def most_helpful(scores: np.ndarray, shares: Sequence[float], better: Literal["lower", "higher"]) -> list[np.ndarray]:
    """The most helpful training examples of one query, for each share. scores (train,)."""
    order = ranking(scores, kind="helpful", better=better)
    return [order[: removed_count(len(scores), share)] for share in shares]


def at_random(examples: int, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """So many training examples at random: what a removal is to be compared with; those of a share hold those of a smaller one."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(examples)
    return [order[: removed_count(examples, share)] for share in shares]


def harm(whole: np.ndarray, removed: np.ndarray, better: Literal["lower", "higher"]) -> np.ndarray:
    """How much worse measurements (..., ) became by a removal: positive is worse, in the units of the measurement."""
    found: np.ndarray = removed - whole if better == "lower" else whole - removed
    return found
