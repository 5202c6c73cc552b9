"""The random numbers of a chain: its noise and its batches, functions of (seed, chain, step) alone.

Nothing of a generator is ever stored: a chain that starts again draws the block of numbers in which its step lies anew, and a chain has
the same numbers alone or beside others. Shape suffixes: C chains, D numbers of a model that move, S steps, B examples of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tda.device import CPU
from tda.problem import Batch
from tda.recipe import rows
from tda.sampling.options import Sampling

#: Normal numbers of one chain that are drawn at once: seeding a generator costs as much as drawing 500.
DRAWN = 1 << 15
#: The noise of models with up to so many numbers is drawn by the processor, and is the same on every device. Of larger ones a GPU draws its
#: own, other numbers of the same distribution: it would wait for those of a processor.
DRAWN_HERE = 1 << 22
#: Numbers of the examples that are gathered at once, for as many steps as they make: few gathers, and all of them in the cache.
GATHERED = 1 << 17


def key(purpose: str, *numbers: int) -> int:
    """A seed for one purpose: 63 bits of a hash."""
    text = " ".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Noise:
    """Normal numbers of some chains, with standard deviation `scale`."""

    def __init__(self, seed: int, chains: Sequence[int], like: Tensor, scale: float = 1.0) -> None:
        self.seed, self.chains, self.scale = seed, chains, scale
        self.block = -1
        numbers = like.shape[-1]
        self.steps = max(1, DRAWN // numbers)  # of the model alone: whoever stands beside a chain does not change its numbers
        self.drawn_CSD = like.new_empty(len(chains), self.steps, numbers)
        self.each_CD = self.drawn_CSD.unbind(1)
        self.drawn_on = CPU if numbers <= DRAWN_HERE else like.device
        self.generator = torch.Generator(self.drawn_on)

    def at(self, step: int) -> Tensor:
        """The noise of one step, (C, D); it is overwritten later."""
        block, place = divmod(step, self.steps)
        if block != self.block:
            self.block = block
            for chain, numbers_SD in zip(self.chains, self.drawn_CSD, strict=True):
                self.generator.manual_seed(key("noise", self.seed, chain, block))
                if numbers_SD.device == self.drawn_on:
                    numbers_SD.normal_(0.0, self.scale, generator=self.generator)
                else:
                    drawn = torch.empty_like(numbers_SD, device=self.drawn_on)
                    numbers_SD.copy_(drawn.normal_(0.0, self.scale, generator=self.generator))
        return self.each_CD[place]


class Batches:
    """The batches of some chains: in every epoch each chain has its own order of the examples, cut in batches without replacement.

    What is left over at the end of an order is not used in that epoch, so that every step estimates the mean loss from as many examples.
    A full batch is all examples in their own order, the same tensors in every step.
    """

    def __init__(self, sampling: Sampling, chains: Sequence[int], data: Batch) -> None:
        self.sampling, self.chains, self.data = sampling, chains, data
        self.examples = len(data.targets)
        self.size = sampling.batch(self.examples)
        self.orders: dict[int, tuple[int, Tensor]] = {}

    def steps(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start..stop, leaves (C, B, ...)."""
        leaves, kind = tree_flatten(tuple(self.data))
        if self.sampling.batch_size == "full":
            whole: Batch = Batch(*tree_unflatten([leaf.expand(len(self.chains), *leaf.shape) for leaf in leaves], kind))
            for _ in range(start, stop):
                yield whole
            return
        numbers = sum(leaf[0].numel() for leaf in leaves) * self.size * len(self.chains)
        some = max(1, GATHERED // numbers)
        for first in range(start, stop, some):
            gathered = rows(self.data, self.ids(first, min(first + some, stop)).to(self.data.targets.device))
            for each in zip(*(leaf.unbind(0) for leaf in tree_flatten(tuple(gathered))[0]), strict=True):
                yield Batch(*tree_unflatten(each, kind))

    def ids(self, start: int, stop: int) -> Tensor:
        """Which examples they are, (S, C, B)."""
        per_epoch = self.examples // self.size
        found = torch.empty(stop - start, len(self.chains), self.size, dtype=torch.int64)
        for c, chain in enumerate(self.chains):
            for first in range(start - start % per_epoch, stop, per_epoch):
                low, high = max(start, first), min(stop, first + per_epoch)
                order = self._order(chain, first // per_epoch)
                found[low - start : high - start, c] = order[(low - first) * self.size : (high - first) * self.size].view(-1, self.size)
        return found

    def _order(self, chain: int, epoch: int) -> Tensor:
        if self.orders.get(chain, (-1,))[0] != epoch:
            generator = torch.Generator().manual_seed(key("batches", self.sampling.seed, chain, epoch))
            self.orders[chain] = (epoch, torch.randperm(self.examples, generator=generator))
        return self.orders[chain][1]
