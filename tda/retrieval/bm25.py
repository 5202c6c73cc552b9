"""BM25: documents ranked by the words that they share with a query, rare words counting more (Robertson and Zaragoza, 2009).

Lucene's variant with k1 = 1.5 and b = 0.75, as the library bm25s has it. Words are runs of letters, digits and underscores in lower case.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tda.errors import InputError

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, in order, with repetitions."""
    return _WORD.findall(text.lower())


def bm25_scores(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray[Any, Any]:
    """Scores (query, document), float32: the sum over a query's words, 0 where none is shared. Higher is nearer.

    Raises:
        InputError: no document has a word, or bm25s is not installed.
    """
    index = _index(documents)
    return np.stack([_scores(index, query, len(documents)) for query in queries])


def bm25_nearest(queries: Sequence[str], documents: Sequence[str], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The k best documents that share a word with each query: ids (query, k) int64, scores (query, k) float32.

    The best first, ties by id; where fewer share a word, ids end with -1 and scores with 0. One query's scores are held at a time.

    Raises:
        InputError: no document has a word, or bm25s is not installed.
    """
    index = _index(documents)
    ids, scores = np.full((len(queries), k), -1, dtype=np.int64), np.zeros((len(queries), k), dtype=np.float32)
    for q, query in enumerate(queries):
        found = _scores(index, query, len(documents))
        best = np.argsort(-found, kind="stable")[:k]
        best = best[found[best] > 0]
        ids[q, : len(best)], scores[q, : len(best)] = best, found[best]
    return ids, scores


def _index(documents: Sequence[str]) -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise InputError("BM25 needs bm25s; pip install 'tda[candidates]'") from error
    logging.getLogger("bm25s").addFilter(_matters)
    corpus = [words(document) for document in documents]
    if not any(corpus):
        raise InputError(f"none of the {len(documents)} documents has a word (letters or digits), so BM25 has nothing to compare")
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend="numpy", csc_backend="scipy")
    index.index(corpus, show_progress=False)
    return index


def _matters(record: logging.LogRecord) -> bool:
    """bm25s sets its own level to DEBUG, and says more than a user wants to know."""
    return record.levelno >= logging.WARNING


def _scores(index: Any, query: str, documents: int) -> np.ndarray[Any, Any]:
    known = [word for word in words(query) if word in index.vocab_dict]
    if not known:
        return np.zeros(documents, dtype=np.float32)
    found: np.ndarray[Any, Any] = index.get_scores(known)
    return found
