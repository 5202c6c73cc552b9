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
            return "set " + " and ".join(f"{key} = {value}" for key, value in changes.items())
    stage = _heaviest(_cut(paper, {"query_block": 1, "batch_size": 1}), workers)
    held = max(stage.memory, key=lambda part: stage.memory[part])
    return (
        f"even with query_block = 1 and batch_size = 1 it is {readable(stage.peak)} ({held}); "
        f'set cluster.memory_limit = "{-(-stage.peak >> 30)}GiB" where workers have as much, or attribute fewer layers with `modules`'
    )


def _cut(paper: Paper, changes: dict[str, int]) -> Paper:
    return replace(paper, request=replace(paper.request, **changes))  # type: ignore[arg-type]


def _changes(work: Work) -> Iterator[dict[str, int]]:
    """The smallest change first: fewer queries at a time, then fewer examples, then fewer layers, then queries and examples."""
    queries = [2**k for k in reversed(range((min(work.query_block, work.queries) - 1).bit_length()))]
    batches = [2**k for k in reversed(range((work.batch - 1).bit_length()))]
    yield from ({"query_block": block} for block in queries)
    yield from ({"batch_size": batch} for batch in batches)
    layers = [2**k for k in reversed(range((len(work.layers[0]) - 1).bit_length()))]
    yield from ({"layer_block": layer} for layer in layers)
    yield from ({"query_block": block, "batch_size": min(batches, default=1)} for block in queries)


def readable(count: float) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    units = ("B", "kiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min(len(units) - 1, int(math.log2(max(count, 1)) // 10))
    number = count / 1024**power
    return f"{number:.3g} {units[power]}" if number < 1000 else f"{number:.0f} {units[power]}"
