"""What every stored object was when it was written: its bytes and their SHA-256, so that a damaged or lost one is found.

A run's are in checksums.json beside its arrays, an artifact's in its complete.json under "objects". Names are relative to that folder:

    {"objects": {"results.zarr/influence/c/0/0/0": [1184, "9f86d081884c7d65..."], ...}}

A JSON object that holds what others are compared with carries a digest of itself under "sha256".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tda import location
from tda.errors import InputError

NAME = "checksums.json"
#: Objects that are read at a time: latency, not the processor, is what takes time on S3.
READERS = 8

#: By an object's name: its bytes and the SHA-256 of them, in hexadecimal digits.
Sums = dict[str, list[Any]]


@dataclass(frozen=True)
class Fault:
    """One object that is not what was written: its name in its folder, and what is wrong with it."""

    name: str
    what: str


def of(data: bytes | bytearray | memoryview) -> list[Any]:
    """The entry of an object with these bytes."""
    return [len(data), hashlib.sha256(data).hexdigest()]


def signed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of itself under "sha256"."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return {**rest, "sha256": _digest(rest)}


def is_whole(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is what `signed` made of it; True where it carries no digest."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return bool(values.get("sha256", _digest(rest)) == _digest(rest))


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(url: str) -> Sums | None:
    """The sums in a stored JSON object; None where it holds none, since it was written before they were kept.

    Raises:
        FileNotFoundError: nothing is there.
        InputError: it is damaged, or names what is outside its folder.
    """
    stored = location.read_json(url)
    if not is_whole(stored):
        raise InputError(f"{url} is damaged: its own checksum does not fit")
    objects = stored.get("objects")
    if objects is None:
        return None
    if not isinstance(objects, dict) or not all(_entry(entry) for entry in objects.values()):
        raise InputError(f"{url} is damaged: its list of objects is none")
    for name in objects:
        location.join(url, name)
    return objects


def _entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int) and isinstance(entry[1], str)


def compare(folder: str, sums: Sums) -> list[Fault]:
    """The objects of a folder that are lost, or not what they were; all of them are read.

    Raises:
        StoreUnreachable: the store does not answer.
    """
    there = location.find(folder)
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _fault(folder, name, sums[name], there.get(name)), sorted(sums))
        return [fault for fault in found if fault is not None]


def _fault(folder: str, name: str, entry: list[Any], size: int | None) -> Fault | None:
    if size is None:
        return Fault(name, "missing")
    if size != entry[0]:
        return Fault(name, f"damaged: {size} bytes instead of {entry[0]}")
    try:
        data = location.read_bytes(location.join(folder, name))
    except FileNotFoundError:
        return Fault(name, "missing")
    return None if of(data) == entry else Fault(name, "damaged: its bytes have changed")


def missing(names: Mapping[str, int], known: Sums) -> Iterator[str]:
    """The names of which no sum is known, or one for another length."""
    for name, size in sorted(names.items()):
        if name not in known or known[name][0] != size:
            yield name
