"""How a run that fails half way says so: in one line, with what is kept and the command that goes on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from infra.cluster import ShardFailed
from infra.prefect_api import gone, way_back
from infra.storage import StoreError
from tda.errors import InputError, StoreUnreachable
from tda.patience import is_transient

#: What a full or a read-only store says.
FULL = {errno.ENOSPC: "the store is full", errno.EDQUOT: "the store's quota is used up", errno.EROFS: "the store has become read-only"}


class RunFailed(RuntimeError):  # noqa: N818  (the name users read)
    """A run failed half way; the message says which stage and shard, what is kept, and the command that resumes it."""


@contextmanager
def told(store: str, command: str = "", again: str = "the same run") -> Iterator[None]:
    """Turn whatever ends a run in the block into one line.

    Args:
        store: URL.
        command: the command line that does the same again.
        again: what resumes it, where no command line is known.

    Raises:
        InputError: a shard met wrong input.
        RunFailed: a shard, the store or Prefect's API failed.
    """
    kept = f"what is finished is kept in {store}"
    resume = f"`{command}`" if command else again
    try:
        yield
    except ShardFailed as error:
        if isinstance(error.cause, InputError):
            raise InputError(f"{error.cause} (stage '{error.stage}', shard {error.shard}; {kept})") from error
        raise RunFailed(f"{_said(error.cause, str(error))}; {kept}; {resume} resumes it") from error
    except (StoreUnreachable, StoreError) as error:
        raise RunFailed(f"{_said(error, str(error))}; {kept}; {resume} resumes it") from error
    except Exception as error:
        # Zarr passes on what file systems and botocore raise; Prefect what its HTTP client does.
        if server := gone(error):
            raise RunFailed(f"{server}; {kept}; {way_back()}{resume} resumes it") from error
        if not (is_transient(error) or getattr(error, "errno", None) in FULL):
            raise
        raise RunFailed(f"{_said(error, str(error))}; {kept}; {resume} resumes it") from error


def _said(error: BaseException, text: str) -> str:
    number = next((e.errno for e in (error, error.__cause__) if isinstance(e, OSError) and e.errno in FULL), None)
    return " ".join((f"{FULL[number]}: {text}; make room or make it writable" if number is not None else text).split())
