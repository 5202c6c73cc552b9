"""EK-FAC as a preconditioner in flat coordinates: (F_ekfac + damping)^-1 v, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tda import flat
from tda.blocks import Block
from tda.curvature.eigen import Factor, rotate
from tda.curvature.inverse import Damping, damping_value, inverse_eigenvalues
from tda.solvers.system import pieces


@dataclass(frozen=True, eq=False)
class EKFACPreconditioner:
    """v (query, D) -> (F_ekfac + damping)^-1 v, (query, D). dampings: one per block."""

    blocks: Sequence[Block]
    factors: Sequence[Factor]
    dampings: Sequence[float]

    def __call__(self, vectors: Tensor) -> Tensor:
        """P^-1 v, in the dtype of v."""
        found = torch.empty_like(vectors)
        step = pieces(vectors)
        for some, to in zip(vectors.split(step), found.split(step), strict=True):
            parts = zip(self.factors, self._inverses, flat.unflatten(self.blocks, some), flat.unflatten(self.blocks, to), strict=True)
            for factor, inverse, matrix, place in parts:
                place.copy_(rotate(factor, rotate(factor, matrix.to(inverse)) * inverse, back=True))
        return found

    @cached_property
    def _inverses(self) -> list[Tensor]:
        return [inverse_eigenvalues(f, "ekfac", damping) for f, damping in zip(self.factors, self.dampings, strict=True)]

    @property
    def largest(self) -> float:
        """The largest of EK-FAC's eigenvalues."""
        return max(float(factor.eigenvalues.max()) for factor in self.factors if factor.eigenvalues is not None)

    def damped(self, least: float) -> EKFACPreconditioner:
        """The same with dampings of at least `least`."""
        return replace(self, dampings=[max(damping, least) for damping in self.dampings])


def ekfac_preconditioner(blocks: Sequence[Block], factors: Sequence[Factor], damping: Damping | Sequence[float]) -> EKFACPreconditioner:
    """(F_ekfac + damping)^-1 in flat coordinates.

    damping: one number for every block, one per block, or "heuristic", 0.1 x the block's mean eigenvalue.
    """
    each = [damping] * len(blocks) if isinstance(damping, float | int | str) else list(damping)
    values = [damping_value(factor, "ekfac", one) for factor, one in zip(factors, each, strict=True)]
    return EKFACPreconditioner(tuple(blocks), tuple(factors), tuple(values))
