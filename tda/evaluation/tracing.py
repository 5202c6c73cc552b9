"""Fact tracing: are the documents that state what a query asks found first? Mean reciprocal rank, and recall among the first ten."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tda.errors import InputError


def check_gold(gold: Sequence[Sequence[int]], examples: int) -> list[np.ndarray]:
    """The gold ids of every query, sorted, each an int64 array.

    Raises:
        InputError: a query has none, one twice, or one that is no training example.
    """
    found = []
    for query, ids in enumerate(gold):
        each = np.sort(np.asarray(ids, np.int64).ravel())
        if not len(each):
            raise InputError(f"query {query} has no gold document: problem.gold({query}) is empty; leave the query out")
        if each[0] < 0 or each[-1] >= examples:
            raise InputError(
                f"problem.gold({query}) has the id {each[0] if each[0] < 0 else each[-1]}, and documents are 0..{examples - 1}"
            )
        if (each[1:] == each[:-1]).any():
            raise InputError(f"problem.gold({query}) names document {each[1:][each[1:] == each[:-1]][0]} twice")
        found.append(each)
    return found


def first_ranks(scores: np.ndarray, gold: Sequence[np.ndarray]) -> np.ndarray:
    """The rank of each query's first gold document, (query,) float64, from 1; among documents of one score, its expectation.

    scores (query, train): higher is nearer. Of n documents that tie, g of them gold, the first gold one has on average the place
    (n + 1) / (g + 1) where ties are broken at random: the mean of all places for one, the first place where all are gold. Raises
    InputError where a score is not a number.
    """
    _check_numbers(scores)
    best = np.array([row[ids].max() for row, ids in zip(scores, gold, strict=True)])
    above, level = (scores > best[:, None]).sum(1), (scores == best[:, None]).sum(1)
    tied = np.array([(row[ids] == most).sum() for row, ids, most in zip(scores, gold, best, strict=True)])
    ranks: np.ndarray = above + (level + 1) / (tied + 1)
    return ranks


def recalls(scores: np.ndarray, gold: Sequence[np.ndarray], k: int = 10) -> np.ndarray:
    """Share of each query's gold documents among the k nearest, (query,) in [0, 1]; where scores tie for the last places, the expectation.

    scores (query, train): higher is nearer. Raises InputError where a score is not a number.
    """
    _check_numbers(scores)
    found = np.empty(len(gold))
    for q, (row, ids) in enumerate(zip(scores, gold, strict=True)):
        own = row[ids][:, None]
        above, level = (row > own).sum(1), (row == own).sum(1)
        found[q] = np.clip((k - above) / level, 0, 1).mean()
    return found


def expected_at_random(gold: Sequence[np.ndarray], examples: int, k: int = 10) -> tuple[float, float]:
    """Mean reciprocal rank and recall that an order at random has on average."""
    # P(first of g golds at rank r) = P(none before) * g / (left), for every g that occurs.
    by_count = {}
    for g in {len(ids) for ids in gold}:
        none_yet, mean = 1.0, 0.0
        for r in range(1, examples - g + 2):
            left = examples - r + 1
            mean += none_yet * (g / left) / r
            none_yet *= 1 - g / left
        by_count[g] = mean
    return float(np.mean([by_count[len(ids)] for ids in gold])), min(k, examples) / examples


def bootstrap_queries(values: np.ndarray, *, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Means over queries of `draws` resamples of them, (..., draw), of values (..., seed, query), which are averaged over seeds first.

    All methods see the same resamples, so that the difference of two methods' rows is a paired one.
    """
    means, random = values.mean(-2), np.random.Generator(np.random.Philox(seed))
    picks = random.integers(0, means.shape[-1], (draws, means.shape[-1]))
    weights = np.stack([np.bincount(row, minlength=means.shape[-1]) for row in picks]) / means.shape[-1]
    found: np.ndarray = means @ weights.T
    return found


def _check_numbers(scores: np.ndarray) -> None:
    bad = np.argwhere(np.isnan(scores))
    if len(bad):
        query, train = (int(i) for i in bad[0])
        raise InputError(f"the score of document {train} for query {query} is not a number; {len(bad)} scores are not")
