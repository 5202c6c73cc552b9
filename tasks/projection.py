"""Fitting the curvature of projected gradients: sums over parts of the training examples, then one eigendecomposition.

    partial/<part>.safetensors    "<n>": the sum of phi phi^T of each part of the projection
    spectra.safetensors           "<n>/values", "<n>/vectors"
    complete.json                 last

Every object is written whole; a task whose object is there already, or whose fit is complete, does nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from infra import storage
from tasks import checksums, layout
from tasks.subject import Subject, open_subject
from tasks.tensors import read_tensors, write_tensors
from tda import location
from tda.curvature.spectrum import Spectrum, decompose
from tda.methods.trak import gram_sums
from tda.projection import Projection

#: Parts that the examples are cut into at most: their sums are read one after the other by a single task.
PARTS = 32


@dataclass(frozen=True)
class ProjectionJob:
    """One fit: where it is stored, of which subject and projection, and how it is cut up."""

    url: str
    subject: Subject
    projection: Projection
    examples: int
    shard_size: int
    batch_size: int

    @property
    def part_size(self) -> int:
        """Examples of a part: one shard, or as many as make PARTS of them."""
        shards = -(-self.examples // self.shard_size)
        return self.shard_size * -(-shards // PARTS)

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.examples // self.part_size)

    def ids(self, part: int) -> range:
        """Training ids of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.examples))

    def partial(self, part: int) -> str:
        """URL of a part's sums."""
        return location.join(self.url, "partial", f"{part:06d}.safetensors")


def sum_part(task: tuple[ProjectionJob, int]) -> dict[str, Any]:
    """Compute the sums of one part and write them."""
    started, (job, part) = time.perf_counter(), task
    if not location.exists(job.partial(part)) and not layout.is_complete(job.url):
        opened = open_subject(job.subject)
        sums = gram_sums(opened.attributed, opened.train, job.ids(part), job.projection, batch_size=job.batch_size)
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            ids = job.ids(part)
            raise ArithmeticError(f"gradients of the outputs of training examples {ids[0]}..{ids[-1]} are not finite")
        write_tensors(job.partial(part), {str(n): total for n, total in enumerate(sums)})
    return {"seconds": time.perf_counter() - started}


def finish(job: ProjectionJob) -> dict[str, Any]:
    """Add the parts up in their order, decompose, write the completion marker, drop the sums."""
    started = time.perf_counter()
    if not layout.is_complete(job.url):
        blocks = open_subject(job.subject).attributed.blocks
        total: dict[str, Tensor] = {}
        for part in range(job.parts):
            for name, tensor in read_tensors(job.partial(part)).items():
                total[name] = tensor if name not in total else total[name].add_(tensor)
        tensors = {}
        for n in range(len(job.projection.parts(blocks))):
            tensors[f"{n}/values"], tensors[f"{n}/vectors"] = decompose(total.pop(str(n)) / job.examples)
        write_tensors(location.join(job.url, "spectra.safetensors"), tensors)
        if checksums.complete(job.url, {"examples": job.examples}):
            storage.delete_tree(location.join(job.url, "partial"))
    return {"seconds": time.perf_counter() - started}


@lru_cache(maxsize=4)
def load(url: str) -> tuple[Spectrum, ...]:
    """The spectra of a completed fit, in projected coordinates, kept for the next task of the same worker."""
    tensors = read_tensors(location.join(url, "spectra.safetensors"))
    return tuple(Spectrum((), tensors[f"{n}/values"], tensors[f"{n}/vectors"]) for n in range(len(tensors) // 2))
