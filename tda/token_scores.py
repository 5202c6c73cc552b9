"""Scores of gradient methods, token by token: what each position at which a training sequence uses the parameters adds to its score.

A gradient is a sum over positions, D = sum_t s_t a_t^T, and so is its product with a direction: position t adds <V_q, s_t a_t^T>. That is
the part of the token at position t as an input; the losses of all later tokens are in s_t. (BIF's parts are by loss instead.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tda.attributed import Attributed
from tda.blocks import Pair
from tda.directions import Dense, Direction, dense
from tda.errors import InputError


def token_scores(attributed: Attributed, directions: Sequence[Direction], dataset: Any, ids: Sequence[int], *, examples: int) -> Tensor:
    """Scores of the tokens of training examples `ids` under directions of one method: (query, example, token), summing to the examples'.

    directions: by block; examples: N. One forward and one backward pass of all `ids` together. Raises InputError where the examples are no
    token sequences, or where a layer's gradient is not known position by position: `exclude` that layer to see the others' parts.
    """
    batch = attributed.load(dataset, ids)
    if batch.targets.ndim != 2:
        raise InputError(f"scores of tokens need labels (batch, tokens), got {tuple(batch.targets.shape)}")
    tape = attributed.tape(batch)
    tokens = int(batch.targets.shape[1])
    pairs = tape.pairs(tape.seed(attributed.problem.likelihood.loss), apart=True)
    total: Tensor | None = None
    for block, direction, uses in zip(attributed.blocks, directions, pairs, strict=True):
        for pair in uses:
            if block.direct or pair.positions != tokens:
                said = "is taken one example at a time" if block.direct else f"is used at {pair.positions} positions of {tokens} tokens"
                raise InputError(f"layer {block.name} {said}, so it has no part for each token; `exclude` it")
            part = _parts(direction, pair)
            total = part if total is None else total + part
    if total is None:
        raise InputError("none of the attributed layers is used by these examples")
    return total / examples


def _parts(direction: Direction, pair: Pair) -> Tensor:
    """<V_q, s_t a_t^T> for every query, example and position of one use of a block: (query, batch, positions)."""
    if pair.one_hot:
        columns = dense(direction)[:, 0][:, :, pair.right]  # (query, out, batch, positions)
        return torch.einsum("qobt,bto->qbt", columns, pair.left[0])
    if isinstance(direction, Dense):
        return torch.einsum("qgbto,gbto->qbt", torch.einsum("qgoi,gbti->qgbto", direction.matrix, pair.right), pair.left)
    left = torch.einsum("qrgo,gbto->qrgbt", direction.left, pair.left)
    return (left * torch.einsum("qrgi,gbti->qrgbt", direction.right, pair.right)).sum((1, 2))
