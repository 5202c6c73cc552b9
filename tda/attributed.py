"""A problem's model at a checkpoint, cut into blocks: what every computation is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tda.blocks import Block
from tda.capture import Tape
from tda.data import load_batch
from tda.device import device_of
from tda.loss_scale import SCALE
from tda.operations import Layout
from tda.problem import Batch, Problem

#: Why a parameter is skipped that no example of the inspection used; later batches are held to it.
UNUSED = "not used in the forward pass"


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not attributed, and why."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Attributed:
    """A problem's model at a checkpoint, cut into blocks; `total` counts all its parameters, `outputs` the outputs of one example.

    autocast: what layers are computed in, forwards and backwards, where it is not `dtype`; sums are taken in `dtype` all the same.
    scale: of losses before a backward pass in float16 (`tda.loss_scale`).
    recompute: whether the insides of repeated layers are computed again in the backward pass (`tda.recompute`).
    """

    problem: Problem
    model: nn.Module
    blocks: tuple[Block, ...]
    layouts: dict[str, Layout]
    skipped: tuple[Skipped, ...]
    total: int
    dtype: torch.dtype
    outputs: int = 1
    autocast: torch.dtype | None = None
    recompute: bool = False
    scale: float = SCALE

    @property
    def share(self) -> float:
        """Share of the model's parameters that is attributed."""
        return sum(block.size for block in self.blocks) / max(self.total, 1)

    @property
    def device(self) -> torch.device:
        """Where the model lies, and with it all that is computed from it."""
        return device_of(self.model)

    def load(self, dataset: Any, ids: Sequence[int]) -> Batch:
        """Examples `ids` as a batch in this model's dtype and on its device."""
        return load_batch(self.problem, dataset, ids, dtype=self.dtype, device=self.device)

    def tape(self, batch: Batch, ids: Sequence[int] | None = None) -> Tape:
        """A recorded forward pass of a batch. ids: of its examples, where they are known, for messages.

        Raises InputError where the batch uses a parameter otherwise than the examples that were inspected did.
        """
        unused = [s.name for s in self.skipped if s.reason == UNUSED]
        tape = Tape(self.problem, self.model, self.blocks, self.layouts, batch, unused, self.autocast, self.recompute)
        return tape.scaling(self.scale, ids) if self.autocast == torch.float16 else tape
