"""Scores of gradient methods, token by token: what each position at which a sequence uses the parameters adds to a score.

A gradient is a sum over positions, D = sum_t s_t a_t^T, and so is its product with a direction: position t adds <V_q, s_t a_t^T>. That is
the part of the token at position t as an input; the losses of all later tokens are in s_t. (BIF's parts are by loss instead.)
A query's gradient is such a sum too, and directions are linear in it: those of its positions are the parts of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tda.attributed import Attributed
from tda.blocks import Block, Pair
from tda.directions import Dense, Direction, Factored, dense
from tda.errors import InputError


def token_scores(attributed: Attributed, directions: Sequence[Direction], dataset: Any, ids: Sequence[int], *, examples: int) -> Tensor:
    """Scores of the tokens of training examples `ids` under directions of one method: (query, example, token), summing to the examples'.

    directions: by block; examples: N. One forward and one backward pass of all `ids` together. Raises InputError where the examples are no
    token sequences, or where a layer's gradient is not known position by position: `exclude` that layer to see the others' parts.
    """
    total: Tensor | None = None
    for direction, (_, uses) in zip(directions, _uses(attributed, dataset, ids, attributed.problem.likelihood.loss), strict=True):
        whole = _in(direction, attributed.dtype)
        for pair in uses:
            part = _parts(whole, pair)
            total = part if total is None else total + part
    if total is None:
        raise InputError("none of the attributed layers is used by these examples")
    return total / examples


def position_gradients(attributed: Attributed, dataset: Any, query: int) -> list[Direction]:
    """The gradient of the measurement at a query, apart by positions: by block (token, groups, out, in), tokens in the place of queries.

    They sum over tokens to what `query_gradients` gives. Raises InputError as `token_scores` does.
    """
    found: list[Direction] = []
    for block, uses in _uses(attributed, dataset, [query], None):
        if any(pair.one_hot for pair in uses):
            found.append(Dense(sum((_matrices(pair, block.in_) for pair in uses[1:]), start=_matrices(uses[0], block.in_))))
        else:
            left, right = (torch.stack([getattr(pair, side)[:, 0] for pair in uses]).permute(2, 0, 1, 3) for side in ("left", "right"))
            found.append(Factored(left.contiguous(), right.contiguous()))
    return found


def _uses(attributed: Attributed, dataset: Any, ids: Sequence[int], function: Any) -> Iterator[tuple[Block, list[Pair]]]:
    """Each block with its pairs, which keep their positions; of the measurement where `function` is None."""
    batch = attributed.load(dataset, ids)
    if batch.targets.ndim != 2:
        raise InputError(f"scores of tokens need labels (batch, tokens), got {tuple(batch.targets.shape)}")
    tape = attributed.tape(batch)
    tokens = int(batch.targets.shape[1])
    pairs = tape.pairs(tape.seed(function or tape.measurement), apart=True)
    for block, uses in zip(attributed.blocks, pairs, strict=True):
        for pair in uses:
            if block.direct or pair.positions != tokens:
                said = "is taken one example at a time" if block.direct else f"is used at {pair.positions} positions of {tokens} tokens"
                raise InputError(f"layer {block.name} {said}, so it has no part for each token; `exclude` it")
        yield block, uses


def _matrices(pair: Pair, columns: int) -> Tensor:
    """s_t a_t^T of one example and use: (positions, groups, out, in)."""
    left = pair.left[:, 0].transpose(0, 1)
    if not pair.one_hot:
        return left[..., None] * pair.right[:, 0].transpose(0, 1)[:, :, None]
    found = left.new_zeros(*left.shape, columns)
    return found.scatter_(-1, pair.right[0][:, None, None, None].expand(*left.shape, 1), left[..., None])


def _in(direction: Direction, dtype: torch.dtype) -> Direction:
    """The same in the model's dtype: of a run with products in bfloat16, directions are stored in that."""
    if isinstance(direction, Dense):
        return Dense(direction.matrix.to(dtype))
    return Factored(direction.left.to(dtype), direction.right.to(dtype))


def _parts(direction: Direction, pair: Pair) -> Tensor:
    """<V_q, s_t a_t^T> for every query, example and position of one use of a block: (query, batch, positions)."""
    if pair.one_hot:
        columns = dense(direction)[:, 0][:, :, pair.right]  # (query, out, batch, positions)
        return torch.einsum("qobt,bto->qbt", columns, pair.left[0])
    if isinstance(direction, Dense):
        return torch.einsum("qgbto,gbto->qbt", torch.einsum("qgoi,gbti->qgbto", direction.matrix, pair.right), pair.left)
    left = torch.einsum("qrgo,gbto->qrgbt", direction.left, pair.left)
    return (left * torch.einsum("qrgi,gbti->qrgbt", direction.right, pair.right)).sum((1, 2))
