"""What a run will take, stage by stage, from shapes alone: shards, a worker's memory, operations, bytes stored and moved.

Operations are those of matrix products, two for each multiplication and addition: what attention, norms and activations do besides is
left out. Bytes are before compression. A worker's memory is the sum of what its largest task of a stage holds at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.dense import ROWS
from tasks.factors import FANOUT
from tasks.projection import PARTS
from tda import sizes
from tda.blocks import Block
from tda.costs import rows_first, rows_smaller
from tda.curvature import spectrum
from tda.curvature.covariances import TILE
from tda.directions import HELD_BYTES
from tda.methods import Method
from tda.methods.multistage import Multistage
from tda.methods.work import Fit
from tda.self_products import GRADIENT_BYTES
from tda.shapes import Shapes
from tda.spooled import PART_BYTES, PART_QUERIES

#: A worker before it opens anything: Python, torch and what else is imported.
PROCESS_BYTES = 512 << 20
#: Seconds that a shard takes besides its products: looking whether it is done, opening arrays, writing its receipt.
SHARD_SECONDS = 0.05
#: A symmetric eigendecomposition of n x n takes about so many n^3 operations, and holds so many matrices of that size.
EIGEN_FLOPS, EIGEN_MATRICES = 9, 5


@dataclass(frozen=True)
class Stage:
    """One stage: its shards, and what all of them take together; memory of one worker, by what holds it.

    flops: None where they are the problem's own. read, written: bytes between store and workers; kept: those that stay.
    """

    name: str
    shards: int
    flops: float | None
    memory: dict[str, int]
    read: int = 0
    written: int = 0
    kept: int = 0

    @property
    def peak(self) -> int:
        """Bytes that a worker holds."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Work:
    """What is to be done: shapes, sizes and methods.

    query_block: queries scored in one pass. block(method, more): those whose directions are made at a time, so many vectors more than the
    method's being held for each. layer_block: layers summed in one pass.
    """

    shapes: Shapes
    methods: Sequence[Method]
    examples: int
    queries: int
    batch: int
    scoring: int
    shard: int
    query_block: int
    block: Callable[[Method, int], int]
    self_influence: bool
    workers: int
    members: int = 1
    trained: bool = False
    epochs: int | None = None
    layer_block: int | None = None

    @property
    def layers(self) -> list[Sequence[Block]]:
        """The layers of each pass of a fit."""
        blocks, count = self.shapes.blocks, self.layer_block or len(self.shapes.blocks)
        return [blocks[first : first + count] for first in range(0, len(blocks), count)]

    @property
    def shards(self) -> int:
        """Shards of the training examples."""
        return -(-self.examples // self.shard)

    @property
    def opened(self) -> dict[str, int]:
        """What every task holds."""
        return {"process": PROCESS_BYTES, "model": self.shapes.total * self.shapes.itemsize}

    def batch_bytes(self, batch: int) -> int:
        """What the tensors of a batch take."""
        return batch * sizes.example_bytes(self.shapes.blocks, self.shapes.outputs, itemsize=self.shapes.itemsize)


def project(work: Work) -> list[Stage]:
    """The stages of a run in their order, as it names them; members of an ensemble are in one line."""
    found = list(_train(work))
    fits = dict.fromkeys(fit for method in work.methods for fit in method.fits)
    for fit in fits:
        found += _FITTED[fit.kind](work, fit)
    found += [_directions(work, method) for method in work.methods]
    found += [_scores(work), _verify(work)]
    return [_times(stage, work.members) for stage in found]


def _times(stage: Stage, members: int) -> Stage:
    flops = None if stage.flops is None else stage.flops * members
    counts = [members * count for count in (stage.read, stage.written, stage.kept)]
    return Stage(stage.name, stage.shards * members, flops, stage.memory, *counts)


def _checkpoints(method: Method) -> int:
    """At how many checkpoints training gradients are met by the directions of each pass."""
    return int(getattr(method, "per_segment", 1)) if method.meets == "checkpoints" else 1


def forward(blocks: Sequence[Block]) -> float:
    """Operations of one example's forward pass through the layers; a backward pass to their outputs takes as many."""
    return float(sum(2 * b.positions * b.size for b in blocks if b.form not in ("embedding", "vector")))


def backward(work: Work, fisher: str) -> int:
    """Backward passes per example under a Fisher."""
    return max(1, work.shapes.classes) if fisher == "exact" else 1


def _train(work: Work) -> Iterator[Stage]:
    if not work.trained:
        return
    flops = None if work.epochs is None else work.epochs * work.examples * 3 * forward(work.shapes.blocks)
    weights = work.shapes.total * work.shapes.itemsize
    yield Stage("train", 1, flops, work.opened | {"gradients": 2 * weights}, 0, weights, weights)


def _sides(block: Block) -> list[int]:
    """Widths of the sides that have a basis."""
    return [n for n, rotated in ((block.out, block.rotates_out), (block.in_, block.rotates_in)) if rotated]


def bases(blocks: Sequence[Block]) -> int:
    """Numbers in the bases, or in the covariances, of all blocks."""
    return sum(b.groups * sum(n * n for n in _sides(b)) for b in blocks)


def _spectra(blocks: Sequence[Block]) -> int:
    return sum(b.size + b.groups * (b.out + b.in_) for b in blocks)


def _products(width: int) -> float:
    """Operations for each row of a second moment: the upper triangle alone where it is cut into tiles."""
    return float(width * width if width > 2 * TILE else 2 * width * width)


def _rotation(block: Block, passes: int) -> float:
    """Operations that take one example's gradient into the eigenbasis."""
    t, o, i = block.positions, block.out if block.rotates_out else 0, block.in_ if block.rotates_in else 0
    making = 2.0 * t * block.size * passes
    if t == 1 or rows_first(t, block.out, block.in_):
        return making + 2.0 * t * block.groups * (o * o * passes + i * i)
    return making + 2.0 * block.size * (o + i) * passes


def _kronecker(work: Work, fit: Fit) -> list[Stage]:
    blocks, itemsize, checkpoints = work.shapes.blocks, work.shapes.itemsize, 1
    passes, parts, label = backward(work, fit.of), work.shards * checkpoints, f"({fit.key})"
    covariances, spectra = bases(blocks) * itemsize, sum(b.size for b in blocks) * itemsize
    passed, few = len(work.layers), max(bases(some) for some in work.layers) * itemsize
    seen = max(sum(b.size for b in some) for some in work.layers) * itemsize
    weights, model = work.shapes.total * itemsize, work.opened
    batch, widest = work.batch_bytes(work.batch), max((n for b in blocks for n in _sides(b)), default=0)
    taken = forward(blocks) * (1 + passes) * passed
    moments = sum(b.positions * b.groups * (_products(b.out) * b.rotates_out * passes + _products(b.in_) * b.rotates_in) for b in blocks)
    rotations = sum(_rotation(b, passes) for b in blocks)
    n, workers = work.examples * checkpoints, min(work.workers, parts)
    eigh = sum(EIGEN_FLOPS * b.groups * float(side) ** 3 for b in blocks for side in _sides(b))
    factors = (bases(blocks) + _spectra(blocks)) * itemsize

    def summed(of: str, size: int, held: int) -> list[Stage]:
        nodes = list(_levels(parts))
        read = sum(nodes[k - 1] if k else parts for k in range(len(nodes))) * 2 * size
        memory = model | {"sums in float64": 2 * 8 * held // itemsize, "a part's sums": held}
        return [Stage(f"sum {of} {label}", passed * sum(nodes), 0.0, memory, read, sum(nodes) * 2 * size)] if nodes else []

    return [
        Stage(f"covariances {label}", passed * parts, n * (taken + moments), model | {"batch": batch, "covariances": 2 * few},
              workers * weights, parts * covariances),
        *summed("covariances", covariances, few),
        Stage(f"eigendecompositions {label}", len(blocks), eigh, model | {"the widest layer": EIGEN_MATRICES * 8 * widest**2},
              covariances * 2, bases(blocks) * itemsize, bases(blocks) * itemsize),
        Stage(f"eigenvalues {label}", passed * parts, n * (taken + rotations),
              model | {"batch": batch, "bases": few, "eigenvalues": 2 * seen}, parts * covariances, parts * spectra),
        *summed("eigenvalues", spectra, seen),
        Stage(f"finish factors {label}", 1, 0.0, model | {"the largest layer": 4 * itemsize * max(b.size for b in blocks)},
              2 * spectra + factors, spectra, factors - bases(blocks) * itemsize),
    ]  # fmt: skip


def _levels(parts: int) -> Iterator[int]:
    while parts > 1:
        parts = -(-parts // FANOUT)
        yield parts


def _dense(work: Work, fit: Fit) -> list[Stage]:
    """Of float64 matrices, so that a model in float32 counts twice."""
    blocks = work.shapes.blocks
    widths = [sum(blocks[b].size for b in some) for some in spectrum.diagonals(blocks, fit.of)]  # type: ignore[arg-type]
    entries, flops = sum(n * n for n in widths), 4 * forward(blocks) * work.examples * sum(widths)
    model = work.opened | {"model in float64": 8 * work.shapes.total}
    rows = 3 * 8 * ROWS * sum(widths)
    return [
        Stage(f"matrix ({fit.key})", sum(-(-n // ROWS) for n in widths), flops, model | {"rows": rows}, 0, 8 * entries),
        Stage(f"eigendecomposition ({fit.key})", len(widths), sum(EIGEN_FLOPS * float(n) ** 3 for n in widths),
              model | {"matrix": EIGEN_MATRICES * 8 * max(widths) ** 2}, 8 * entries, 8 * entries, 8 * (entries + sum(widths))),
        Stage(f"finish spectra ({fit.key})", 1, 0.0, model | {"matrix": 8 * max(widths) ** 2}, 8 * entries),
    ]  # fmt: skip


def _projection(work: Work, fit: Fit) -> list[Stage]:
    blocks, width = work.shapes.blocks, int(fit.of.split(maxsplit=1)[0])
    size = work.shard * -(-work.shards // PARTS)
    parts = -(-work.examples // size)
    gram = 8 * width * width
    each = 2 * forward(blocks) + sum(2.0 * b.positions * b.size for b in blocks) + 2.0 * width * (work.shapes.parameters + width)
    memory = work.opened | {"batch": work.batch_bytes(work.batch), "gradients": GRADIENT_BYTES, "sums": 2 * gram}
    return [
        Stage("projected gradients", parts, work.examples * each, memory, 0, parts * gram),
        Stage(
            "finish projection",
            1,
            EIGEN_FLOPS * float(width) ** 3,
            work.opened | {"matrix": EIGEN_MATRICES * gram},
            parts * gram,
            gram,
            gram,
        ),
    ]


def _retraining(work: Work, fit: Fit) -> list[Stage]:
    _, subsets, seeds = fit.of.split()
    flops = None
    if work.epochs is not None:
        flops = int(subsets) * int(seeds) * work.epochs * float(fit.of.split()[0]) * work.examples * 3 * forward(work.shapes.blocks)
    kept = 8 * int(subsets) * int(seeds) * work.queries + int(subsets) * work.examples
    return [Stage("retrain (dtda)", int(subsets) * int(seeds), flops, work.opened | {"gradients": work.opened["model"]}, 0, kept, kept)]


def _chains(work: Work, fit: Fit) -> list[Stage]:
    told: dict[str, Any] = json.loads(fit.of)
    chains, draws, together = told["chains"], told["draws"], min(told["together"], told["chains"])
    size = work.examples if told["batch_size"] == "full" else told["batch_size"]
    steps = told["burn_in"] + draws * told["thinning"]
    flops = chains * (steps * size * 3 * forward(work.shapes.blocks) + draws * (work.examples + work.queries) * forward(work.shapes.blocks))
    kept = 4 * chains * draws * (work.examples + 2 * work.queries)
    memory = work.opened | {"chains": together * 4 * work.opened["model"], "batch": together * work.batch_bytes(work.batch)}
    return [Stage("chains", -(-chains // together), flops, memory, 0, kept, kept)]


_FITTED: dict[str, Callable[[Work, Fit], list[Stage]]] = {
    "kronecker": _kronecker,
    "dense": _dense,
    "projection": _projection,
    "retraining": _retraining,
    "chains": _chains,
}


def factor_bytes(work: Work, methods: Sequence[Method]) -> int:
    """What the Kronecker factors of some methods take once they are loaded."""
    kinds = {fit for method in methods for fit in method.fits if fit.kind == "kronecker"}
    return len(kinds) * (bases(work.shapes.blocks) + _spectra(work.shapes.blocks)) * work.shapes.itemsize


def _directions(work: Work, method: Method) -> Stage:
    blocks, itemsize = work.shapes.blocks, work.shapes.itemsize
    block = min(work.block(method, 1), work.queries)
    count = -(-work.queries // block)
    each = work.shapes.parameters * itemsize
    solving = sum(4.0 * b.size * ((b.out if b.rotates_out else 0) + (b.in_ if b.rotates_in else 0)) for b in blocks) if method.fits else 0.0
    asked = method.own_stage if isinstance(method, Multistage) else method  # its options are there for inverses that solve, too
    if hasattr(asked, "max_steps"):
        size = getattr(asked, "batch_size", "full")
        steps = min(asked.max_steps or work.examples, work.examples)
        solving += steps * (work.examples if size == "full" else int(size or work.batch)) * 4 * forward(blocks)
    flops = work.queries * (2 * forward(blocks) + sum(2.0 * b.positions * b.size for b in blocks) + solving)
    memory = work.opened | {"batch": work.batch_bytes(work.batch), "factors": factor_bytes(work, [method])}
    memory |= {"directions": block * each * (method.vectors + method.passes)}
    written = work.queries * itemsize * (2 + method.passes * _stored(work.shapes.blocks, method))
    return Stage(f"directions ({method.title})", count, flops, memory, min(work.workers, count) * memory["factors"], written, written)


def _stored(blocks: Sequence[Block], method: Method) -> int:
    """Numbers of one stored direction: plain gradients as their rows, where these are fewer.

    Of sequences, whose lengths differ, as many as a matrix has.
    """
    if method.name not in ("graddot", "gradcos"):
        return sizes.direction_numbers(blocks, [method.rank])
    rows = {id(b): b.positions * b.groups * (b.out + b.in_) for b in blocks if b.positions == 1 and rows_smaller(1, b.out, b.in_)}
    return sum(rows.get(id(b), b.size) for b in blocks)


def _scores(work: Work) -> Stage:
    blocks, itemsize = work.shapes.blocks, work.shapes.itemsize
    blocks_of_queries = -(-work.queries // work.query_block)
    passes = sum(method.passes * _checkpoints(method) for method in work.methods)
    taken = 2 * forward(blocks) + sum(2.0 * b.positions * b.size for b in blocks)
    per_example = blocks_of_queries * taken * max((_checkpoints(method) for method in work.methods), default=1)
    per_example += 2.0 * work.queries * passes * work.shapes.parameters
    owners = [method for method in work.methods if work.self_influence and method.gives_own]
    per_example += sum(_rotation(b, 1) for method in owners if method.fits for b in blocks)
    shards, methods = work.shards * blocks_of_queries, len(work.methods)
    query_block = min(work.query_block, work.queries)
    held_bytes = itemsize * sum(method.passes * sizes.direction_numbers(blocks, [method.rank]) for method in work.methods)
    memory = work.opened | {"batch": work.batch_bytes(work.scoring), "directions": _met(work, query_block)}
    memory |= {
        "factors": factor_bytes(work, owners),
        "gradients": 2 * GRADIENT_BYTES,
        "scores": 2 * methods * query_block * work.shard * itemsize,
    }
    kept = 4 * (methods * work.queries * work.examples + work.examples * (1 + methods * work.self_influence) + work.queries)
    workers = min(work.workers, shards)
    read = workers * (work.opened["model"] + memory["factors"] + blocks_of_queries * query_block * held_bytes)
    return Stage("scores", shards, work.examples * per_example, memory, read, kept, kept)


def _met(work: Work, queries: int) -> int:
    """What directions take while they are scored: all of them, or a part of those in a file, or what is read to be put there."""
    blocks, itemsize = work.shapes.blocks, work.shapes.itemsize
    size = queries * itemsize * sum(method.passes * _checkpoints(method) for method in work.methods) * work.shapes.parameters
    if size <= HELD_BYTES:
        return queries * itemsize * sum(method.passes * work.shapes.parameters for method in work.methods)
    widest = itemsize * max(block.size for block in blocks)
    stored = [
        min(work.block(method, 1), queries) * itemsize * method.passes * sizes.direction_numbers(blocks, [method.rank])
        for method in work.methods
    ]
    return max(min(queries * widest, max(PART_BYTES, PART_QUERIES * widest)), *stored)


def _verify(work: Work) -> Stage:
    scores = 4 * len(work.methods) * work.queries
    memory = work.opened | {"scores": 2 * scores * work.shard}
    return Stage("verify", work.shards, 0.0, memory, scores * work.examples)
