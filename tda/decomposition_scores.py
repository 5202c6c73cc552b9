"""Influence by every rung of the ladder, from explicit gradients: what the errors of the inverses do to the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tda import decomposition
from tda.attributed import Attributed
from tda.blocks import example_gradients
from tda.curvature.spectrum import Inverse
from tda.data import batches
from tda.decomposition import Rung
from tda.flat import flatten


def flat_gradients(
    attributed: Attributed, dataset: Any, function: Callable[[Tensor, Tensor], Tensor], *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Gradients (example, D) of function(outputs, targets) for every example of a dataset, and its values (example,); float64."""
    count = sum(block.size for block in attributed.blocks)
    # Filled in: of so many gradients no second copy is ever held.
    rows, values = torch.empty(len(dataset), count, dtype=torch.float64), torch.empty(len(dataset), dtype=torch.float64)
    for ids in batches(range(len(dataset)), batch_size):
        batch = attributed.load(dataset, ids)
        tape = attributed.tape(batch)
        some = slice(ids[0], ids[-1] + 1)
        values[some] = function(tape.precise, batch.targets).detach().double()
        pairs = tape.pairs(tape.seed(function))
        matrices = [example_gradients(block, found) for block, found in zip(attributed.blocks, pairs, strict=True)]
        rows[some] = flatten(attributed.blocks, matrices).double()
    return rows, values


def ladder_scores(rung: Rung, inverses: Sequence[Inverse], queries: Tensor, train: Tensor) -> Tensor:
    """influence[q, i] = -(1/N) g_q^T A+ g_i under each inverse, (inverse, query, train), from gradients (query, D) and (train, D)."""
    inverted = torch.stack([rung.inverted(inverse) for inverse in inverses])
    found = torch.zeros(len(inverses), len(queries), len(train), dtype=torch.float64)
    step = max(1, decomposition.CHUNK // len(rung.values))
    for piece in rung.pieces:
        some = slice(piece.start, piece.stop)
        asked = piece.rotated(queries[:, some].contiguous())
        for start in range(0, len(train), step):
            given = piece.rotated(train[start : start + step, some].contiguous())
            for k, values in enumerate(inverted):
                found[k, :, start : start + step] -= (asked * values[some]) @ given.T
    return found.div_(len(train))
