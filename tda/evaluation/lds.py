"""The linear datamodelling score: do summed influences predict what retraining on subsets does?

    LDS_q = Spearman over subsets S of   E_seed[f_q(retrained on S)]   and   sum_{i in S} influence[q, i]

Beside it stand an interval (bootstrap over subsets) and a ceiling (`tda.evaluation.ceiling`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tda.errors import InputError

#: Numbers ranked at a time: bounds the bootstrap's memory.
RANKED = 1 << 22


@dataclass(frozen=True)
class Interval:
    """The central `level` of a distribution."""

    low: float
    high: float
    level: float = 0.95


def predictions(influence: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Predicted group effects (..., query, subset): sum_{i in S} influence[..., q, i].

    influence (..., query, train), masks (subset, train) bool.

    The effect of leaving out an example is minus that of adding it, so that sums over those in and over those out order subsets alike.

    Raises:
        InputError: the shapes do not belong together, or a score is not finite.
    """
    if influence.shape[-1] != masks.shape[1]:
        raise InputError(f"scores of {influence.shape[-1]} training examples do not fit masks over {masks.shape[1]}: not the same data")
    if not np.isfinite(influence).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(influence))[0])
        raise InputError(f"score {where} is {influence[where]}; scores must be finite")
    summed: np.ndarray = influence.astype(np.float64) @ masks.T.astype(np.float64)
    return summed


def truth(measurement: np.ndarray) -> np.ndarray:
    """(query, subset): the mean over training seeds of measurement (subset, seed, query).

    Raises:
        InputError: a value is not finite (the first is named), or there are fewer than 3 subsets.
    """
    if len(measurement) < 3:
        raise InputError(f"subsets must be at least 3 for a rank correlation over them, got {len(measurement)}")
    bad = np.argwhere(~np.isfinite(measurement))
    if len(bad):
        subset, seed, query = (int(i) for i in bad[0])
        value, queries = measurement[subset, seed, query], sorted({int(q) for q in bad[:, 2]})
        raise InputError(
            f"the measurement of query {query} is {value} after retraining on subset {subset} with seed {seed} "
            f"(queries with such values: {len(queries)}); mend the measurement or leave the query out"
        )
    mean: np.ndarray = measurement.astype(np.float64).mean(1).T
    return mean


def lds(influence: np.ndarray, masks: np.ndarray, measurement: np.ndarray) -> np.ndarray:
    """LDS per query, (..., query), in [-1, 1]; its mean over queries is *the* LDS.

    influence (..., query, train) in the library's sign and unit, masks (subset, train) bool, measurement (subset, seed, query).
    A query whose predictions or measurements are all the same has no order to agree on: 0.
    """
    return spearman(predictions(influence, masks), truth(measurement))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis, ties sharing their mean rank; 0 where either side is constant. Broadcasts."""
    from scipy.stats import rankdata  # half a second, which no process pays that ranks nothing

    return _pearson(rankdata(a, axis=-1), rankdata(b, axis=-1))


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    spread = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    found: np.ndarray = np.divide((a * b).sum(-1), spread, out=np.zeros(np.broadcast_shapes(spread.shape)), where=spread > 0)
    return found


def bootstrap(influence: np.ndarray, masks: np.ndarray, measurement: np.ndarray, *, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """The mean LDS over queries of `draws` resamples of the subsets, (..., draw): influence (..., query, train).

    All methods see the same resamples, so that the difference of two methods' rows is a paired one.
    """
    predicted, true = predictions(influence, masks), truth(measurement)
    random, count = np.random.Generator(np.random.Philox(seed)), predicted.shape[-1]
    picks = random.integers(0, count, (draws, count))
    step = max(1, RANKED // max(1, predicted.size))
    found = []
    for start in range(0, draws, step):
        some = picks[start : start + step]
        found.append(spearman(np.moveaxis(predicted[..., some], -2, 0), np.moveaxis(true[..., some], -2, 0)[_axes(predicted)]).mean(-1))
    return np.moveaxis(np.concatenate(found), 0, -1)


def _axes(predicted: np.ndarray) -> tuple[slice | None, ...]:
    """Index that gives (draw, query, subset) the leading axes of (draw, ..., query, subset)."""
    return (slice(None), *[None] * (predicted.ndim - 2))


def interval(draws: np.ndarray, estimate: float, level: float = 0.95, *, within: float = np.inf) -> Interval:
    """The central `level` of bootstrap draws (draw,) about the estimate.

    A rank correlation of few subsets is too small by a little, one of a resample of them by that much again: the draws are shifted to
    have the estimate as their mean. within: no end lies outside [-within, within], as no correlation lies outside [-1, 1].
    """
    low, high = np.quantile(draws - draws.mean() + estimate, [(1 - level) / 2, (1 + level) / 2]).clip(-within, within)
    return Interval(float(low), float(high), level)
