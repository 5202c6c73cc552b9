"""The damped inverse in the eigenbasis: (F + lambda I)^-1 V = U_S [(U_S^T V U_A) / (Lambda + lambda)] U_A^T."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tda.curvature.eigen import Factor

Damping = float | Literal["heuristic"]

#: The heuristic of Grosse et al. (2023): lambda = 0.1 x the layer's mean eigenvalue.
HEURISTIC = 0.1


def spectrum(factor: Factor, kind: Literal["kfac", "ekfac"]) -> Tensor:
    """Eigenvalues (groups, out, in) that a method uses."""
    if kind == "kfac":
        return factor.kronecker
    assert factor.eigenvalues is not None
    return factor.eigenvalues


def damping_value(factor: Factor, kind: Literal["kfac", "ekfac"], damping: Damping) -> float:
    """lambda for one block: the number itself, or HEURISTIC x the mean eigenvalue."""
    return HEURISTIC * float(spectrum(factor, kind).double().mean()) if damping == "heuristic" else float(damping)


def inverse_eigenvalues(factor: Factor, kind: Literal["kfac", "ekfac"], damping: Damping) -> Tensor:
    """1 / (Lambda + lambda), (groups, out, in).

    0 where the sum is nothing but rounding, below the largest eigenvalue x the width x the precision: a direction that no example ever
    moves, without damping (the pseudo-inverse).
    """
    values = spectrum(factor, kind).double()
    damped = values + damping_value(factor, kind, damping)
    rounding = float(values.max()) * max(values.shape[1:]) * torch.finfo(factor.kfac_out.dtype).eps if damping == 0 else 0.0
    kept = damped > rounding
    return torch.where(kept, 1 / torch.where(kept, damped, 1.0), 0.0).to(factor.kfac_out.dtype)
