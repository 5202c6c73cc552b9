"""Spectra that a study makes for itself alone: written down before they are begun, and deleted once they are measured.

    studies/<id>/temporary.json    their fingerprints, while there are any

What was there before the study, or was begun by another run, is never among them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from infra import storage
from tasks import layout
from tasks.dense import DenseJob
from tda import location


def note(study: str, jobs: Sequence[DenseJob]) -> None:
    """Write down, of the spectra that are about to be fitted, those of which there is nothing yet. study: the URL of its folder."""
    known = _read(study)
    new = [_key(job.url) for job in jobs if _key(job.url) not in known and not location.list_names(job.url)]
    if new:
        _write(study, [*known, *dict.fromkeys(new)])


def drop(study: str, store: str, needed: Collection[str] = ()) -> None:
    """Delete the spectra of a study but those whose URLs are still needed."""
    known = _read(study)
    urls = {key: layout.artifact(store, "spectra", key) for key in known}
    gone = [key for key in known if urls[key] not in needed]
    for key in gone:
        storage.delete(location.join(urls[key], "complete.json"))  # first: what is half deleted must not look complete
        storage.delete_tree(urls[key])
    if gone:
        _write(study, [key for key in known if key not in gone])


def forget(study: str) -> None:
    """Keep whatever is left."""
    storage.delete(_url(study))


def _url(study: str) -> str:
    return location.join(study, "temporary.json")


def _key(url: str) -> str:
    return url.rpartition("/")[2]


def _read(study: str) -> list[str]:
    try:
        return [str(key) for key in location.read_json(_url(study))["spectra"]]
    except FileNotFoundError:
        return []


def _write(study: str, keys: Sequence[str]) -> None:
    storage.write_json(_url(study), {"spectra": list(keys)})
