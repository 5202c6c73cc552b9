"""What errors of a shard are to the cluster: without secrets, and, from a store that went away, something that another try may mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from infra.masking import hide, masked, remember
from tda.errors import StoreUnreachable

S = TypeVar("S")
R = TypeVar("R")


def reached(function: Callable[[S], R], shard: S) -> R:
    """function(shard), where a store that does not answer raises a ConnectionError, which is tried again. No error holds a secret."""
    remember()
    try:
        return function(shard)
    except StoreUnreachable as error:
        raise ConnectionError(masked(str(error))) from None
    except Exception as error:
        hidden = hide(error)
        if hidden is error:
            raise
        raise hidden from None
