"""Directions in a temporary file: so many as memory should not hold are mapped part by part as batches meet them, and let go again.

A batch reads every direction once, whether from memory or from the file: where the operating system has the file in its cache, as it does
while there is memory that nobody needs, a part that is mapped costs no copy and no time worth counting.

The file has no name (`tempfile.TemporaryFile`, in the folder that $TMPDIR names), so that a process that is killed leaves nothing.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda.blocks import Block
from tda.costs import by_terms
from tda.device import CPU, placed
from tda.directions import ENDLESS, SPOOL_BYTES, Dense, Direction, Factored, count, dense, extend, padded, scaled, take, tensors
from tda.errors import InputError
from tda.lowrank import keeps_full

#: Matrices of so many bytes are mapped at a time, or made of mapped terms, but those of so many queries at least: a product of fewer rows
#: is slower.
PART_BYTES, PART_QUERIES = 64 << 20, 8


class Spool:
    """A temporary file of tensors. Raises InputError where its folder has no room."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="tda-")  # noqa: SIM115  (open as long as directions are met)
        weakref.finalize(self, self._file.close)
        self._size = 0
        self._map: mmap.mmap | None = None

    def reserve(self, shape: Sequence[int], dtype: torch.dtype) -> Stored:
        """Room for a tensor of this shape."""
        place = Stored(self, self._size, tuple(shape), dtype)
        self._size += -(-place.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        return place

    def write(self, offset: int, tensor: Tensor) -> None:
        """The numbers of a tensor, from this byte on."""
        left = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[done:], offset + done
        except OSError as error:
            raise InputError(
                f"directions do not fit into a temporary file in {tempfile.gettempdir()}, {self._size >> 20} MiB ({error.strerror}); "
                "let $TMPDIR name a folder with room for them, or lower query_block"
            ) from error

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """Numbers of the file, (count,), mapped."""
        if self._map is None:
            os.truncate(self._file.fileno(), self._size)  # up to whole pages
            self._map = mmap.mmap(self._file.fileno(), self._size)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

    def let_go(self, offset: int, size: int) -> None:
        """Bytes of the file need not stay in memory."""
        if self._map is not None:
            first = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, offset + size - first)


@dataclass(frozen=True)
class Stored:
    """A tensor in a spool; its first axis is the queries."""

    spool: Spool
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row(self) -> int:
        """Numbers of one query."""
        return int(torch.Size(self.shape[1:]).numel())

    @property
    def bytes(self) -> int:
        """Of all queries."""
        return self.shape[0] * self.row * self.dtype.itemsize

    def put(self, start: int, part: Tensor) -> None:
        """Write the rows of some queries, from place `start` on."""
        self.spool.write(self.offset + start * self.row * self.dtype.itemsize, part.to(self.dtype))

    def rows(self, start: int, stop: int) -> Tensor:
        """Those of queries start..stop, mapped."""
        flat = self.spool.view(self.offset + start * self.row * self.dtype.itemsize, (stop - start) * self.row, self.dtype)
        return flat.view(stop - start, *self.shape[1:])

    def let_go(self, start: int, stop: int) -> None:
        """Those of queries start..stop need not stay in memory."""
        each = self.row * self.dtype.itemsize
        self.spool.let_go(self.offset + start * each, (stop - start) * each)


