"""What a computation costs depends on a model's shapes alone; they are known of a model that exists on paper only, too."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import nn

from tda.attributed import Attributed
from tda.blocks import Block, vector_block


@dataclass(frozen=True)
class Shapes:
    """Blocks of a model, the number of all its parameters, the outputs of one example, and what is computed in.

    classes: how many output gradients the exact Fisher takes of each example; 0 where it cannot be taken.
    """

    blocks: tuple[Block, ...]
    total: int
    outputs: int
    dtype: torch.dtype
    classes: int

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def parameters(self) -> int:
        """D: attributed parameters."""
        return sum(block.size for block in self.blocks)


def shapes_of(attributed: Attributed) -> Shapes:
    """Of a model that was inspected. An exact Fisher is one over classes or over the few numbers that a model puts out."""
    return Shapes(attributed.blocks, attributed.total, attributed.outputs, attributed.dtype, attributed.outputs)


def on_paper(model: nn.Module, positions: int, outputs: int, chosen: Collection[str]) -> Shapes:
    """Of a model without weights (on torch's meta device), from its modules: each example uses each of them at `positions` places.

    chosen: names of the parameters that are attributed. nn.Linear, nn.Embedding and transformers' Conv1D are matrices; tied weights are
    one block; what other modules hold are columns.
    """
    blocks: dict[int, Block] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in blocks or (key == "bias" and parameter.ndim == 1 and _has_bias_column(module)):
                continue
            blocks[id(parameter)] = replace(_block(name, key, module, parameter), positions=positions)
    total = sum(parameter.numel() for parameter in model.parameters())
    dtype = next(model.parameters()).dtype
    blocks = {key: block for key, block in blocks.items() if block.weight in chosen or block.bias in chosen}
    return Shapes(tuple(blocks.values()), total, outputs, dtype, 0)


def _has_bias_column(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _block(name: str, key: str, module: nn.Module, parameter: nn.Parameter) -> Block:
    full, shape = f"{name}.{key}", tuple(parameter.shape)
    bias = f"{name}.bias" if _has_bias_column(module) and getattr(module, "bias", None) is not None else None
    if isinstance(module, nn.Embedding):
        return Block(name, "embedding", "embedding", "embedding", 1, shape[1], shape[0], full, None, (shape,))
    if _has_bias_column(module) and key == "weight":
        out, in_ = shape if isinstance(module, nn.Linear) else reversed(shape)
        return Block(name, "linear", "linear", "kronecker", 1, out, in_ + (bias is not None), full, bias, (shape,))
    return vector_block(full, "shift" if key == "bias" else "scale", full, None, (shape,))
