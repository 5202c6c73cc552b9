"""What retrained models measured, kept in objects that any later question may use: one folder per share of the training set.

    artifacts/retrained/<fingerprint>/<subsets>-<repeats>.safetensors    measurement (subset, repeat, query) of a rectangle, by range
    artifacts/retrained/<fingerprint>/<subsets>-<repeats>.json           after it: the seconds that it took, and its checksum

A folder's name says nothing of how many subsets or repeats were asked for, since neither changes a model: asking for more trains what is
missing, asking for fewer trains nothing. Objects are written once, whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tda import location

_NAME = re.compile(r"(\d+)\.\.(\d+)-(\d+)\.\.(\d+)\.safetensors")


@dataclass(frozen=True)
class Block:
    """A rectangle of subsets and repeats."""

    subsets: range
    repeats: range

    @property
    def stem(self) -> str:
        """Its name without a suffix."""
        return "-".join(f"{some.start:06d}..{some.stop:06d}" for some in (self.subsets, self.repeats))

    @property
    def where(self) -> tuple[slice, slice]:
        """Its place in an array (subset, repeat, ...)."""
        return slice(self.subsets.start, self.subsets.stop), slice(self.repeats.start, self.repeats.stop)

    @property
    def models(self) -> int:
        """How many."""
        return len(self.subsets) * len(self.repeats)


def names(url: str) -> list[str]:
    """The objects of measurements in a folder, also those of which only the receipt is left, by name."""
    found = {f"{name.rpartition('.')[0]}.safetensors" for name in location.list_names(url)}
    return sorted(name for name in found if _NAME.fullmatch(name))


def stored(url: str) -> list[Block]:
    """The blocks of a folder, by name."""
    found = [tuple(map(int, match.groups())) for name in location.list_names(url) if (match := _NAME.fullmatch(name))]
    return [Block(range(a, b), range(c, d)) for a, b, c, d in found]


def missing(held: Iterable[Block], subsets: int, repeats: int, most: int) -> list[Block]:
    """What is not in `held` of the first `subsets` and `repeats`, in blocks of at most `most` models, all subsets of a repeat first.

    Where an earlier try for the same counts was killed, these are the blocks that it had not finished.
    """
    done = np.zeros((subsets, repeats), bool)
    for block in held:
        done[block.where] = True
    found = []
    for r in range(repeats):
        for s in range(subsets):
            if not done[s, r]:
                block = _block_at(done, s, r, most)
                done[block.where] = True
                found.append(block)
    return found


def _block_at(done: np.ndarray, s: int, r: int, most: int) -> Block:
    """As many subsets as there are in a row, then as many repeats as have none of them."""
    stop, last = s, r + 1
    while stop < min(len(done), s + most) and not done[stop, r]:
        stop += 1
    while last < done.shape[1] and (stop - s) * (last + 1 - r) <= most and not done[s:stop, last].any():
        last += 1
    return Block(range(s, stop), range(r, last))


def shared(held: Iterable[Block], subsets: int, repeats: int) -> list[tuple[Block, np.ndarray]]:
    """The blocks that the first `subsets` and `repeats` are taken from, each with what is: (subset, repeat) bool over all of both."""
    taken, found = np.zeros((subsets, repeats), bool), []
    for block in held:
        mine = np.zeros_like(taken)
        mine[block.where] = True
        mine &= ~taken
        taken |= mine
        if mine.any():
            found.append((block, mine))
    return found
