"""What products with the curvature keep in memory: batches that were read lately, and how large a batch's activations are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tda.problem import Batch

#: Batches up to this many bytes in all are kept: a solver reads the same examples at every step, and reading may cost more than the step.
KEPT_BYTES = 256 << 20


class RecentBatches:
    """Batches by the ids of their examples, the latest ones up to KEPT_BYTES."""

    def __init__(self, load: Callable[[Sequence[int]], Batch]) -> None:
        self._load = load
        self._kept: OrderedDict[tuple[int, ...], Batch] = OrderedDict()
        self._bytes = 0

    def load(self, ids: Sequence[int]) -> Batch:
        """Examples `ids` as a batch."""
        key = tuple(ids)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        batch = self._load(ids)
        if batch_bytes(batch) <= KEPT_BYTES:
            self._kept[key] = batch
            self._bytes += batch_bytes(batch)
            while self._bytes > KEPT_BYTES:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= batch_bytes(oldest)
        return batch


def batch_bytes(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    return sum(leaf.nbytes for leaf in tree_leaves((batch.inputs, batch.targets)) if isinstance(leaf, Tensor))


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, the parameters themselves apart: the size of the activations."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    return sum(seen.values()) + outputs.nbytes
