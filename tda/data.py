"""Examples by id, as batches, and what they are: digests and checks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tda.errors import InputError, cause
from tda.problem import Batch, Problem


def load_batch(problem: Problem, dataset: Any, ids: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Batch:
    """Examples `ids` of a map-style dataset, collated; floating-point inputs and targets are cast to `dtype`.

    Raises InputError where an item is not (inputs, targets) or cannot be collated, naming the ids. What the dataset itself raises is
    passed on: a file that cannot be read is nothing that the user typed.
    """
    items = [dataset[int(i)] for i in ids]
    try:
        inputs, targets = _two(problem.collate(items))
        targets = torch.as_tensor(targets)
    except Exception as error:
        raise InputError(
            f"examples {ids[0]}..{ids[-1]} cannot be collated as (inputs, targets): {cause(error)}; "
            "dataset[i] must return (inputs, targets), or define Problem.collate"
        ) from error

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    return Batch(tree_map(place, inputs), place(targets))


def _two(collated: Any) -> Any:
    if not isinstance(collated, (tuple, list)):  # a tensor or a dictionary of two would be taken apart without a word
        raise TypeError(f"collation gave a {type(collated).__name__}")
    return collated


def batches(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`ids` cut in pieces of `size`, in order."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def digest(problem: Problem, dataset: Any, split: str, *, size: int = 512) -> tuple[str, np.ndarray | None]:
    """sha256 over every example's inputs and targets in order, and the integer labels where each example has one.

    Checks on the way that the dataset is not empty and that no input is NaN or infinite. Returns (digest, labels (n,) int64 or None).
    Raises InputError.
    """
    n = length(dataset, split)
    total, labels = hashlib.sha256(f"{n}".encode()), []
    for ids in batches(range(n), size):
        batch = load_batch(problem, dataset, ids, dtype=torch.float64)
        for leaf in tree_leaves((batch.inputs, batch.targets)):
            if isinstance(leaf, Tensor):
                _check_finite(leaf, ids, split)
                total.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode() + leaf.contiguous().numpy().tobytes())
            else:
                total.update(repr(leaf).encode())
        if batch.targets.ndim == 1 and not batch.targets.is_floating_point():
            labels.append(batch.targets.numpy().astype(np.int64))
    return total.hexdigest(), np.concatenate(labels) if labels else None


def length(dataset: Any, split: str) -> int:
    """Number of examples; InputError where there are none, or where the dataset is not map-style."""
    try:
        n = len(dataset)
    except TypeError as error:
        raise InputError(f"{split}_data() must be map-style with a length, got {type(dataset).__name__}; wrap it in a list") from error
    if n == 0:
        raise InputError(f"{split}_data() is empty: there is nothing to attribute; check the problem's data source")
    return n


def _check_finite(leaf: Tensor, ids: Sequence[int], split: str) -> None:
    if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
        bad = int((~torch.isfinite(leaf)).reshape(len(ids), -1).any(1).nonzero()[0])
        raise InputError(f"{split} example {ids[bad]} has inputs or targets that are NaN or infinite; remove or mend it")
