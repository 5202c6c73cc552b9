"""What scores should be able to do without any retraining: find wrong labels, retrieve a query's class, and depend on the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tda.evaluation.lds import Interval, spearman
from tda.results import ranking

#: The most helpful training examples of a query whose labels are looked at.
NEAREST = 10


@dataclass(frozen=True)
class Detection:
    """How well mislabelled examples are found: auc with its 95% interval, and the share of wrong ones among the k most suspicious."""

    auc: float
    bounds: Interval
    precision: np.ndarray


def detect(own: np.ndarray, wrong: np.ndarray, inspected: np.ndarray, *, draws: int = 200, seed: int = 0) -> Detection:
    """Mislabelled examples by self-influence: the more an example lowers its own loss, the more suspicious it is.

    own (train,): self-influence in the library's sign, never positive. wrong (train,) bool. inspected (inspected,): values of k; ties at
    the k-th place count by their share. The interval resamples right and wrong examples apart.
    """
    suspicion, random = -own, np.random.Generator(np.random.Philox(seed))
    drawn = [random.choice(np.flatnonzero(side), (draws, int(side.sum()))) for side in (wrong, ~wrong)]
    low, high = np.quantile(auc(*(suspicion[places] for places in drawn)), [0.025, 0.975])
    estimate = float(auc(suspicion[wrong], suspicion[~wrong]))
    return Detection(estimate, Interval(float(low), float(high)), np.array([_precision(suspicion, wrong, int(k)) for k in inspected]))


def auc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Area under the ROC curve along the last axis: how often a positive (..., p) exceeds a negative (..., n), ties counting half."""
    from scipy.stats import rankdata  # half a second, which no process pays that ranks nothing

    count = positive.shape[-1]
    ranks = rankdata(np.concatenate([positive, negative], -1), axis=-1)[..., :count].sum(-1)
    found: np.ndarray = (ranks - count * (count + 1) / 2) / (count * negative.shape[-1])
    return found


def _precision(suspicion: np.ndarray, wrong: np.ndarray, k: int) -> float:
    """The share of wrong ones among the k most suspicious; of those that tie at the border, each is there with the same chance."""
    border = np.sort(suspicion)[-k]
    above, tied = suspicion > border, suspicion == border
    found = wrong[above].sum() + (k - above.sum()) * wrong[tied].mean()
    return float(found / k)


def retrieval(
    influence: np.ndarray, query_labels: np.ndarray, train_labels: np.ndarray, better: Literal["lower", "higher"], k: int = NEAREST
) -> np.ndarray:
    """Per query, (query,): the share of its k most helpful training examples that have its label. influence (query, train)."""
    found = []
    for scores, label in zip(influence, query_labels, strict=True):
        nearest = ranking(scores, kind="helpful", better=better)[:k]
        found.append(float((train_labels[nearest] == label).mean()))
    return np.array(found)


def chance(query_labels: np.ndarray, train_labels: np.ndarray) -> float:
    """What `retrieval` of random scores is on average."""
    return float(np.mean([(train_labels == label).mean() for label in query_labels]))


def agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rank correlation over training examples of two arrays of scores (query, train), per query."""
    return spearman(one.astype(np.float64), other.astype(np.float64))


def mean_interval(values: np.ndarray, *, draws: int = 1000, seed: int = 0) -> Interval:
    """95% bootstrap interval of a mean over queries: values (query,)."""
    random = np.random.Generator(np.random.Philox(seed))
    means = values[random.integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high))
