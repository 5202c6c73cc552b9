"""GradDot: the inner product of the gradients, influence with the identity for a Hessian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tda.directions import Direction, scaled, scorable
from tda.methods.shortened import Shortened
from tda.methods.work import Made, Work
from tda.self_products import Own, Plain


class GradDot(Shortened):
    """influence[q, i] = -(1/N) grad f_q . grad l_i."""

    name: Literal["graddot"] = "graddot"

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_q = -g_q."""
        return Made([[scorable(scaled(g, -1.0), block) for block, g in zip(work.attributed.blocks, gradients, strict=True)]])

    def own(self, curvature: Sequence[Any]) -> Own:
        """g^T g."""
        return Plain()
