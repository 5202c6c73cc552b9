"""Which training examples each retrained model sees, and the seed that it is trained with.

Both are functions of (seed, alpha, subset, repeat) alone: more subsets, seeds or alphas extend what is there, and change nothing of it.
"""

from __future__ import annotations

import hashlib

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
    return _digest(seed, alpha, subset, "training", repeat) % 2**32


def _random(seed: int, alpha: float, subset: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=_digest(seed, alpha, subset, "subset") % 2**128))


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest())
