"""TracIn: what each training step did to the query, to first order, summed over the training (Pruthi et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tda.directions import Direction, scaled, scorable
from tda.methods.shortened import Shortened
from tda.methods.work import Made, Work
from tda.self_products import Own, Plain

if TYPE_CHECKING:
    from tda.attributed import Attributed
    from tda.trajectory import Segment


class TracIn(Shortened):
    """TracInCP: influence[q, i] = -(1/N) sum_c t_c grad f_q(w_c) . grad l_i(w_c).

    The training is cut into `checkpoints` stretches of equal numbers of steps; w_c is the checkpoint nearest to the middle of stretch c,
    and t_c = sum of eta / (1 - beta) over all of its steps, momentum counted. A step with example i in its batch of B moves the weights by
    -(eta / B) grad l_i, and i is in a share B / N of the steps: hence the t_c / N. So this is SOURCE without curvature: an
    example's effect on the query is counted where it happens, and nothing that comes after changes it.
    """

    name: Literal["tracin"] = "tracin"
    checkpoints: int = Field(default=5, ge=1)
    meets: ClassVar[Literal["final", "checkpoints", "averages"]] = "checkpoints"
    asks: ClassVar[Literal["final", "checkpoints"]] = "checkpoints"
    per_segment: ClassVar[int] = 1

    @property
    def segments(self) -> int:
        """Stretches that the training is cut into."""
        return self.checkpoints

    @property
    def passes(self) -> int:
        """One per checkpoint."""
        return self.checkpoints

    @property
    def vectors(self) -> int:
        """A gradient at every checkpoint."""
        return self.checkpoints + 2

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_{q,c} = -t_c grad f_q(w_c), one pass per checkpoint."""
        assert work.gradients_at is not None
        blocks, passes = work.attributed.blocks, []
        for k, segment in enumerate(work.segments):
            found = work.gradients_at(k)
            passes.append([scorable(scaled(g, -segment.horizon), block) for block, g in zip(blocks, found, strict=True)])
        told = [{"steps": [s.start_step, s.stop_step], "horizon": s.horizon, "checkpoints": list(s.checkpoints)} for s in work.segments]
        return Made(passes, {"segments": told})

    def owns(self, attributed: Attributed, curvature: Sequence[Any], segments: Sequence[Segment], seed: int) -> Sequence[Own | None]:
        """t_c g^T g at each checkpoint."""
        del attributed, curvature, seed
        return [Plain(segment.horizon) for segment in segments]
