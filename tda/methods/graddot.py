"""GradDot: the inner product of the gradients, influence with the identity for a Hessian."""

from __future__ import annotations

from typing import Literal

from tda.blocks import Block
from tda.curvature.eigen import Factor
from tda.directions import Direction, scaled, scorable
from tda.methods.method import Method
from tda.products import Products


class GradDot(Method):
    """influence[q, i] = -(1/N) grad f_q . grad l_i."""

    name: Literal["graddot"] = "graddot"

    def direction(self, block: Block, factor: Factor | None, gradient: Direction, products: Products) -> Direction:
        """V_q = -g_q."""
        return scorable(scaled(gradient, -1.0), block)
