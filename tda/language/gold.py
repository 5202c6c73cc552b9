"""Which training examples are known to be behind a query, as its record says it."""

from __future__ import annotations

from tda import location
from tda.errors import InputError
from tda.language.records import records

#: The field of a query's record.
FIELD = "gold"


def gold_of(url: str) -> list[list[int]] | None:
    """Per record of the queries, the ids in its field `gold`: none where it lacks the field; None where all do, and for token arrays.

    Raises InputError where a record's is no list of whole numbers, by its place.
    """
    where = location.resolve(url)
    if where.endswith(".zarr"):
        return None
    found, known = [], False
    for place, record in records(where):
        ids = record.get(FIELD)
        known |= ids is not None
        if ids is not None and (not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids)):
            raise InputError(f"{where}, {place}: {FIELD} must be a list of ids of training examples, got {ids!r}")
        found.append(ids or [])
    return found if known else None
