"""What a gradient method is: its options, the curvature that it needs, and the direction that it makes of a query gradient."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from tda.blocks import Block
from tda.curvature.eigen import Factor
from tda.curvature.fisher import Fisher
from tda.directions import Direction
from tda.products import Products

#: The unit of every score that is an influence.
INFLUENCE_UNIT = "units of the measurement (nats for a log-likelihood loss)"


class Method(BaseModel):
    """Options of one `[[methods]]` table; the subclass is the method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    label: str | None = Field(default=None, min_length=1, max_length=64, pattern=r"^[\w.+-]+$")

    #: Which eigenvalues it needs, if any.
    curvature: ClassVar[Literal["kfac", "ekfac"] | None] = None
    #: Whether scores are divided by the norms of both gradients.
    cosine: ClassVar[bool] = False
    unit: ClassVar[str] = INFLUENCE_UNIT

    @property
    def title(self) -> str:
        """The name under which its scores are stored."""
        return self.label or self.name

    @property
    def fisher_kind(self) -> Fisher | None:
        """The Fisher that its factors are of; None where it needs no factors."""
        return getattr(self, "fisher", None)

    def direction(self, block: Block, factor: Factor | None, gradient: Direction, products: Products) -> Direction:
        """V_q = -P^-1 g_q of one block, without the factor 1/N, for a batch of query gradients."""
        raise TypeError(f"{type(self).__name__} makes no directions")

    def damping_of(self, factor: Factor | None) -> float | None:
        """The damping used for a block, in units of its eigenvalues; None where there is none."""
        return None
