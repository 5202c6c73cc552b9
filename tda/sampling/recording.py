"""What is kept of a piece of the chains: losses and measurements of all examples at every kept draw, as differences to those at w*.

Shape suffixes: C chains, T draws, n training examples, q queries, K tokens, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tda.attributed import Attributed
from tda.sampling.chains import ChainState, Landscape
from tda.sampling.options import Piece


@dataclass(frozen=True)
class Recorded:
    """Some draws of some chains; float32, NaN from where a chain was lost.

    loss_train (C, T, n), loss_query (C, T, q): l(w) - l(w*), nats. measurement_query (C, T, q): f(w) - f(w*). token_loss_train (C, T, n, K)
    and token_loss_query (C, T, q, K): per token, where asked; they sum to the losses. distance (C, T): ||w - w*||. batch_loss (C, S): the
    mean loss of every step's batch.
    """

    loss_train: Tensor
    loss_query: Tensor
    measurement_query: Tensor
    token_loss_train: Tensor | None
    token_loss_query: Tensor | None
    distance: Tensor
    batch_loss: Tensor


class Recorder:
    """Evaluates all training examples and queries along chains; made once per process, as it holds them and their values at w*."""

    def __init__(self, attributed: Attributed, landscape: Landscape, train: Any, queries: Any, *, tokens: bool = False) -> None:
        raise NotImplementedError

    def record(self, state: ChainState, piece: Piece) -> tuple[ChainState, Recorded]:
        """Advance the chains over a piece, and what was recorded on the way."""
        raise NotImplementedError
