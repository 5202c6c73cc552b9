"""What a store that went away is to the cluster: something that another try may mend, unlike wrong input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tda.errors import StoreUnreachable

S = TypeVar("S")
R = TypeVar("R")


def reached(function: Callable[[S], R], shard: S) -> R:
    """function(shard), where a store that does not answer raises a ConnectionError, which is tried again."""
    try:
        return function(shard)
    except StoreUnreachable as error:
        raise ConnectionError(str(error)) from error
