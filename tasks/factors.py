"""Fitting factors: partial sums per shard of training examples, a fixed reduction tree, one eigendecomposition per layer.

    partial/covariance/<first layer>/<level>/<node>.safetensors    level 0: one per part; each level above sums FANOUT nodes
    partial/eigenvalues/<first layer>/<level>/<node>.safetensors   likewise, in the eigenbasis
    factors.zarr/layers/<layer>/...                                bases and spectra
    complete.json                                                  last

A part is a shard of the training examples at one checkpoint. Most fits are of one checkpoint; those of a segment of the training pool
several: every mean is then over examples and checkpoints. A pass over a part sums all layers, or where the job says so a few: what is
held at a time is then theirs alone, for a pass over the data for each few. The numbers are the same bit for bit.

Every object is written whole; a task whose object is there already does nothing, so a fit that was interrupted goes on where it was.
Nor does a task of a fit that is complete: two runs may compute the same fit at once, and the first to complete it sweeps partial/.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import zarr
from torch import Tensor

from infra import storage
from tasks import checksums, layout
from tasks.subject import Opened, Subject, open_subject
from tasks.tensors import read_tensors, write_tensors
from tda import location, schema
from tda.blocks import Block
from tda.curvature.covariances import Covariance, covariance_sums
from tda.curvature.eigen import Factor, decompose, eigenvalue_sums
from tda.curvature.fisher import Fisher
from tda.data import batches
from tda.device import placed
from tda.directions import check_finite
from tda.products import Products
from tda.stored_factors import load_factors

#: Nodes that one reduction task sums; sums are in float64 and in the order of the parts.
FANOUT = 8

Sums = Literal["covariance", "eigenvalues"]


@dataclass(frozen=True)
class FactorJob:
    """One fit: where it is stored, of what, with which labels, and how it is cut up.

    subjects: the same model and data at one checkpoint, or at several that are pooled. batch_tokens: in place of batch_size, where set.
    layer_block: layers that are summed in one pass; None: all.
    """

    url: str
    subjects: tuple[Subject, ...]
    fisher: Fisher
    seed: int
    examples: int
    shard_size: int
    batch_size: int
    products: Products
    batch_tokens: int | None = None
    layer_block: int | None = None

    @property
    def subject(self) -> Subject:
        """The first of the subjects: what is the same in all of them can be read from it."""
        return self.subjects[0]

    @property
    def shards(self) -> int:
        """Number of shards that the examples are cut into."""
        return -(-self.examples // self.shard_size)

    @property
    def parts(self) -> int:
        """Number of parts: shards x checkpoints."""
        return self.shards * len(self.subjects)

    @property
    def count(self) -> int:
        """What sums are divided by: examples x checkpoints."""
        return self.examples * len(self.subjects)

    def part(self, index: int) -> tuple[Subject, range]:
        """The subject and the example ids of a part; one checkpoint's parts follow each other."""
        subject, shard = divmod(index, self.shards)
        return self.subjects[subject], range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.examples))


@dataclass(frozen=True)
class Node:
    """One node of a reduction tree. first: of the layers that it sums."""

    job: FactorJob
    sums: Sums
    level: int
    index: int
    first: int = 0

    @property
    def url(self) -> str:
        """Where its sums are."""
        return location.join(self.job.url, "partial", self.sums, f"{self.first:06d}", str(self.level), f"{self.index:06d}.safetensors")

    @property
    def layers(self) -> slice:
        """The places of its layers among the blocks."""
        return slice(self.first, None if self.job.layer_block is None else self.first + self.job.layer_block)


def firsts(job: FactorJob) -> range:
    """The first layer of each pass."""
    count = len(open_subject(job.subject).attributed.blocks)
    return range(0, count, job.layer_block or count)


def leaves(job: FactorJob, sums: Sums) -> list[Node]:
    """The nodes that sum one part each, for every pass."""
    return [Node(job, sums, 0, part, first) for first in firsts(job) for part in range(job.parts)]


