"""The plan of a run before anything of it is done: its work from shapes, and whether its workers can hold it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tasks.cutter import sized
from tasks.prepare import Inputs, Request, check_method, telling
from tasks.projected import Stage, Work, project
from tasks.subject import DTYPES, Opened, open_subject
from tda.data import length
from tda.errors import InputError
from tda.methods import Method, parse_all
from tda.problem import load_problem
from tda.shapes import Shapes, shapes_of


@dataclass(frozen=True)
class Paper:
    """What is known of a run before it is begun; opened: the model and the data, where they exist."""

    request: Request
    shapes: Shapes
    methods: tuple[Method, ...]
    examples: int
    queries: int
    epochs: int | None
    opened: Opened | None

    def work(self, workers: int) -> Work:
        """The work of so many workers, cut as a run would cut it."""
        request, shapes = self.request, self.shapes
        inputs = Inputs("", "", "", self.examples, self.queries, None, None)
        cut = sized(request, inputs, shapes, [rank for method in self.methods for rank in [method.rank] * method.passes])
        return Work(
            shapes, self.methods, self.examples, self.queries, cut.batch, cut.scoring, cut.shard, cut.queries, cut.block,
            request.self_influence, workers, request.ensemble, not request.subject.checkpoint and self.opened is not None, self.epochs,
            request.layer_block,
        )  # fmt: skip


def on_paper(request: Request) -> Paper:
    """Open what a request names. Raises InputError where that is not usable; nothing is written, and data are not read."""
    subject = request.subject
    methods = tuple(parse_all([json.loads(text) for text in request.methods]))
    with telling(subject.problem):
        problem = load_problem(subject.problem, json.loads(subject.options))
        if (shapes := getattr(problem, "shapes", None)) is not None:
            found: Shapes = shapes(subject.modules, subject.exclude)
            found = found if subject.dtype == "auto" else replace(found, dtype=DTYPES[subject.dtype])
            for method in methods:
                method.check_size(found.blocks)
            return Paper(request, found, methods, len(problem.train_data()), len(problem.query_data()), None, None)
        opened = open_subject(subject)
        for method in methods:
            check_method(method, opened)
        recipe = problem.recipe()
    counts = (length(opened.train, "train"), length(opened.query, "query"))
    return Paper(request, shapes_of(opened.attributed), methods, *counts, recipe.epochs if recipe else None, opened)


def check_memory(paper: Paper, workers: int, limit: int) -> None:
    """Raise InputError where a stage holds more than `limit` bytes a worker, with the option that makes it fit."""
    heaviest = _heaviest(paper, workers)
    if heaviest.peak <= limit:
        return
    most, size = max(heaviest.memory.items(), key=lambda part: part[1])
    raise InputError(
        f"stage '{heaviest.name}' would hold {readable(heaviest.peak)} a worker, of which {readable(size)} {most}, and a worker has "
        f"{readable(limit)}; {_way_out(paper, workers, limit)}"
    )


def _heaviest(paper: Paper, workers: int) -> Stage:
    return max(project(paper.work(workers)), key=lambda stage: stage.peak)


def _way_out(paper: Paper, workers: int, limit: int) -> str:
    for changes in _changes(paper.work(workers)):
        if _heaviest(_cut(paper, changes), workers).peak <= limit:
            return f"set {_listed(changes)}"
    smallest = {"query_block": 1, "batch_size": 1} | ({"layer_block": 1} if _sums_layers(paper.methods) else {})
    stage = _heaviest(_cut(paper, smallest), workers)
    held = max(stage.memory, key=lambda part: stage.memory[part])
    return (
        f"even with {_listed(smallest)} it is {readable(stage.peak)} ({held}, in stage '{stage.name}'); "
        f'set cluster.memory_limit = "{-(-stage.peak >> 30)}GiB" where workers have as much, or attribute fewer layers with `modules`'
    )


def _listed(changes: dict[str, int]) -> str:
    *some, last = (f"{key} = {value}" for key, value in changes.items())
    return f"{', '.join(some)} and {last}" if some else last


def _cut(paper: Paper, changes: dict[str, int]) -> Paper:
    return replace(paper, request=replace(paper.request, **changes))  # type: ignore[arg-type]


def _sums_layers(methods: tuple[Method, ...]) -> bool:
    """Whether there are factors, whose layers `layer_block` cuts."""
    return any(fit.kind == "kronecker" for method in methods for fit in method.fits)


def _changes(work: Work) -> Iterator[dict[str, int]]:
    """The smallest change first: fewer queries at a time, then fewer examples, then fewer layers, then several of them."""
    queries = [{"query_block": size} for size in _halves(min(work.query_block, work.queries))]
    batches = [{"batch_size": size} for size in _halves(work.batch)]
    layers = [{"layer_block": size} for size in _halves(len(work.layers[0]))] if _sums_layers(tuple(work.methods)) else []
    fewest = batches[-1:] or [{}]
    yield from queries
    yield from batches
    yield from layers
    yield from (query | layer for layer in layers for query in queries)
    yield from (query | fewest[0] for query in queries)
    yield from (query | layer | fewest[0] for layer in layers for query in queries or [{}])


def _halves(size: int) -> list[int]:
    """Powers of two below a size, the largest first."""
    return [2**k for k in reversed(range((size - 1).bit_length()))]


def readable(count: float) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    units = ("B", "kiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min(len(units) - 1, int(math.log2(max(count, 1)) // 10))
    number = count / 1024**power
    return f"{number:.3g} {units[power]}" if number < 1000 else f"{number:.0f} {units[power]}"
