"""What lies below a URL of a store, with sizes and times: for those who choose by age, or delete."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from infra.storage import StoreError, explain, split


@dataclass(frozen=True)
class Listed:
    """One object: its URL, its size in bytes, and when it was last written (UTC)."""

    url: str
    size: int
    modified: datetime


def listed(url: str) -> list[Listed]:
    """Every object below a URL, or the one that is there, by URL; none where nothing is.

    Raises:
        StoreError: the store refuses or cannot be reached.
    """
    return _objects(url, lambda file_system, path: file_system.find(path, detail=True))


def matching(pattern: str) -> list[Listed]:
    """What matches a URL with * (within one part of a path) and ** (any parts), by URL; all other characters mean themselves.

    A folder that matches counts as one object, as large as what is in it and as new as the newest of that.

    Raises:
        StoreError: the store refuses or cannot be reached.
    """
    with _readable(pattern):
        protocol, path = split(pattern)
        found = _file_system(protocol).glob(re.sub(r"[\[?]", r"[\g<0>]", path), detail=True)
    return [_whole(protocol, name, about) for name, about in sorted(found.items()) if name.rstrip("/") != path.rstrip("/")]


def _whole(protocol: str, name: str, about: dict[str, Any]) -> Listed:
    if about["type"] != "directory":
        return _told(protocol, name, about)
    url = _url(protocol, name)
    inside = listed(url)
    newest = max((each.modified for each in inside), default=datetime.fromtimestamp(0, UTC))
    return Listed(url, sum(each.size for each in inside), newest)


def _objects(url: str, find: Callable[[Any, str], dict[str, dict[str, Any]]]) -> list[Listed]:
    protocol, path = split(url)
    with _readable(url):
        try:
            found = find(_file_system(protocol), path)
        except FileNotFoundError:
            return []
    return [_told(protocol, name, about) for name, about in sorted(found.items()) if about["type"] != "directory"]


def _told(protocol: str, name: str, about: dict[str, Any]) -> Listed:
    modified = about["LastModified"] if protocol == "s3" else datetime.fromtimestamp(about["mtime"], UTC)
    return Listed(_url(protocol, name), int(about["size"] or 0), modified)


def _url(protocol: str, name: str) -> str:
    return f"s3://{name.strip('/')}" if protocol == "s3" else f"file://{name.rstrip('/')}"


def _file_system(protocol: str) -> Any:
    import fsspec

    return fsspec.filesystem(protocol, **({"use_listings_cache": False} if protocol == "s3" else {}))


@contextmanager
def _readable(url: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except StoreError:
        raise
    except (OSError, BotoCoreError) as error:
        raise StoreError(f"{url}: {explain(url, error)}") from error