def levels(job: FactorJob, sums: Sums) -> list[list[Node]]:
    """The reduction trees' nodes above the parts, level by level; empty for a single part."""
    found, count, level = [], job.parts, 0
    while count > 1:
        count, level = -(-count // FANOUT), level + 1
        found.append([Node(job, sums, level, index, first) for first in firsts(job) for index in range(count)])
    return found


def root(job: FactorJob, sums: Sums, layer: int) -> Node:
    """The node that holds a layer's sums over all examples."""
    first = max(first for first in firsts(job) if first <= layer)
    above = levels(job, sums)
    return next(node for node in (above[-1] if above else leaves(job, sums)) if node.first == first)


def _done(job: FactorJob, url: str) -> bool:
    """Whether a task's object is there, or the whole fit."""
    return location.exists(url) or layout.is_complete(job.url)


def sum_shard(node: Node) -> dict[str, Any]:
    """Compute the sums of one part and write them."""
    started = time.perf_counter()
    if not _done(node.job, node.url):
        job = node.job
        subject, ids = job.part(node.index)
        opened = open_subject(subject)
        size = opened.batching("train", job.batch_size, job.batch_tokens)
        options: dict[str, Any] = {"fisher": job.fisher, "seed": job.seed, "batch_size": size, "products": job.products}
        options["layers"] = node.layers
        if node.sums == "covariance":
            covariances = covariance_sums(opened.attributed, opened.train, ids, **options)
            tensors = {
                f"{b}/{side}": getattr(c, side) for b, c in enumerate(covariances, node.first) for side in ("out", "in_", "positions")
            }
        else:
            factors = load_factors(job.url, opened.attributed.blocks, eigenvalues=False, layers=node.layers)
            factors = placed(factors, opened.attributed.device)
            found = eigenvalue_sums(opened.attributed, factors, opened.train, ids, **options)
            tensors = {f"{b}/eigenvalues": t for b, t in enumerate(found, node.first)}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            _explain(opened, job, ids)
        write_tensors(node.url, tensors)
    return {"seconds": time.perf_counter() - started}


def _explain(opened: Opened, job: FactorJob, ids: range) -> NoReturn:
    """Find the example that made a part's sums infinite: InputError where its loss is not finite, else ArithmeticError."""
    attributed = opened.attributed
    with torch.no_grad():
        for part in batches(ids, job.batch_size):
            batch = attributed.load(opened.train, part)
            losses = attributed.problem.likelihood.loss(attributed.tape(batch).precise, batch.targets)
            check_finite(losses, part, "loss of train example")
    raise ArithmeticError(
        f'the squared gradients of examples {ids[0]}..{ids[-1]} overflow {attributed.dtype}; dtype = "float64" holds more'
    )


def reduce_node(node: Node) -> dict[str, Any]:
    """Sum a node's children in order, in float64, and write the sum."""
    started = time.perf_counter()
    if not _done(node.job, node.url):
        below = node.job.parts
        for _ in range(node.level - 1):
            below = -(-below // FANOUT)
        total: dict[str, Tensor] = {}
        for child in range(node.index * FANOUT, min((node.index + 1) * FANOUT, below)):
            for name, tensor in read_tensors(Node(node.job, node.sums, node.level - 1, child, node.first).url).items():
                total[name] = tensor.double() if name not in total else total[name].add_(tensor)
        write_tensors(node.url, total)
    return {"seconds": time.perf_counter() - started}


def create_factors(job: FactorJob) -> None:
    """Create the arrays of a fit; called once, before any task writes to them."""
    opened = open_subject(job.subject)
    url = location.join(job.url, "factors.zarr")
    # The group's own metadata come first: that they are there does not say that all arrays are.
    created = location.join(job.url, "partial", "created.json")
    if _done(job, created):
        return
    group = location.open_group(url, "a")
    group.attrs.update({"schema_version": schema.SCHEMA_VERSION, "fisher": job.fisher, "examples": job.examples})
    dtype = str(opened.attributed.dtype).removeprefix("torch.")
    for b, block in enumerate(opened.attributed.blocks):
        for name, shape in _shapes(block).items():
            path, attrs = f"layers/{b}/{name}", {"layer": block.name, "structure": block.structure}
            layout.ensure_array(group, path, shape, [1, *(min(n, 4096) for n in shape[1:])], attrs, dtype)
    location.seal(url)
    storage.write_json(created, {})


def _shapes(block: Block) -> dict[str, tuple[int, ...]]:
    g, o, i = block.groups, block.out, block.in_
    shapes: dict[str, tuple[int, ...]] = {"eigenvalues": (g, o, i), "kfac_out": (g, o), "kfac_in": (g, i)}
    if block.rotates_out:
        shapes["basis_out"] = (g, o, o)
    if block.rotates_in:
        shapes["basis_in"] = (g, i, i)
    return shapes


def decompose_layer(task: tuple[FactorJob, int]) -> dict[str, Any]:
    """Eigendecompose one layer's covariances and write its bases and K-FAC spectra."""
    job, layer = task
    started = time.perf_counter()
    receipt = location.join(job.url, "partial", "bases", f"{layer:06d}.json")
    if not _done(job, receipt):
        attributed = open_subject(job.subject).attributed
        sums = read_tensors(root(job, "covariance", layer).url, lambda name: name.startswith(f"{layer}/"))
        sums = placed(sums, attributed.device)
        covariance = Covariance(*(sums[f"{layer}/{side}"] for side in ("out", "in_", "positions")))
        factor = decompose(attributed.blocks[layer], covariance, job.count, attributed.dtype)
        group = _layer(location.open_group(location.join(job.url, "factors.zarr"), "r+"), layer)
        for name in ("basis_out", "basis_in", "kfac_out", "kfac_in"):
            value = getattr(factor, name)
            if value is not None:
                _write(group, name, value)
        storage.write_json(receipt, {"layer": attributed.blocks[layer].name})
    return {"seconds": time.perf_counter() - started}


def finish_factors(job: FactorJob) -> dict[str, Any]:
    """Write Lambda, verify every array, write the completion marker, and drop the partial sums."""
    started = time.perf_counter()
    if not layout.is_complete(job.url):
        blocks = open_subject(job.subject).attributed.blocks
        sums_of: dict[str, list[Any]] = {}
        group = location.open_group(location.join(job.url, "factors.zarr"), "r+", sums_of)
        for b, block in enumerate(blocks):
            total = read_tensors(root(job, "eigenvalues", b).url, lambda name, b=b: name.startswith(f"{b}/"))[f"{b}/eigenvalues"]  # type: ignore[misc]
            _write(_layer(group, b), "eigenvalues", total.double() / job.count)
            for name in _shapes(block):
                if not np.isfinite(np.asarray(_layer(group, b)[name][...])).all():
                    raise ArithmeticError(f"factors of layer {block.name}: {name} is not finite: the gradients overflow")
        marker = {"fisher": job.fisher, "examples": job.examples, "layers": [block.name for block in blocks]}
        if checksums.complete(job.url, marker, {f"factors.zarr/{name}": entry for name, entry in sums_of.items()}):
            storage.delete_tree(location.join(job.url, "partial"))
    return {"seconds": time.perf_counter() - started}


def _layer(group: zarr.Group, layer: int) -> Any:
    return group[f"layers/{layer}"]


def _write(group: Any, name: str, value: Tensor) -> None:
    array = group[name]
    array[...] = value.to(getattr(torch, str(array.dtype))).cpu().numpy()


@lru_cache(maxsize=4)
def fitted(url: str, subject: Subject) -> tuple[Factor, ...]:
    """The factors of a completed fit, kept for the next shard of the same worker."""
    attributed = open_subject(subject).attributed
    return placed(tuple(load_factors(url, attributed.blocks)), attributed.device)
