"""K-FAC influence: the inverse of a Kronecker product of covariances, layer by layer (Martens & Grosse 2015)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import field_validator

from tda.blocks import Block
from tda.curvature.eigen import Factor
from tda.curvature.fisher import Fisher
from tda.curvature.inverse import Damping, damping_value, inverse_eigenvalues
from tda.directions import Dense, Direction, take
from tda.methods.method import Method
from tda.methods.precondition import precondition
from tda.products import Products

#: Entries of query gradients preconditioned at a time: bounds the temporary matrices.
CHUNK = 1 << 22


class KFAC(Method):
    """influence[q, i] = -(1/N) g_q^T (S (x) A + lambda I)^-1 g_i per layer.

    fisher: "exact" (expectation over labels; few classes or a Gaussian likelihood), "sampled" (labels drawn per example id) or
    "empirical" (the data's labels). damping: an absolute lambda for every layer, or "heuristic", 0.1 x the layer's mean eigenvalue.
    """

    name: Literal["kfac"] = "kfac"
    fisher: Fisher = "sampled"
    damping: Damping = "heuristic"
    curvature: ClassVar[Literal["kfac", "ekfac"] | None] = "kfac"

    @field_validator("damping", mode="before")
    @classmethod
    def _damping_is_sane(cls, value: object) -> object:
        if value == "heuristic":
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f'damping must be a finite number >= 0 or "heuristic", got {value!r}')
        return float(value)

    @property
    def _kind(self) -> Literal["kfac", "ekfac"]:
        assert self.curvature is not None
        return self.curvature

    def direction(self, block: Block, factor: Factor | None, gradient: Direction, products: Products) -> Direction:
        """V_q = -(F + lambda I)^-1 g_q in the Kronecker eigenbasis."""
        assert factor is not None
        inverse = -inverse_eigenvalues(factor, self._kind, self.damping)
        count = len(gradient.matrix if isinstance(gradient, Dense) else gradient.left)
        dtype = torch.bfloat16 if products == "bfloat16" else inverse.dtype
        matrix = torch.empty(count, *inverse.shape, dtype=dtype)
        step = max(1, CHUNK // block.size)
        for k in range(0, count, step):
            some = slice(k, k + step)
            matrix[some] = precondition(factor, take(gradient, some), inverse, products)
        return Dense(matrix)

    def damping_of(self, factor: Factor | None) -> float | None:
        """lambda of the block."""
        assert factor is not None
        return damping_value(factor, self._kind, self.damping)
