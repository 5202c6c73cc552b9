"""Writing down what a run's and an artifact's objects are, once they are all there.

What was digested while it was written, or read back, is taken from there; only what is left, metadata and the like, is read for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from infra import storage
from tda import checksums, location
from tda.checksums import Sums

if TYPE_CHECKING:
    from tasks.plan import Plan

#: What says how far a try has come, or what it took: none of it is anybody's result, and two runs of the same may write it differently.
PASSING = {"begun.json", "seconds.json", "complete.json", "run.json", checksums.NAME, "evaluation.json"}
PASSING_FOLDERS = {"partial", "state", "parts", "receipts", "evaluation"}


def complete(url: str, marker: Mapping[str, Any], known: Sums | None = None) -> bool:
    """Write an artifact's completion marker, with the sums of all that it holds; True where nobody had before.

    known: sums of objects that are at hand already.
    """
    storage.sweep(url)
    body = checksums.signed({**marker, "objects": _sums(url, known or {})})
    return storage.create_once(location.join(url, "complete.json"), json.dumps(body, allow_nan=False).encode())


def write_run(run_url: str, known: Sums, artifacts: list[str]) -> dict[str, Any]:
    """Write checksums.json of a run whose other objects are all there; what its manifest says of it."""
    sums = _sums(run_url, known)
    body = checksums.signed({"objects": sums})
    storage.write_bytes(location.join(run_url, checksums.NAME), json.dumps(body).encode())
    told = {"objects": len(sums), "bytes": sum(entry[0] for entry in sums.values()), "sha256": body["sha256"]}
    return {"checksums": told, "artifacts": artifacts}


def _sums(url: str, known: Sums) -> Sums:
    names = {name: size for name, size in location.find(url).items() if is_result(name)}
    fresh = {name: checksums.of(location.read_bytes(location.join(url, name))) for name in checksums.missing(names, known)}
    return {name: fresh.get(name) or known[name] for name in sorted(names)}


def is_result(name: str) -> bool:
    """Whether an object, by its name in a run or an artifact, is somebody's result, and so has a sum."""
    return not _passes(name) and not name.rpartition("/")[2].startswith(".")


def _passes(name: str) -> bool:
    *folders, last = name.split("/")
    return last in PASSING or last.startswith("state-") or bool(PASSING_FOLDERS & set(folders))


def strangers(url: str, sums: Sums) -> list[str]:
    """The objects in the folder of a run or an artifact that neither its sums name nor any try of it writes: somebody else's."""
    return sorted(name for name in location.find(url) if name not in sums and not _passes(name))


def used(plan: Plan) -> list[str]:
    """The artifacts behind a run, "<kind>/<fingerprint>", sorted: whatever of the store's its jobs name."""
    root = location.join(plan.request.store, "artifacts") + "/"
    return sorted({"/".join(url.removeprefix(root).split("/")[:2]) for url in _texts((plan.members, plan.stages)) if url.startswith(root)})


def _texts(value: Any) -> set[str]:
    """Every text in nested dataclasses, sequences and tables."""
    if isinstance(value, str):
        return {value}
    if is_dataclass(value) and not isinstance(value, type):
        return set().union(*(_texts(getattr(value, field.name)) for field in fields(value)))
    if isinstance(value, Mapping):
        return set().union(*map(_texts, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_texts, value))
    return set()
