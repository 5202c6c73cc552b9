"""Which training examples each retrained model sees, and the seed that it is trained with.

Both are functions of (seed, alpha, subset, repeat) alone: more subsets, seeds or alphas extend what is there, and change nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from tda.errors import InputError


def masks(examples: int, alpha: float, count: int, seed: int) -> np.ndarray:
    """`count` random subsets of round(alpha x examples) training examples: (subset, train) bool, True where the example is in.

    Raises:
        InputError: alpha is not in (0, 1), there are fewer than 3 subsets, or a subset would be empty or everything.
    """
    size = subset_size(examples, alpha)
    if count < 3:
        raise InputError(f"subsets must be at least 3 for a rank correlation over them, got {count}")
    chosen = np.zeros((count, examples), bool)
    for j in range(count):
        chosen[j, _random(seed, alpha, j).permutation(examples)[:size]] = True
    return chosen


def subset_size(examples: int, alpha: float) -> int:
    """round(alpha x examples); InputError where that leaves nothing in or nothing out."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be in (0, 1), the share of the training examples in a subset; got {alpha}")
    size = round(alpha * examples)
    if not 0 < size < examples:
        raise InputError(f"alpha = {alpha} of {examples} training examples leaves {size} in a subset; give more examples or another alpha")
    return size


def training_seed(seed: int, alpha: float, subset: int, repeat: int) -> int:
    """The seed of one retraining, in [0, 2^32): numpy's old generators take no more."""
    return _digest(int(seed), float(alpha), int(subset), "training", int(repeat)) % 2**32


def tuning(queries: int, share: float, seed: int) -> np.ndarray:
    """Which queries a damping is chosen by, (query,) bool: round(share x queries) at random; the others are reported.

    Raises:
        InputError: nothing would be left to tune on (where share is above 0), or nothing to report.
    """
    count = round(share * queries)
    if not 0 <= share < 1 or count >= queries or (share > 0 and count == 0):
        raise InputError(
            f"tuning_queries = {share} of {queries} queries leaves {count} to tune on and {queries - count} to report; "
            "give more queries, or another share in [0, 1)"
        )
    found = np.zeros(queries, bool)
    found[np.random.Generator(np.random.Philox(key=_digest(seed, "tuning") % 2**128)).permutation(queries)[:count]] = True
    return found


def left_out(examples: int, count: int, seed: int) -> np.ndarray:
    """`count` different training examples at random, ascending, (left_out,) int64, to be left out one at a time.

    Raises:
        InputError: there are not so many examples.
    """
    if not 3 <= count <= examples:
        raise InputError(f"leave_one_out = {count} of {examples} training examples: it must be from 3 to {examples}")
    order = np.random.Generator(np.random.Philox(key=_digest(seed, "left out") % 2**128)).permutation(examples)
    return np.sort(order[:count])


def without(examples: int, groups: Iterable[np.ndarray]) -> np.ndarray:
    """Subsets of everything but a group of examples each, (subset, train) bool."""
    found = []
    for ids in groups:
        mask = np.ones(examples, bool)
        mask[ids] = False
        found.append(mask)
    return np.stack(found)


def _random(seed: int, alpha: float, subset: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=_digest(int(seed), float(alpha), int(subset), "subset") % 2**128))


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest())
