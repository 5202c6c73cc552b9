"""The largest eigenvalue of the curvature, from which step sizes follow: Lanczos' iteration, which is power iteration made quick."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tda.solvers.system import Precondition, inner

#: Lanczos steps at most, and the relative change of the value at which it stops.
STEPS, ACCURACY = 40, 1e-3


def extreme_eigenvalues(
    product: Callable[[Tensor], Tensor],
    size: int,
    *,
    precondition: Precondition | None = None,
    like: Tensor | None = None,
    steps: int = STEPS,
    accuracy: float = ACCURACY,
) -> tuple[float, float, int]:
    """(least, largest, products used): eigenvalues of a symmetric C, or of P^-1 C; NaN where a product is.

    product: vectors (1, D) -> (1, D). precondition: P^-1 v, symmetric and positive definite. like: a tensor whose dtype and device the
    vectors get. The start vector is fixed, so the values are the same every time. The largest is reached from below, and waited for;
    the least is an upper bound. Without reorthogonalisation the largest is found again and again, which does no harm, and three
    vectors are enough.
    """
    start = np.random.Generator(np.random.Philox(key=[0, 0])).standard_normal(size)
    u = torch.from_numpy(start)[None].to(torch.empty(0, dtype=torch.float64) if like is None else like)
    before, least, value = torch.zeros_like(u), 0.0, 0.0
    alphas: list[float] = []
    betas: list[float] = []
    for k in range(steps):
        v = u if precondition is None else precondition(u)
        square = float(inner(u, v))
        if k > 0 and square <= _negligible(alphas, betas, u.dtype):
            break  # the space is exhausted: the value is exact
        beta = square**0.5
        u, v = u / beta, v / beta
        if k > 0:
            betas.append(beta)
        w = product(v) - beta * before
        alphas.append(float(inner(v, w)))
        before, u = u, w - alphas[-1] * u
        if not math.isfinite(alphas[-1]):
            return math.nan, math.nan, len(alphas)
        last = value
        least, value = _extremes_of(alphas, betas)
        if k > 0 and abs(value - last) <= accuracy * abs(value):
            break
    return least, value, len(alphas)


def _negligible(alphas: list[float], betas: list[float], dtype: torch.dtype) -> float:
    """The squared length below which what is left of a Lanczos vector is rounding."""
    largest = max([abs(a) for a in alphas] + betas)
    return (largest * torch.finfo(dtype).eps * 10) ** 2


def _extremes_of(alphas: list[float], betas: list[float]) -> tuple[float, float]:
    values = np.linalg.eigvalsh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
    return float(values[0]), float(values[-1])
