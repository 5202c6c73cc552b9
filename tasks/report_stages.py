"""What the page shows of earlier stages of training: their facts, and for each query their most helpful and harmful examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.report_content import Describes, described
from tda.rows import Row, rows

if TYPE_CHECKING:
    from tda.results import Run

#: Ranks a row of scores: given the function that describes an example by its id, the row, and "helpful" or "harmful".
Rank = Callable[[Callable[[int], dict[str, Any]], Row, Any], list[dict[str, Any]]]


class Stages:
    """The earlier stages of a run: none, for most. problems: by stage, what describes its examples."""

    def __init__(self, run: Run, problems: Mapping[str, Describes]) -> None:
        self.scores = {name: rows(run, name) for name in run.manifest.get("stages", {})}
        self.examples = {name: _examples(problems.get(name)) for name in self.scores}
        self.facts = [{"name": name, **facts} for name, facts in run.manifest.get("stages", {}).items()]

    def of(self, method: str, place: int, rank: Rank) -> list[dict[str, Any]]:
        """The ends of the ranking of one query (by its position) by one method, for each stage that the method attributes to."""
        found = []
        for name, scores in self.scores.items():
            if method in scores.methods:
                row = scores.of(place, method)
                found.append(
                    {"name": name, "of": row.of, **{kind: rank(self.examples[name], row, kind) for kind in ("helpful", "harmful")}}
                )
        return found


def _examples(problem: Describes | None) -> Callable[[int], dict[str, Any]]:
    @cache
    def example(i: int) -> dict[str, Any]:
        return {"id": i, "value": None, "content": described(problem or _Nothing(), "train", i)}

    return example


class _Nothing:
    """Stands for a problem that is not at hand: an example is shown by its number."""

    def describe(self, split: str, i: int) -> str:
        return f"{split} {i}"
