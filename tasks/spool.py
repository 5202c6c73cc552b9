"""Stored directions as they are scored: in memory where they are few, else in a temporary file on the worker (`tda.spooled`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tasks.directions import DirectionJob, read_directions, read_parts
from tda.attributed import Attributed
from tda.blocks import Block
from tda.device import placed
from tda.directions import HELD_BYTES, SPOOL_BYTES, Direction, held
from tda.spooled import Met, on_device, spooled


@dataclass(frozen=True)
class Asked:
    """What one method scores some queries with: passes, by block; measurement and gradient norms (query,); what else was kept of them."""

    passes: Sequence[Sequence[Met]]
    measurement: Tensor
    norms: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)


def asked(job: DirectionJob, ids: range, attributed: Attributed, times: int) -> Asked:
    """The directions of queries `ids`, where all methods of a run have so many times the parameters for each; 0: of one without any."""
    blocks = attributed.blocks
    if len(ids) * attributed.dtype.itemsize * times * sum(block.size for block in blocks) <= HELD_BYTES:
        read = placed(read_directions(job, ids), attributed.device)
        return Asked([held(blocks, directions) for directions in read.passes], read.measurement, read.norms, read.kept)
    return _spooled(job, ids, blocks, attributed.device, SPOOL_BYTES * job.parsed().passes // times)


def _spooled(job: DirectionJob, ids: range, blocks: Sequence[Block], device: torch.device, limit: int) -> Asked:
    """One file for all passes: each stored object is read once, and let go before the next one is.

    limit: bytes of the file up to which terms become matrices, the method's share of what all of a run may take.
    """
    measurements, norms = list[Tensor](), list[Tensor]()

    def parts() -> Iterator[list[Direction]]:
        for part in read_parts(job, ids):
            measurements.append(part.measurement)
            norms.append(part.norms)
            yield [direction for directions in part.passes for direction in directions]

    found = [on_device(each, device) for each in spooled(blocks, parts(), len(ids), rank=job.parsed().rank, limit=limit)]
    passes = [found[k : k + len(blocks)] for k in range(0, len(found), len(blocks))]
    return Asked(passes, torch.cat(measurements), torch.cat(norms).to(device))
