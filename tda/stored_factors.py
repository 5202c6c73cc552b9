"""The Kronecker factors of a stored fit, read back: `factors.zarr/layers/<layer>/basis_out, basis_in, kfac_out, kfac_in, eigenvalues`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tda import location
from tda.blocks import Block
from tda.curvature.eigen import Factor


def load_factors(url: str, blocks: Sequence[Block], *, eigenvalues: bool = True, layers: slice | None = None) -> list[Factor]:
    """The factors of the fit at a URL, one per block, in the dtypes they are stored in; without `eigenvalues` while it is under way.

    layers: of these blocks alone.
    A block without Kronecker structure has no bases. Raises FileNotFoundError where there is no fit.
    """
    group = location.open_group(location.join(url, "factors.zarr"), "r")

    def read(b: int, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(group[f"layers/{b}/{name}"][...]))  # type: ignore[index]

    found = []
    for b in range(len(blocks))[layers or slice(None)]:
        bases = [read(b, name) if f"layers/{b}/{name}" in group else None for name in ("basis_out", "basis_in")]
        factor = Factor(bases[0], bases[1], read(b, "kfac_out"), read(b, "kfac_in"))
        found.append(replace(factor, eigenvalues=read(b, "eigenvalues")) if eigenvalues else factor)
    return found
