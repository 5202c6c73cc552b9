"""Uniform numbers that belong to an example, whatever batch, shard or worker it is in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, ids: Sequence[int], draws: int) -> Tensor:
    """(examples, draws) float64 in (0, 1): the first `draws` numbers of a Philox stream keyed by (seed, example id).

    A longer row starts with the shorter one, so padding does not change an example's labels.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), int(i)])).random(draws) for i in ids]
    # random() can return 0, at which the normal quantile is infinite.
    return torch.from_numpy(np.stack(rows)).clamp_(min=2.0**-60)
