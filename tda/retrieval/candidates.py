"""Candidates: per query, the training examples that are scored at all, and where each of them comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tda.errors import InputError
from tda.problem import Problem, Split

#: Bits of a candidate's source, by name.
SOURCES = {"bm25": 1, "embedding": 2, "gold": 4, "random": 8}


@dataclass(frozen=True)
class Asked:
    """What a [candidates] table asks for, per query.

    on: "train", the run's own training set, or a stage of multistage. bm25, embedding, random: how many. model: the URL of an encoder's
    folder, where `embedding` is not 0. gold: whether those are added that the problem names.
    """

    on: str = "train"
    bm25: int = 0
    embedding: int = 0
    model: str = ""
    gold: bool = False
    random: int = 0

    @property
    def needs_text(self) -> bool:
        """Whether the examples have to be text."""
        return bool(self.bm25 or self.embedding)


def check_counts(asked: Asked, examples: int) -> None:
    """InputError where more candidates are asked for than there are training examples."""
    for name in ("bm25", "embedding", "random"):
        if getattr(asked, name) > examples:
            raise InputError(
                f"candidates.{name} = {getattr(asked, name)} is more than the {examples} training examples of {asked.on!r}; "
                "lower it, or leave the [candidates] table out to score all of them"
            )


def texts(problem: Problem, split: Split, ids: Iterable[int]) -> list[str]:
    """The texts of examples of a split, in order. Raises InputError, by example, where one is no text, or empty."""
    found = []
    for i in ids:
        text = problem.text(split, i)
        if text is None:
            raise InputError(
                f"{split} example {i} of {type(problem).__name__} is no text, and candidates by bm25 or embedding need one; "
                "define text(split, i), or choose by gold and random"
            )
        if not text.strip():
            raise InputError(f"{split} example {i} of {type(problem).__name__} is an empty text; remove it, or choose by gold and random")
        found.append(text)
    return found


def gold(problem: Problem, queries: int, examples: int, on: str) -> list[list[int]]:
    """The ids that a problem names for each query, sorted. Raises InputError where it names none at all, or ids out of range, by query."""
    found = []
    for query in range(queries):
        named = problem.gold(query)
        if named is None:
            raise InputError(
                f"candidates.gold: {type(problem).__name__}.gold({query}) names nothing; define gold(query) -> ids, or leave gold out"
            )
        wrong = [int(i) for i in named if not 0 <= int(i) < examples]
        if wrong:
            raise InputError(
                f"candidates.gold: {type(problem).__name__}.gold({query}) names example {wrong[0]} of {on!r}, "
                f"which has {examples}, counted from 0; mend gold"
            )
        found.append(sorted({int(i) for i in named}))
    return found


def drawn(examples: int, count: int, seed: int, query: int) -> np.ndarray[Any, Any]:
    """`count` different ids, the same ones for a seed and a query."""
    generator = np.random.default_rng([seed, query])
    return generator.choice(examples, count, replace=False, shuffle=False)


def union(found: Mapping[str, Sequence[Sequence[int]]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Candidates of all sources together.

    found: by source, per query its ids (-1: none). Returns ids (query, candidate) int64, ascending for each query, with -1 behind the last
    one, and their sources (query, candidate) uint8, bits of SOURCES. Raises InputError where a query has no candidate.
    """
    rows = []
    for q in range(len(next(iter(found.values())))):
        bits: dict[int, int] = {}
        for source, each in found.items():
            for i in each[q]:
                if i >= 0:
                    bits[int(i)] = bits.get(int(i), 0) | SOURCES[source]
        if not bits:
            raise InputError(f"query {q} has no candidate by {' and '.join(found)}; add others, such as random = 10 in [candidates]")
        rows.append(dict(sorted(bits.items())))
    width = max(map(len, rows))
    ids, sources = np.full((len(rows), width), -1, dtype=np.int64), np.zeros((len(rows), width), dtype=np.uint8)
    for q, row in enumerate(rows):
        ids[q, : len(row)], sources[q, : len(row)] = list(row), list(row.values())
    return ids, sources


def named(source: int) -> str:
    """The names of a candidate's sources, such as "bm25, gold"."""
    return ", ".join(name for name, bit in SOURCES.items() if source & bit)
