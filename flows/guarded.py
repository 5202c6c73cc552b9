"""What every flow and task of ours has: its errors carry no secrets, and its work counts as soon as it is done, whatever the server does.

Prefect's server is told of a run's states. The results lie in the store, and do not need it: a server that vanishes while a run works is
missed at the end only, when the run is complete.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from infra.masking import hide, masked, remember
from infra.prefect_api import gone
from infra.settings import quiet_prefect

if TYPE_CHECKING:
    from prefect import Flow

quiet_prefect()
from prefect import task  # noqa: E402  (its settings are read at import)
from prefect.cache_policies import NO_CACHE  # noqa: E402

remember()  # also of what a problem loads while it is examined, before a flow begins

P = ParamSpec("P")
R = TypeVar("R")

#: What functions of flows returned, by function, for who called the flow.
_RETURNED: ContextVar[dict[Any, Any] | None] = ContextVar("returned", default=None)


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """The function of a flow or a task, for `prefect.flow` and `prefect.task`: what it raises holds no secrets, what it returns is kept."""

    @wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            result = function(*arguments, **options)
        except Exception as error:
            hidden = hide(error)
            if hidden is error:
                raise
            raise hidden from None
        kept = _RETURNED.get()
        if kept is not None:
            kept[run] = result
        return result

    return run


def as_task(function: Callable[P, R]) -> Callable[P, R]:
    """A Prefect task that is a stage of a run: not cached, since the store knows what is done."""
    made: Callable[P, R] = task(cache_policy=NO_CACHE, persist_result=False)(guarded(function))
    return made


def completed(flow: Flow[..., R], *arguments: Any, **options: Any) -> R:
    """Run a flow of a guarded function. Where its work is done and Prefect's server cannot be told of that, it is done all the same."""
    token = _RETURNED.set({})
    try:
        result: R = flow(*arguments, **options)
    except Exception as error:
        kept = _RETURNED.get() or {}
        if flow.fn not in kept or not gone(error):
            raise
        sys.stderr.write(f"tda: {masked(gone(error))}; the results are complete all the same, and only that server does not know\n")
        return kept[flow.fn]  # type: ignore[no-any-return]
    else:
        return result
    finally:
        _RETURNED.reset(token)
