"""Similarity of representations: which training examples look like the query to the model's last layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from tda.data import batches
from tda.directions import Direction
from tda.errors import InputError
from tda.methods.method import Method
from tda.methods.work import Made, Work
from tda.products import fast_float32

if TYPE_CHECKING:
    from tda.attributed import Attributed
    from tda.blocks import Block
    from tda.capture import Tape


class Representation(Method):
    """score[q, i] = -similarity(h_q, h_i), h being what a layer is given; + where a higher measurement is better.

    A similar example is expected to help, hence the sign. similarity: "cosine"; "dot" for h_q . h_i; "l2" for -||h_q - h_i||. layer: its
    name; None: the last linear (or convolutional) layer that is attributed. Of a sequence or an image, h is the mean over positions.
    """

    name: Literal["representation"] = "representation"
    similarity: Literal["cosine", "dot", "l2"] = "cosine"
    layer: str | None = None
    unit: ClassVar[str] = "a similarity, no unit of the measurement"
    takes_gradients: ClassVar[bool] = False

    def check(self, attributed: Attributed) -> None:
        """InputError where there is no such layer."""
        self.block(attributed)

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """None: the queries' representations and the sign are what is kept."""
        attributed, block = work.attributed, self.block(work.attributed)
        with fast_float32():
            rows = [attributed.tape(attributed.load(work.queries, part)).inputs(block) for part in batches(work.query_ids, work.batch_size)]
        sign = 1.0 if attributed.problem.better == "higher" else -1.0
        return Made([], kept={"features": torch.cat(rows), "sign": torch.tensor(sign, dtype=attributed.dtype)})

    def block(self, attributed: Attributed) -> Block:
        """The layer whose inputs are compared. Raises InputError where there is no such layer."""
        known = [
            block
            for block in attributed.blocks
            if block.form in ("linear", "transposed", "conv") and block.groups == 1 and not block.direct
        ]
        chosen = [block for block in known if self.layer in (None, block.name)]
        if not chosen:
            names = ", ".join(block.name for block in known) or "none"
            wanted = "a linear layer" if self.layer is None else f"layer {self.layer!r}"
            raise InputError(f"representation needs {wanted} among the attributed ones; there is {names}")
        return chosen[-1]

    def direct(self, kept: Mapping[str, Tensor], fits: Sequence[Any] = ()) -> Callable[[Attributed, Tape, Sequence[int]], Tensor]:
        """Similarities (query, batch)."""
        queries, sign = kept["features"], kept["sign"]

        def scores(attributed: Attributed, tape: Tape, _ids: Sequence[int]) -> Tensor:
            return sign * similarities(queries, tape.inputs(self.block(attributed)), self.similarity)

        return scores


def similarities(a: Tensor, b: Tensor, kind: Literal["cosine", "dot", "l2"]) -> Tensor:
    """(a, b) of rows (a, features) and (b, features). The cosine with a row of zeros is 0."""
    if kind == "l2":
        # Not by the expansion of the square, which would leave rounding alone of the distance of a near pair.
        return -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    if kind == "cosine":
        a, b = torch.nn.functional.normalize(a, dim=1), torch.nn.functional.normalize(b, dim=1)
    return a @ b.T
