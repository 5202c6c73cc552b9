"""Making an artifact again without losing what is intact of it: it is set aside, and deleted once the new one is known to be the same.

    <store>/aside/artifacts/<kind>/<fingerprint>/objects/...     what was there
    <store>/aside/artifacts/<kind>/<fingerprint>/aside.json      how far this has come: copied, cleared (may be made again), returning

Each step may be killed, and is finished by the next call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from infra import storage
from tasks.checksums import is_result
from tda import checksums, location
from tda.checksums import Sums
from tda.errors import InputError


def place(store: str, folder: str) -> str:
    """Where an artifact ("artifacts/<kind>/<fingerprint>") is set aside."""
    return location.join(store, "aside", folder)


def pending(store: str, folders: Iterable[str]) -> list[str]:
    """Those of some artifacts that an earlier try set aside."""
    found = list(folders)
    told = location.read_json_many([location.join(place(store, folder), "aside.json") for folder in found])
    return [folder for folder, one in zip(found, told, strict=True) if one is not None]


def set_aside(store: str, folder: str) -> None:
    """Copy an artifact, then delete it, so that it is made again. What an earlier try set aside stays as it is."""
    url, aside = location.join(store, folder), place(store, folder)
    if _step(aside) == "returning":
        put_back(store, folder)
    if _step(aside) == "cleared":
        if location.exists(location.join(url, "complete.json")):  # made again since, and damaged since
            _clear(url)
        return
    if _step(aside) != "copied":
        _copy(url, location.join(aside, "objects"))
        _note(aside, "copied")
    _clear(url)
    _note(aside, "cleared")


def is_same(store: str, folder: str, damaged: Sequence[str]) -> bool:
    """Whether an artifact that was made again is what was set aside. damaged: names of objects that were not what they should be.

    Compared with the marker that was set aside; where that was damaged too, with every other object.
    """
    url, objects = location.join(store, folder), location.join(place(store, folder), "objects")
    new = _sums(url)
    if new is None:
        return False
    before = _sums(objects)
    if before is not None:
        return new == before
    known = {name for name in location.find(objects) if is_result(name)} - set(damaged)
    return all(name in new and new[name] == checksums.of(location.read_bytes(location.join(objects, name))) for name in known)


def drop(store: str, folder: str) -> None:
    """Delete what was set aside."""
    storage.delete_tree(place(store, folder))


def put_back(store: str, folder: str) -> None:
    """Bring an artifact back as it was, damage and all."""
    url, aside = location.join(store, folder), place(store, folder)
    _note(aside, "returning")
    _clear(url)
    _copy(location.join(aside, "objects"), url)
    drop(store, folder)


def _step(aside: str) -> str:
    told = location.read_json_many([location.join(aside, "aside.json")])[0]
    return str((told or {}).get("step", ""))


def _note(aside: str, step: str) -> None:
    storage.write_json(location.join(aside, "aside.json"), {"step": step})


def _clear(url: str) -> None:
    storage.delete(location.join(url, "complete.json"))  # first: what is half deleted must not look complete
    storage.delete_tree(url)


def _copy(source: str, target: str) -> None:
    names = sorted(location.find(source), key=lambda name: name == "complete.json")  # last, as ever
    for name in names:
        storage.write_bytes(location.join(target, name), location.read_bytes(location.join(source, name)))


def _sums(url: str) -> Sums | None:
    try:
        return checksums.read(location.join(url, "complete.json"))
    except (FileNotFoundError, InputError):
        return None
