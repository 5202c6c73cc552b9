"""Chains around a checkpoint: their state, their steps, and what is kept of them.

Shape suffixes: C chains, D numbers of a model that move, T draws, S steps, B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tda.attributed import Attributed
from tda.sampling.options import Sampling


@dataclass
class ChainState:
    """Where some chains stand after `step` steps: all that their further path depends on, beside the options.

    chains: their numbers (C,). weights: (C, D), the parameters that move, in the order of the model. square: (C, D), V of RMSprop-SGLD.
    lost: chain -> why it was stopped, in one sentence; its row of `weights` is that of the checkpoint and means nothing.
    """

    chains: tuple[int, ...]
    step: int
    weights: Tensor
    square: Tensor | None = None
    lost: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Landscape:
    """What all chains of a run share: the checkpoint w* (D,), the training examples in memory, and how gradients are taken.

    how: "products", "vmap" or "one by one: <why>".
    """

    sampling: Sampling
    center: Tensor
    how: str


def landscape(attributed: Attributed, sampling: Sampling, dataset: Any, *, together: int | None = None) -> Landscape:
    """Prepare chains of a problem's model at its checkpoint. The blocks' parameters move; others stay.

    The dataset is held in memory. together: how many chains advance at once, sampling.together by default (1: plain autograd).

    Raises:
        InputError: the batch is larger than the data, or the model has no loss per example in eval mode.
    """
    raise NotImplementedError


def start(landscape: Landscape, chains: Sequence[int]) -> ChainState:
    """Chains at step 0: all of them at the checkpoint."""
    raise NotImplementedError


def advance(
    landscape: Landscape, state: ChainState, until: int, keep: Callable[[int, Tensor], None] | None = None
) -> tuple[ChainState, Tensor]:
    """Make the steps state.step..until; returns the new state and the batches' mean loss (C, S) before each step, float64, NaN where lost.

    keep(draw, weights (C, D)) is called after the step at which a draw is taken; it must not keep the tensor, which moves on. The state
    that is given is left as it is.
    """
    raise NotImplementedError


def state_tensors(state: ChainState) -> dict[str, Tensor]:
    """The state as named tensors, as safetensors stores them."""
    raise NotImplementedError


def state_from(tensors: Mapping[str, Tensor]) -> ChainState:
    """The inverse of `state_tensors`."""
    raise NotImplementedError
