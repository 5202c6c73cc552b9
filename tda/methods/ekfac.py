"""EK-FAC influence (Grosse et al. 2023): K-FAC's eigenbasis with the eigenvalues that the Fisher has in it (George et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tda.blocks import Block
from tda.curvature.eigen import Factor
from tda.curvature.separable import separable_direction
from tda.directions import Direction, take
from tda.methods.kfac import KFAC
from tda.methods.work import Made, Work
from tda.products import Products

#: Queries and training examples on which a separable form is compared with the exact one.
CHECKED = 64


class EKFAC(KFAC):
    """influence[q, i] = -(1/N) g_q^T (F_ekfac + lambda I)^-1 g_i per layer, Lambda = E_i[(U_S^T D_i U_A)^2].

    separable: a relative error (e.g. 1e-3) up to which 1/(Lambda + lambda) may be used as a short sum of outer products, where that is
    cheaper; 0 is exact. The error reached is measured and stored with the run.
    """

    name: Literal["ekfac"] = "ekfac"  # type: ignore[assignment]
    separable: float = Field(default=0.0, ge=0.0, le=0.1)
    spectrum: ClassVar[Literal["kfac", "ekfac"]] = "ekfac"

    @model_validator(mode="after")
    def _one_approximation_at_a_time(self) -> Self:
        if self.separable > 0 and self.query_rank is not None:
            raise ValueError(
                f"query_rank = {self.query_rank} and separable = {self.separable:g} approximate the same; leave one of them out"
            )
        return self

    @property
    def shares_passes(self) -> bool:
        """Where a separable form is compared with the exact one."""
        return self.separable > 0

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_q = -(F_ekfac + lambda I)^-1 g_q; factored where `separable` allows it, it is cheaper, and what is measured says so too.

        told: the relative error of the scores of CHECKED queries and training examples; above what is allowed the exact form is taken.
        """
        if self.separable == 0:
            return super().directions(work, gradients)
        from tda.scoring import score_error  # it imports this package

        exact, made = self.model_copy(update={"separable": 0.0}), super().directions(work, gradients).passes[0]
        some = [take(gradient, slice(CHECKED)) for gradient in gradients]
        ids = range(0, len(work.train), max(1, len(work.train) // CHECKED))
        short, long = [take(direction, slice(CHECKED)) for direction in made], exact.directions(work, some).passes[0]
        error = score_error(work.attributed, work.train, ids, short, long, batch_size=work.batch_size)
        if error <= self.separable:
            return Made([made], {"separable_error": error})
        return Made(exact.directions(work, gradients).passes, {"separable_error": 0.0})

    def direction(self, block: Block, factor: Factor, gradient: Direction, products: Products) -> Direction:
        """V_q of one block, factored where `separable` allows it and it is cheaper."""
        short = separable_direction(block, factor, gradient, self.damping, self.separable) if self.separable > 0 else None
        return short if short is not None else super().direction(block, factor, gradient, products)
