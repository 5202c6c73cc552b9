"""What training for a while makes of one direction of curvature s: maps of eigenvalues (Bae et al. 2024).

A perturbation of the weights decays, and a constant push of the gradient builds up, along each eigenvector:

    dw(t) = exp(-t s) dw(0) - (1 - exp(-t s)) / s * g
"""

from __future__ import annotations

import torch
from torch import Tensor


def survive(values: Tensor, horizon: float) -> Tensor:
    """exp(-horizon s), in float64: the share of a perturbation that is left after training for `horizon` (sum of learning rates)."""
    return torch.exp(-horizon * values.double())


def respond(values: Tensor, horizon: float) -> Tensor:
    """(1 - exp(-horizon s)) / s, in float64; `horizon` at s = 0, and 1/s where horizon x s is large: what a unit push builds up to."""
    values = values.double()
    flat = values == 0
    return torch.where(flat, horizon, -torch.expm1(-horizon * values) / torch.where(flat, 1.0, values))
