"""Making an artifact again without losing what is intact of it: it is set aside, and deleted once the new one is known to be the same.

    <store>/aside/artifacts/<kind>/<fingerprint>/objects/...     what was there
    <store>/aside/artifacts/<kind>/<fingerprint>/aside.json      how far this has come: copied, cleared (may be made again), returning, kept
                                                                 (for whoever wants it); and which of the objects are damaged

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


def pending(store: str, folders: Iterable[str]) -> dict[str, list[str]]:
    """Those of some artifacts that an earlier try set aside and did not come to an end with; with what is damaged of each."""
    found = {folder: _told(place(store, folder)) for folder in folders}
    return {folder: damaged for folder, (step, damaged) in found.items() if step not in ("", "kept")}


def set_aside(store: str, folder: str, damaged: Sequence[str] = ()) -> list[str]:
    """Copy an artifact, then delete it, so that it is made again. What an earlier try set aside stays as it is.

    damaged: names of objects that are not what they should be. Those of what was set aside, now or by an earlier try: what that left in
    the artifact's place does not show them any more.
    """
    url, aside = location.join(store, folder), place(store, folder)
    step, known = _told(aside)
    names = known if step else list(damaged)
    if step == "returning":
        put_back(store, folder)
        step = ""
    if step in ("cleared", "kept"):
        if location.exists(location.join(url, "complete.json")):  # made again since, and damaged since
            _clear(url)
        _note(aside, "cleared", names)
        return names
    if step != "copied":
        _copy(url, location.join(aside, "objects"))
        _note(aside, "copied", names)
    _clear(url)
    _note(aside, "cleared", names)
    return names


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


def keep(store: str, folder: str) -> None:
    """Leave what was set aside to whoever wants it: what was made again is another, and stays."""
    aside = place(store, folder)
    _note(aside, "kept", _told(aside)[1])


def drop(store: str, folder: str) -> None:
    """Delete what was set aside."""
    storage.delete_tree(place(store, folder))


def put_back(store: str, folder: str) -> None:
    """Bring an artifact back as it was, damage and all."""
    url, aside = location.join(store, folder), place(store, folder)
    _note(aside, "returning", _told(aside)[1])
    _clear(url)
    _copy(location.join(aside, "objects"), url)
    drop(store, folder)


def _told(aside: str) -> tuple[str, list[str]]:
    """The step, "" where there is none, and the names of what is damaged."""
    told = location.read_json_many([location.join(aside, "aside.json")])[0] or {}
    return str(told.get("step", "")), list(told.get("damaged", []))


def _note(aside: str, step: str, damaged: Sequence[str]) -> None:
    storage.write_json(location.join(aside, "aside.json"), {"step": step, "damaged": list(damaged)})


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
