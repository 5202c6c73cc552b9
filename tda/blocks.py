"""Blocks: the groups of parameters whose curvature is treated together, and their per-example gradients as matrices.

A block's parameters are laid out as `groups` matrices of shape (out, in). The gradient of one example is

    D[g] = sum_t left[g, t] right[g, t]^T          (out x in)

with t over the positions (tokens, pixels, repeated calls) at which the example uses the parameters. For a linear layer `left` is the
output gradient and `right` the input, with a 1 appended where there is a bias. Parameters without such a structure are a column:
left = the gradient itself, right = 1, for which the Kronecker product is the exact small block (structure "exact"); where that is
too large, the left basis stays the identity and the block is a diagonal (structure "diagonal").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Structure = Literal["kronecker", "embedding", "exact", "diagonal"]
Form = Literal["linear", "transposed", "conv", "embedding", "vector"]

#: Up to this many parameters, a block without Kronecker structure keeps its full matrix; its eigendecomposition is then seconds.
EXACT_LIMIT = 1024
#: A Kronecker side wider than this (a vocabulary) keeps its own coordinates: its covariance alone would be gigabytes.
WIDEST_BASIS = 16384


@dataclass(frozen=True)
class Block:
    """Parameters `weight` and `bias` as `groups` matrices (out, in); `in_` counts the bias column.

    form: how parameter tensors map to the matrices; structure: which curvature they get; kind: the operation, for people;
    direct: whether per-example gradients are taken one example at a time, because the operation is not one that we know (`reason`).
    """

    name: str
    kind: str
    form: Form
    structure: Structure
    groups: int
    out: int
    in_: int
    weight: str | None
    bias: str | None
    shapes: tuple[tuple[int, ...], ...]
    positions: int = 1
    direct: bool = False
    reason: str = ""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, weight first."""
        return tuple(name for name in (self.weight, self.bias) if name)

    @property
    def size(self) -> int:
        """Number of matrix entries, groups * out * in: the number of parameters."""
        return self.groups * self.out * self.in_

    @property
    def rotates_out(self) -> bool:
        """Whether the output side has an eigenbasis (else it stays in its own coordinates)."""
        return self.structure != "diagonal" and self.out <= WIDEST_BASIS

    @property
    def rotates_in(self) -> bool:
        """Whether the input side has an eigenbasis: not for embeddings (one-hot inputs have a diagonal covariance) nor for columns."""
        return self.structure == "kronecker" and self.in_ <= WIDEST_BASIS

    @property
    def remark(self) -> str:
        """What is unusual in how the block is treated, for people; empty where nothing is."""
        wide = [str(n) for n in (self.out, self.in_) if self.structure == "kronecker" and n > WIDEST_BASIS]
        if wide and not self.reason:
            return f"a side of {' and '.join(wide)} is too wide for an eigenbasis: it keeps its own coordinates"
        return self.reason


@dataclass(frozen=True)
class Pair:
    """The factors of per-example gradients for one use of a block on one batch.

    left: (groups, batch, positions, out). right: (groups, batch, positions, in), or ids (batch, positions) int64 for an embedding.
    gradient: which of the two depends on the labels. mask: (batch, positions) of real positions, or None.
    """

    left: Tensor
    right: Tensor
    gradient: Literal["left", "right"] = "left"
    mask: Tensor | None = None

    @property
    def positions(self) -> int:
        """Positions per example."""
        return int(self.left.shape[2])

    @property
    def one_hot(self) -> bool:
        """Whether `right` holds ids instead of rows."""
        return not self.right.is_floating_point()


def vector_block(name: str, kind: str, weight: str | None, bias: str | None, shapes: tuple[tuple[int, ...], ...], **more: object) -> Block:
    """A block without Kronecker structure: exact up to EXACT_LIMIT parameters, else a diagonal."""
    n = sum(int(torch.Size(shape).numel()) for shape in shapes)
    block = Block(name, kind, "vector", "exact" if n <= EXACT_LIMIT else "diagonal", 1, n, 1, weight, bias, shapes)
    return replace(block, **more)  # type: ignore[arg-type]


def to_matrix(block: Block, tensors: dict[str, Tensor]) -> Tensor:
    """Tensors shaped like the block's parameters, with any leading axes, as (..., groups, out, in).

    Missing names count as zero only by the caller's doing: every name of `block.parameters` must be there.
    """
    weight = tensors[block.weight] if block.weight else None
    bias = tensors[block.bias] if block.bias else None
    if block.form == "vector":
        each = [t for t in (weight, bias) if t is not None]
        parts = [t.reshape(*t.shape[: t.ndim - len(s)], -1) for t, s in zip(each, block.shapes, strict=True)]
        return torch.cat(parts, -1)[..., None, :, None]
    assert weight is not None
    lead = weight.shape[: weight.ndim - len(block.shapes[0])]
    if block.form in ("transposed", "embedding"):
        weight = weight.transpose(-1, -2)
    matrix = weight.reshape(*lead, block.groups, block.out, -1)
    if bias is None:
        return matrix
    return torch.cat([matrix, bias.reshape(*lead, block.groups, block.out, 1)], -1)


def to_parameters(block: Block, matrix: Tensor) -> dict[str, Tensor]:
    """The inverse of `to_matrix`: (..., groups, out, in) -> tensors by parameter name."""
    lead = matrix.shape[:-3]
    if block.form == "vector":
        flat = matrix.reshape(*lead, -1)
        sizes = [int(torch.Size(s).numel()) for s in block.shapes]
        pieces = flat.split(sizes, -1)
        return {n: p.reshape(*lead, *s) for n, p, s in zip(block.parameters, pieces, block.shapes, strict=True)}
    assert block.weight is not None
    found = {}
    if block.bias:
        found[block.bias] = matrix[..., -1].reshape(*lead, -1)
        matrix = matrix[..., :-1]
    if block.form in ("transposed", "embedding"):
        matrix = matrix.squeeze(-3).transpose(-1, -2)
    return {block.weight: matrix.reshape(*lead, *block.shapes[0]), **found}


def example_gradients(block: Block, pairs: Sequence[Pair]) -> Tensor:
    """Per-example gradients (batch, groups, out, in) of a block, summed over positions and uses."""
    total: Tensor | None = None
    for pair in pairs:
        if pair.one_hot:
            matrix = pair.left.new_zeros(len(pair.right), block.in_, block.out)
            matrix.scatter_add_(1, pair.right[..., None].expand(-1, -1, block.out), pair.left[0])
            each = matrix.transpose(1, 2)[:, None]
        else:
            each = torch.einsum("gbto,gbti->bgoi", pair.left, pair.right)
        total = each if total is None else total + each
    assert total is not None
    return total
