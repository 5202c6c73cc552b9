"""Methods whose directions may be kept in a low rank."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from tda.methods.method import Method


def _rank(value: object) -> object:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"query_rank must be a whole number of at least 1, got {value!r}; leave it out to keep directions in full")
    return value


class Shortened(Method):
    """A method whose scores are products with directions that nothing else is made of.

    query_rank: in how many terms each layer's direction of a query is kept (`tda.lowrank`); without it, in full.
    """

    query_rank: Annotated[int | None, BeforeValidator(_rank)] = None

    @property
    def rank(self) -> int | None:
        """query_rank."""
        return self.query_rank

    def determining(self) -> dict[str, Any]:
        """All options; query_rank where there is one, so that full directions are what they were before the option was."""
        return {name: value for name, value in super().determining().items() if name != "query_rank" or value is not None}
