"""What models that were trained with an example measure, less what models trained without it do (Mlodozeniec et al. 2025)."""

from __future__ import annotations

import numpy as np

from tda.errors import InputError
from tda.evaluation.lds import truth


def mean_shift(masks: np.ndarray, measurement: np.ndarray) -> np.ndarray:
    """(query, train): the mean of f_q over models whose subset has example i, less that over models whose has not.

    masks (subset, train) bool, measurement (subset, seed, query). The unit is the measurement's; positive where having i raises it.
    Subsets that scores are to be judged by must not be among these.

    Raises:
        InputError: an example is in all subsets or in none; a measurement is not finite.
    """
    check_both_sides(masks)
    mean, chosen = truth(measurement), masks.astype(np.float64)
    count = masks.sum(0)
    # Centred first: both means are then small, and their difference keeps its digits.
    mean = mean - mean.mean(1, keepdims=True)
    found: np.ndarray = mean @ chosen / count - mean @ (1 - chosen) / (len(masks) - count)
    return found


def check_both_sides(masks: np.ndarray) -> None:
    """InputError where a training example is in all subsets or in none of them: masks (subset, train) bool."""
    count = masks.sum(0)
    one_sided = np.flatnonzero((count == 0) | (count == len(masks)))
    if len(one_sided):
        where = "all" if count[one_sided[0]] else "none"
        raise InputError(
            f"training example {one_sided[0]} is in {where} of the {len(masks)} subsets, so that having it cannot be compared with not "
            f"having it (such examples: {len(one_sided)}); take more subsets"
        )