@dataclass(frozen=True)
class Spooled:
    """Directions of one block in a file: matrices, or left and right of terms as `Factored` has them. scale: (query,), or none.

    device: where they are met, part by part.
    """

    sides: tuple[Stored, ...]
    matrix_bytes: int
    scale: Tensor | None = None
    device: torch.device = CPU

    @property
    def queries(self) -> int:
        """How many there are."""
        return self.sides[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of their numbers."""
        return self.sides[0].dtype

    @property
    def rank(self) -> int | None:
        """Number of terms; None: matrices."""
        return self.sides[0].shape[1] if len(self.sides) > 1 else None

    def parts(self) -> Iterator[Direction]:
        """Those of some queries at a time, in order; each is let go when the next one is asked for."""
        step = max(PART_QUERIES, PART_BYTES // max(self.matrix_bytes, 1))
        for start in range(0, self.queries, step):
            stop = min(start + step, self.queries)
            found = [side.rows(start, stop) for side in self.sides]
            part = placed(Dense(*found) if self.rank is None else Factored(*found), self.device)
            yield part if self.scale is None else scaled(part, self.scale[start:stop])
            for side in self.sides:
                side.let_go(start, stop)

    def scaled(self, by: Tensor) -> Spooled:
        """Times a number per query (query,)."""
        return replace(self, scale=by if self.scale is None else self.scale * by)


Met = Dense | Factored | Spooled


def on_device(direction: Met, device: torch.device) -> Met:
    """The same, to be met on a device; what is in a file stays there until it is met."""
    return replace(direction, device=device) if isinstance(direction, Spooled) else placed(direction, device)


def spooled(
    blocks: Sequence[Block], parts: Iterable[Sequence[Direction]], queries: int, *, rank: int | None = None, limit: int = SPOOL_BYTES
) -> list[Met]:
    """Directions of so many queries as they are scored, in a temporary file.

    parts: of the queries in their order, block by block, once for each pass. Terms become matrices, as `tda.directions.held` makes them in
    memory; with a `rank`, which no direction then has more terms than, only where all matrices take no more than `limit` bytes. Terms that
    rows meet one by one are few numbers, and stay in memory.
    """
    spool, start = Spool(), 0
    made: list[Met] = []
    for part in parts:
        each = [(blocks[k % len(blocks)], direction) for k, direction in enumerate(part)]
        size = sum(block.size * tensors(direction)[0].element_size() for block, direction in each)
        terms = rank if queries * size > limit else None
        known: list[Met] | list[None] = made or [None] * len(part)
        made = [_added(spool, block, k, d, start, queries, terms) for k, (block, d) in zip(known, each, strict=True)]
        start += count(part[0])
    assert start == queries, f"{start} directions of {queries}"
    return made


def _added(spool: Spool, block: Block, known: Met | None, part: Direction, start: int, queries: int, rank: int | None) -> Met:
    """What is known of a block's directions, and `part` from place `start` on."""
    if isinstance(known, Spooled):
        return _put(known, part, start)
    # Terms stay in memory while there are few in each part: a longer query's may be so many that all go to the file.
    room = _room(spool, block, part, queries, rank)
    if room is None:
        return extend(known, part, start, queries)
    return _put(room if known is None else _put(room, take(known, slice(start)), 0), part, start)


def _room(spool: Spool, block: Block, part: Direction, queries: int, rank: int | None) -> Spooled | None:
    """Room for a block's directions, `part` among them: in `rank` terms where that is given; None: these may stay in memory."""
    first = tensors(part)[0]
    size = block.size * first.element_size()
    if isinstance(part, Factored) and (block.form == "embedding" or _by_terms(part, block, queries)):
        return None
    if rank is None or isinstance(part, Dense) or keeps_full(block, rank):
        return Spooled((spool.reserve((queries, block.groups, block.out, block.in_), first.dtype),), size)
    return Spooled(tuple(spool.reserve((queries, rank, block.groups, n), first.dtype) for n in (block.out, block.in_)), size)


def _by_terms(part: Factored, block: Block, queries: int) -> bool:
    return by_terms(part.rank, block.positions, queries, ENDLESS, block.out, block.in_)


def _put(room: Spooled, part: Direction, start: int) -> Spooled:
    if room.rank is None:
        room.sides[0].put(start, dense(part))
    else:
        assert isinstance(part, Factored), "terms of some queries, and matrices of others"
        for side, tensor in zip(room.sides, tensors(padded(part, room.rank)), strict=True):
            side.put(start, tensor)
    return room
