"""Which artifacts runs and studies name in their manifests, and which must stay although none does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tda import location
from tda.errors import InputError

#: Ground truth, which takes the longest of all to make again, and which evaluations share beyond what their manifests name.
OF_EVALUATIONS = ("retrained", "retraining", "untrained")
#: What a study would have to compute again to be widened; its manifest names its trainings alone.
OF_STUDIES = ("decomposition", "factors", "ladder_lds", "retrained", "retraining", "spectra")
#: Made while a run is planned, and named by none: as good as in use while one is under way.
OF_PLANS = ("averages",)


def names_of_run(url: str, manifest: Mapping[str, Any] | None) -> set[str]:
    """Every fingerprint and digest that a run, its members and its stages name, and its evaluations. Digests: of checkpoints' weights.

    A complete run also lists the artifacts that it was computed from, those among them that no fingerprint of it names.

    An artifact is kept for its name alone, whatever its kind: fingerprints of different kinds do not meet.
    """
    if not manifest:
        return set()
    stages = [stage.get("fingerprints", {}) for stage in manifest.get("stages", {}).values()]
    listed = [str(name).rpartition("/")[2] for name in manifest.get("artifacts", [])]
    return {*_texts([manifest.get("fingerprints", {}), manifest.get("members", []), stages]), *listed, *_evaluated(url)}


def _evaluated(url: str) -> Iterator[str]:
    folder = location.join(url, "evaluation")
    names = location.list_names(folder)
    for found in location.read_json_many([location.join(folder, name, "complete.json") for name in names]):
        if found and found.get("retraining"):
            yield str(found["retraining"])


def names_of_studies(store: str) -> set[str]:
    """The artifacts that the studies of a store name: their trainings. Raises InputError where a study.json is damaged."""
    folder = location.join(store, "studies")
    urls = [location.join(folder, name, "study.json") for name in location.list_names(folder)]
    found = location.read_json_many(urls)
    for url, study in zip(urls, found, strict=True):
        if study is not None and not study:
            raise InputError(f"{url} is damaged, so what its study uses is not known; delete its folder or mend it, then prune again")
    return {str(point.get("checkpoint", "")) for study in found for point in (study or {}).get("points", [])}


def kept_kinds(store: str, runs: Sequence[str], *, unfinished: int) -> dict[str, str]:
    """Kinds of artifacts of which none may go, with the reason. runs: URLs of those that stay; unfinished: how many are under way."""
    held: dict[str, str] = {}
    if unfinished:
        held |= dict.fromkeys(OF_PLANS, "a run is under way")
    if any(location.list_names(location.join(url, "evaluation")) for url in runs):
        held |= dict.fromkeys(OF_EVALUATIONS, "a run that stays was evaluated, and evaluations share what was retrained")
    if location.list_names(location.join(store, "studies")):
        held |= dict.fromkeys(OF_STUDIES, "the store holds studies, which share it; give studies a store of their own")
    return held


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and tables; the keys of tables are titles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)
