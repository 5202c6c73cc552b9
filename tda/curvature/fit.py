"""A whole fit in memory, for notebooks and benchmarks; runs do the same in shards (tasks/factors.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tda.attributed import Attributed
from tda.curvature.covariances import covariance_sums
from tda.curvature.eigen import Factor, decompose, eigenvalue_sums
from tda.curvature.fisher import Fisher
from tda.data import Batching
from tda.products import Products


def fit_factors(
    attributed: Attributed, dataset: Any, *, fisher: Fisher, seed: int = 0, batch_size: Batching, products: Products = "full"
) -> list[Factor]:
    """The K-FAC and EK-FAC factors of every block over a whole dataset."""
    ids = range(len(dataset))
    options: dict[str, Any] = {"fisher": fisher, "seed": seed, "batch_size": batch_size, "products": products}
    covariances = covariance_sums(attributed, dataset, ids, **options)
    factors = [decompose(b, c, len(dataset), attributed.dtype) for b, c in zip(attributed.blocks, covariances, strict=True)]
    sums = eigenvalue_sums(attributed, factors, dataset, ids, **options)
    return [replace(factor, eigenvalues=total / len(dataset)) for factor, total in zip(factors, sums, strict=True)]
