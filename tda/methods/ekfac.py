"""EK-FAC influence (Grosse et al. 2023): K-FAC's eigenbasis with the eigenvalues that the Fisher has in it (George et al. 2018)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tda.blocks import Block
from tda.curvature.eigen import Factor
from tda.curvature.separable import separable_direction
from tda.directions import Direction
from tda.methods.kfac import KFAC
from tda.products import Products


class EKFAC(KFAC):
    """influence[q, i] = -(1/N) g_q^T (F_ekfac + lambda I)^-1 g_i per layer, Lambda = E_i[(U_S^T D_i U_A)^2].

    separable: a relative error (e.g. 1e-3) up to which 1/(Lambda + lambda) may be used as a short sum of outer products, where that is
    cheaper; 0 is exact. The error reached is measured and stored with the run.
    """

    name: Literal["ekfac"] = "ekfac"  # type: ignore[assignment]
    separable: float = Field(default=0.0, ge=0.0, le=0.1)
    curvature: ClassVar[Literal["kfac", "ekfac"] | None] = "ekfac"

    def direction(self, block: Block, factor: Factor | None, gradient: Direction, products: Products) -> Direction:
        """V_q = -(F_ekfac + lambda I)^-1 g_q, factored where `separable` allows it and it is cheaper."""
        assert factor is not None
        short = separable_direction(block, factor, gradient, self.damping, self.separable) if self.separable > 0 else None
        return short if short is not None else super().direction(block, factor, gradient, products)

    def exact(self) -> EKFAC:
        """The same method without the separable form."""
        return self.model_copy(update={"separable": 0.0})
