"""Rows of the GGN as outer products of gradients: far fewer passes over the model than products with unit vectors.

    G = (1/N) sum_i sum_k g_ik g_ik^T,    g_ik = J_i^T c_ik,    sum_k c_ik c_ik^T = H_out,i

J_i: outputs by parameters, H_out: of the loss in the outputs. K columns give K backward passes over the training set, whatever the number
of rows; a product with a unit vector is a forward and a backward pass for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tda import flat
from tda.attributed import Attributed
from tda.blocks import Block, Pair, example_gradients
from tda.capture import Tape
from tda.data import batches
from tda.errors import InputError
from tda.problem import Batch
from tda.products import fast_float32

#: A product with a vector multiplies three times as much as a forward pass (the tangents, and two gradients), in pieces so small that they
#: take ten times as long as the one large product here: 3.3 times in all on an MLP 64-32-32-10 with its 10 columns, 18 times on a CNN.
PASSES = 30


def worth_it(attributed: Attributed, dataset: Any) -> bool:
    """Whether rows take less time as outer products, judged by the first example's shapes.

    False too where the likelihood cannot list the columns, or where they are not a root of its `hessian_product`.
    """
    batch = attributed.load(dataset, [0])
    tape = attributed.tape(batch)
    likelihood = attributed.problem.likelihood
    if not (hasattr(likelihood, "hessian_columns") and hasattr(likelihood, "hessian_product")):
        return False
    try:
        columns = [column.double() for column in likelihood.hessian_columns(tape.precise, batch.targets)]
    except InputError:
        return False
    if not _is_root(columns, attributed, batch, tape.precise):
        return False
    passed = sum(
        pair.positions * block.size
        for block, pairs in zip(attributed.blocks, tape.pairs(columns[0].to(tape.outputs.dtype)), strict=True)
        for pair in pairs
    )
    return len(columns) * flat.total(attributed.blocks) < PASSES * passed


def _is_root(columns: Sequence[Tensor], attributed: Attributed, batch: Batch, outputs: Tensor) -> bool:
    vector = torch.linspace(-1.0, 2.0, outputs.numel(), dtype=torch.float64, device=outputs.device).view_as(outputs)
    by_columns = torch.stack([column * (column * vector).sum() for column in columns]).sum(0)
    wanted = attributed.problem.likelihood.hessian_product(outputs, batch.targets, vector[None])[0]
    return bool(torch.allclose(by_columns, wanted, rtol=1e-9, atol=1e-12))


def rows(attributed: Attributed, dataset: Any, start: int, stop: int, *, block_diagonal: bool, batch_size: int) -> Tensor:
    """Rows start..stop of the GGN, or of its diagonal blocks alone, (stop - start, D), in the model's dtype."""
    blocks = attributed.blocks
    found = torch.zeros(stop - start, flat.total(blocks), dtype=attributed.dtype, device=attributed.device)
    inside = [
        (span, max(start, span.start), min(stop, span.stop)) for span in flat.spans(blocks) if max(start, span.start) < min(stop, span.stop)
    ]
    with fast_float32():
        for ids in batches(range(len(dataset)), batch_size):
            batch = attributed.load(dataset, ids)
            tape = attributed.tape(batch)
            columns = list(attributed.problem.likelihood.hessian_columns(tape.precise, batch.targets))
            for k, column in enumerate(columns):
                pairs = tape.pairs(column.to(tape.outputs.dtype), last=k == len(columns) - 1)
                found_here = [_gradients(block, each, tape) for block, each in zip(blocks, pairs, strict=True)]
                gradients = torch.cat(found_here, 1).to(found)
                if not block_diagonal:
                    found.addmm_(gradients[:, start:stop].T, gradients)
                    continue
                for span, first, last in inside:
                    mine = found[first - start : last - start, span.start : span.stop]
                    mine.addmm_(gradients[:, first:last].T, gradients[:, span.start : span.stop])
    return found.div_(len(dataset))


def _gradients(block: Block, pairs: Sequence[Pair], tape: Tape) -> Tensor:
    """(batch, size of the block); zeros where this batch does not use it."""
    return example_gradients(block, pairs).flatten(1) if pairs else tape.outputs.new_zeros(tape.size, block.size)
