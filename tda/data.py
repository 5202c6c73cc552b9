"""Examples by id, as batches, and what they are: digests and checks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from tda.device import CPU
from tda.errors import InputError, cause
from tda.problem import Batch, Problem, Split

#: So many examples, spread over a split, are read twice: what differs then is not what will be attributed.
REREAD = 8


def load_batch(problem: Problem, dataset: Any, ids: Sequence[int], *, dtype: torch.dtype, device: torch.device = CPU) -> Batch:
    """Examples `ids` of a map-style dataset, collated; floating-point inputs and targets are cast to `dtype`.

    Inputs in any kind of mapping (a tokenizer's BatchEncoding, say) become plain dicts, which Problem.predict passes on by name.
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
        if isinstance(leaf, Mapping):
            return {key: tree_map(place, value) for key, value in leaf.items()}
        if not isinstance(leaf, Tensor):
            return leaf
        # From pinned memory a GPU fetches a batch by itself, while Python goes on.
        leaf = leaf.pin_memory() if device.type == "cuda" and leaf.device == CPU else leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None, non_blocking=True)

    return Batch(tree_map(place, inputs), place(targets))


def _two(collated: Any) -> Any:
    if not isinstance(collated, (tuple, list)):  # a tensor or a dictionary of two would be taken apart without a word
        raise TypeError(f"collation gave a {type(collated).__name__}")
    return collated


@dataclass(frozen=True)
class Budget:
    """Batches of at most so many tokens, padding counted. lengths: tokens of each example, by its id."""

    tokens: int
    lengths: np.ndarray


#: How examples are cut into batches: so many each, or by length into so many tokens each.
Batching = int | Budget
#: Examples of a batch of short sequences.
MOST_EXAMPLES = 1024


def batches(ids: Sequence[int], size: Batching) -> Iterator[Sequence[int]]:
    """`ids` in pieces: of so many in order; or of a budget of tokens, the shortest first, so that little is computed on padding.

    An example that is longer than the budget is a batch of its own. `in_order` undoes the sorting.
    """
    if isinstance(size, int):
        for start in range(0, len(ids), size):
            yield ids[start : start + size]
        return
    found: list[int] = []
    for i in sorted(ids, key=lambda i: (size.lengths[i], i)):
        if found and ((len(found) + 1) * int(size.lengths[i]) > size.tokens or len(found) == MOST_EXAMPLES):
            yield found
            found = []
        found.append(i)
    if found:
        yield found


def in_order(ids: Sequence[int], parts: Sequence[Sequence[int]]) -> Tensor | None:
    """Where each of `ids` is in the concatenation of the batches they were cut into; None where they are in order already."""
    places = {i: place for place, i in enumerate(i for part in parts for i in part)}
    order = torch.tensor([places[i] for i in ids])
    return None if bool((order == torch.arange(len(order))).all()) else order


def lengths_of(problem: Problem, split: Split, examples: int) -> np.ndarray | None:
    """Tokens of each example, int64 (examples,), as the problem tells them; None where it does not.

    Raises InputError where they are not one whole number above 0 per example.
    """
    told = problem.lengths(split)
    if told is None:
        return None
    found = np.asarray(told)
    if found.shape != (examples,) or found.dtype.kind not in "iu" or found.min(initial=1) < 1:
        raise InputError(
            f"{type(problem).__name__}.lengths({split!r}) must be {examples} whole numbers above 0, the tokens of each example; "
            f"got shape {found.shape} of {found.dtype}; mend it, or return None"
        )
    return found.astype(np.int64)


def digest(
    problem: Problem, dataset: Any, split: str, *, size: int = 512, check: Callable[[Tensor], None] | None = None
) -> tuple[str, np.ndarray | None]:
    """sha256 over every example's inputs and targets in order, and the integer labels where each example has one.

    Checks on the way that the dataset is not empty, that no input is NaN or infinite, that reading an example again gives the same, and
    `check(targets)` of every batch, which raises InputError. Returns (digest, labels (n,) int64 or None). Raises InputError.
    """
    n = length(dataset, split)
    _check_repeatable(problem, dataset, split, range(0, n, max(1, n // REREAD)))
    total, labels = hashlib.sha256(f"{n}".encode()), []
    for ids in batches(range(n), size):
        batch = load_batch(problem, dataset, ids, dtype=torch.float64)
        _add(total, batch, ids, split)
        if check is not None:
            _check_targets(check, batch.targets, ids, split)
        if batch.targets.ndim == 1 and not batch.targets.is_floating_point():
            labels.append(batch.targets.numpy().astype(np.int64))
    return total.hexdigest(), np.concatenate(labels) if labels else None


def _add(total: Any, batch: Batch, ids: Sequence[int], split: str) -> None:
    """Feed a batch to a hash: where each leaf stands, its type, shape and bytes."""
    for path, leaf in tree_flatten_with_path((batch.inputs, batch.targets))[0]:
        head = keystr(path)
        if isinstance(leaf, Tensor):
            _check_finite(leaf, ids, split)
            total.update(f"{head}{leaf.dtype}{tuple(leaf.shape)}".encode() + leaf.contiguous().numpy().tobytes())
        elif isinstance(leaf, np.ndarray | np.generic) and leaf.dtype != object:
            total.update(f"{head}{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
        elif leaf is None or isinstance(leaf, str | bytes | bool | int | float):
            total.update(f"{head}{type(leaf).__name__}{leaf!r}".encode())
        else:
            raise InputError(
                f"{split} examples {ids[0]}..{ids[-1]} hold a {type(leaf).__name__}, whose content cannot be told apart; "
                "give tensors, arrays, text or numbers, in dicts, lists or tuples"
            )


def _check_repeatable(problem: Problem, dataset: Any, split: str, ids: Sequence[int]) -> None:
    for i in ids:
        seen = set()
        for _ in range(2):
            total = hashlib.sha256()
            _add(total, load_batch(problem, dataset, [i], dtype=torch.float64), [i], split)
            seen.add(total.digest())
        if len(seen) > 1:
            raise InputError(f"{split} example {i} differs when it is read again; switch random augmentation off")


def _check_targets(check: Callable[[Tensor], None], targets: Tensor, ids: Sequence[int], split: str) -> None:
    """`check(targets)`; where a batch does not pass, the first example that does not is named."""
    try:
        check(targets)
    except InputError:
        for k, i in enumerate(ids):
            try:
                check(targets[k : k + 1])
            except InputError as error:
                raise InputError(f"{split} example {i}: {error}") from error
        raise


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
