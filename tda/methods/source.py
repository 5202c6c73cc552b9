"""SOURCE: influence through training, by approximate unrolled differentiation (Bae et al. 2024).

Training is cut into segments l = 1..L; in each the curvature C_l and the training gradients are taken to be constant. Taking example i a
little more into account pushes the weights throughout, and what each segment's push comes to is bent by the segments after it:

    d w_T / d eps_i = -(1/N) sum_l S_L ... S_{l+1} R_l g_l(i),    S_l = exp(-t_l C_l),    R_l = (I - exp(-t_l C_l)) C_l^-1

with t_l = sum of eta / (1 - beta) over the segment's steps. So each segment has directions V_{q,l} = -R_l S_{l+1} ... S_L g_q of its own,
and they meet the training gradients of that segment. A single long segment is plain influence: S = 0 and R = C^-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from tda.blocks import Block
from tda.curvature.eigen import Factor
from tda.curvature.fisher import Fisher
from tda.curvature.inverse import spectrum
from tda.curvature.unrolled import respond, survive
from tda.directions import Dense, Direction, take
from tda.methods.kfac import CHUNK
from tda.methods.options import SaneDamping
from tda.methods.precondition import precondition
from tda.methods.shortened import Shortened
from tda.methods.work import Fit, Made, Work
from tda.products import Products, fast_float32
from tda.trajectory import Segment


def _segments(value: object) -> object:
    stops = value if isinstance(value, list | tuple) else [value]
    if not stops or any(isinstance(stop, bool) or not isinstance(stop, int) or stop < 1 for stop in stops):
        raise ValueError(f"segments must be a number >= 1, or the list of the steps at which they stop, got {value!r}")
    if any(stop <= before for before, stop in pairwise(stops)):
        raise ValueError(f"segments = {list(stops)}: the steps at which segments stop must rise; give each once, in order")
    return value if isinstance(value, int) else tuple(stops)


def _damping(value: object) -> object:
    if value == "heuristic":
        raise ValueError('damping must be a number >= 0, got "heuristic"; leave it out to take the training\'s weight decay')
    return value


class Source(Shortened):
    """influence[q, i] = -(1/N) g_q^T sum_l S_L ... S_{l+1} R_l gbar_l(i), C_l being EK-FAC pooled over the segment's checkpoints.

    fisher: as for ekfac. segments: how many, or the step at which each stops; per_segment: checkpoints that stand for one. damping:
    what is added to C_l; by default the weight decay that the training reported, which pulls as curvature does.
    """

    name: Literal["source"] = "source"
    fisher: Fisher = "sampled"
    segments: Annotated[int | tuple[int, ...], BeforeValidator(_segments)] = 3
    per_segment: int = Field(default=2, ge=1)
    damping: Annotated[SaneDamping | None, BeforeValidator(_damping)] = None
    meets: ClassVar[Literal["final", "checkpoints", "averages"]] = "checkpoints"

    @property
    def fits(self) -> tuple[Fit, ...]:
        """One Fisher per segment."""
        return tuple(Fit("kronecker", self.fisher, segment) for segment in range(self.passes))

    @property
    def passes(self) -> int:
        """One per segment."""
        return self.segments if isinstance(self.segments, int) else len(self.segments)

    @property
    def vectors(self) -> int:
        """The directions of every segment, what is passed on to the next one, and what that is made of."""
        return self.passes + 2

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_{q,l} = -R_l S_{l+1} ... S_L g_q, one pass per segment, made from the last segment backwards."""
        passes: list[list[Direction]] = []
        told = [self._told(segment) for segment in work.segments]
        for k in reversed(range(len(work.segments))):
            passes.insert(0, self._respond(work, k, gradients))
            if k > 0:
                gradients = self._survive(work, k, gradients)
        return Made(passes, {"segments": told})

    def _respond(self, work: Work, k: int, pushed: Sequence[Direction]) -> list[Direction]:
        """-R u in segment k, for what the segments after it leave of the query gradients, u."""
        horizon, damping = work.segments[k].horizon, self._damping_in(work.segments[k])
        return _mapped(work, k, pushed, lambda values: -respond(values + damping, horizon), work.products)

    def _survive(self, work: Work, k: int, pushed: Sequence[Direction]) -> list[Direction]:
        """S u in segment k."""
        horizon, damping = work.segments[k].horizon, self._damping_in(work.segments[k])
        return _mapped(work, k, pushed, lambda values: survive(values + damping, horizon), "full")  # it is multiplied on: no rounding

    def _damping_in(self, segment: Segment) -> float:
        """What is added to the curvature of a segment."""
        return float(segment.weight_decay if self.damping is None else self.damping)

    def _told(self, segment: Segment) -> dict[str, Any]:
        """A segment as JSON: its steps, horizon and damping (`damping_of` gives none: each segment may have another), its checkpoints."""
        return {
            "steps": [segment.start_step, segment.stop_step],
            "horizon": float(segment.horizon),
            "damping": self._damping_in(segment),
            "checkpoints": list(segment.checkpoints),
        }


class FastSource(Source):
    """SOURCE with curvature and training gradients at each segment's mean weights, instead of means over its checkpoints."""

    name: Literal["fast_source"] = "fast_source"  # type: ignore[assignment]
    meets: ClassVar[Literal["final", "checkpoints", "averages"]] = "averages"


def _mapped(work: Work, k: int, gradients: Sequence[Direction], of: Callable[[Tensor], Tensor], products: Products) -> list[Direction]:
    """A function of segment k's curvature times gradients: `of` maps eigenvalues."""
    with fast_float32():
        each = zip(work.attributed.blocks, work.curvature[k], gradients, strict=True)
        return [_mapped_block(block, factor, gradient, of, products) for block, factor, gradient in each]


def _mapped_block(block: Block, factor: Factor, gradient: Direction, of: Callable[[Tensor], Tensor], products: Products) -> Direction:
    values = of(spectrum(factor, "ekfac").double()).to(factor.kfac_out.dtype)
    count = len(gradient.matrix if isinstance(gradient, Dense) else gradient.left)
    matrix = values.new_empty(count, *values.shape, dtype=torch.bfloat16 if products == "bfloat16" else values.dtype)
    step = max(1, CHUNK // block.size)
    for start in range(0, count, step):
        some = slice(start, start + step)
        matrix[some] = precondition(factor, take(gradient, some), values, products)
    return Dense(matrix)
