"""The noise ceiling: how well the mean over finitely many trainings could be predicted at all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tda.errors import InputError
from tda.evaluation.lds import Interval, interval, spearman, truth

#: Splits of the seeds that each resample of the subsets is correlated over.
RESAMPLED = 20


def ceiling(measurement: np.ndarray, *, splits: int = 100, seed: int = 0, paired: bool = False) -> np.ndarray:
    """Noise ceiling per query, (query,): the correlation of the mean over seeds with the mean over infinitely many.

    measurement (subset, seed, query). The seeds of each subset are split into halves at random, the halves' means rank-correlated over
    subsets and averaged over `splits`; Spearman-Brown's formula takes that from half the seeds to all, k r / (1 + (k - 1) r), and its
    square root is the ceiling. 0 where the halves do not correlate at all.

    paired: whether rows of the same seed share noise, as differences from one model do. All rows are then split alike: what a seed adds to
    every row moves no rank within a half, where split apart it would count as noise.

    Raises:
        InputError: fewer than 2 seeds.
    """
    halves = _halves(measurement, splits, seed, paired)
    return _root(np.mean([spearman(one, other) for one, other in halves], axis=0), measurement.shape[1])


def mean_ceiling(
    measurement: np.ndarray, *, splits: int = 100, draws: int = 1000, seed: int = 0, paired: bool = False
) -> tuple[float, Interval]:
    """The ceiling of the mean over queries, with its 95% interval over resamples of the subsets: as `ceiling`, but for the order.

    Halves' correlations are averaged over queries before the root is taken. The root of each query's would be of what is left when
    negative ones, which noise alone has as often as positive ones, are put to 0: pure noise would have a ceiling. The root of a mean is
    never below the mean of roots, so that shares of this ceiling are a little low where queries differ much.
    """
    halves = list(_halves(measurement, splits, seed, paired))
    count, seeds, _ = measurement.shape
    estimate = float(np.mean([spearman(one, other) for one, other in halves]))
    random = np.random.Generator(np.random.Philox(seed))
    weights = random.multinomial(count, np.full(count, 1 / count), draws) / count
    found = np.mean([_weighted(one, other, weights).mean(1) for one, other in halves[:RESAMPLED]], axis=0)
    bounds = interval(found, estimate, within=1.0)
    top, low, high = (float(_root(np.array(value), seeds)) for value in (estimate, bounds.low, bounds.high))
    return top, Interval(low, high, bounds.level)


def _halves(measurement: np.ndarray, splits: int, seed: int, paired: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The means (query, subset) of both halves of the seeds, split after split."""
    truth(measurement)
    count, seeds, _ = measurement.shape
    if seeds < 2:
        raise InputError(f"a noise ceiling needs at least 2 training seeds per subset, got {seeds}; raise seeds")
    half, random = seeds // 2, np.random.Generator(np.random.Philox(seed))
    for _ in range(splits):
        each = np.tile(np.arange(seeds), (1 if paired else count, 1))
        order = np.broadcast_to(random.permuted(each, axis=1), (count, seeds))[:, :, None]
        mixed = np.take_along_axis(measurement, order, 1)
        yield mixed[:, :half].mean(1).T, mixed[:, half : 2 * half].mean(1).T


def _root(halves: np.ndarray, seeds: int) -> np.ndarray:
    """From the correlation of halves to that of all seeds with the truth."""
    reliability, k = np.maximum(halves, 0.0), seeds / (seeds // 2)
    root: np.ndarray = np.sqrt(k * reliability / (1 + (k - 1) * reliability))
    return root


def _weighted(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rank correlation (draw, query) of (query, subset) with weights (draw, subset) that sum to 1; ranks are those of all subsets."""
    from scipy.stats import rankdata  # half a second, which no process pays that ranks nothing

    a, b = (rankdata(values, axis=-1).T / values.shape[-1] - 0.5 for values in (one, other))
    mean_a, mean_b = weights @ a, weights @ b
    spread = np.sqrt((weights @ (a * a) - mean_a**2).clip(0) * (weights @ (b * b) - mean_b**2).clip(0))
    found: np.ndarray = np.divide(weights @ (a * b) - mean_a * mean_b, spread, out=np.zeros_like(spread), where=spread > 1e-12)
    return found
