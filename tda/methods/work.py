"""What a method needs (Fit), what it is given to make directions of (Work), and what it makes (Made)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from tda.attributed import Attributed
from tda.directions import Direction
from tda.products import Products

if TYPE_CHECKING:
    from tda.trajectory import Segment


@dataclass(frozen=True)
class Fit:
    """A fit of curvature, or of something that stands for one, that a method needs.

    kind and of: "kronecker" factors of a Fisher ("exact", "sampled", "empirical"), or the "dense" eigendecomposition of a curvature
    ("hessian", "ggn", "block_ggn"); the Gram matrix of a "projection" of gradients, a "retraining", or sampling "chains", by their options
    as text.
    segment: which segment of the training it is of; None: the final checkpoint.
    """

    kind: Literal["kronecker", "dense", "projection", "retraining", "chains"]
    of: str
    segment: int | None = None

    @property
    def key(self) -> str:
        """Its name in a run's manifest."""
        if self.kind == "chains":
            told = json.loads(self.of)
            return f"{told['sampler']}, {told['chains']} chains x {told['draws']} draws"
        return self.of if self.segment is None else f"{self.of}, segment {self.segment}"


@dataclass(frozen=True)
class Work:
    """What directions are made from.

    attributed: the model at the final checkpoint. train: the training set. curvature: for each of the method's fits, a tuple of Factor
    (one per block), of Spectrum, of Gram (tda.methods.trak), the one Truth of a retraining or the Trajectories of chains. segments,
    averaged: of the training, and the model at the mean weights of each, for methods that unroll it. state: of an interrupted solve;
    on_step is called with it after every step. first: the id of the first query. queries, query_ids: the data set of the queries, and
    which of them; gradients_at(k): their gradients at the checkpoint that stands for segment k, for methods that ask at checkpoints.
    """

    attributed: Attributed
    train: Any
    curvature: Sequence[Any]
    seed: int
    batch_size: int
    products: Products = "full"
    segments: tuple[Segment, ...] = ()
    averaged: tuple[Attributed, ...] = ()
    state: dict[str, Tensor] | None = None
    on_step: Callable[[dict[str, Tensor]], None] | None = None
    first: int = 0
    queries: Any = None
    query_ids: Sequence[int] = ()
    gradients_at: Callable[[int], list[Direction]] | None = None


@dataclass(frozen=True)
class Made:
    """Directions: for each pass over training gradients (one, or one per segment), one direction per block; without the factor 1/N.

    told: JSON of what a reader should know of how they were made (residuals of a solve). kept: what a method without directions, which
    scores directly, needs to know of the queries.
    """

    passes: list[list[Direction]]
    told: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
