"""Influence by every rung of the ladder, from explicit gradients: what the errors of the inverses do to the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
    rows, values = [], []
    for ids in batches(range(len(dataset)), batch_size):
        batch = attributed.load(dataset, ids)
        tape = attributed.tape(batch)
        values.append(function(tape.precise, batch.targets).detach().double())
        pairs = tape.pairs(tape.seed(function))
        matrices = [example_gradients(block, found) for block, found in zip(attributed.blocks, pairs, strict=True)]
        rows.append(flatten(attributed.blocks, matrices).double())
    return torch.cat(rows), torch.cat(values)


def ladder_scores(rung: Rung, inverses: Sequence[Inverse], queries: Tensor, train: Tensor) -> Tensor:
    """influence[q, i] = -(1/N) g_q^T A+ g_i under each inverse, (inverse, query, train), from gradients (query, D) and (train, D)."""
    asked = torch.empty(len(queries), len(rung.values), dtype=torch.float64)
    given = torch.empty(len(train), len(rung.values), dtype=torch.float64)
    for piece in rung.pieces:
        some = slice(piece.start, piece.stop)
        asked[:, some], given[:, some] = piece.rotated(queries[:, some]), piece.rotated(train[:, some])
    return torch.stack([-(asked * rung.inverted(inverse)) @ given.T / len(train) for inverse in inverses])
