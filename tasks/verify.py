"""Whether everything that a run consists of is still what was written; and taking away what is not, so that it is computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from infra import storage
from tasks import checksums as written
from tasks import layout, retrained
from tda import checksums, location
from tda.checksums import Fault, Sums
from tda.errors import InputError
from tda.results import Run

#: Artifacts without which a run still opens in full: that they are gone is told and no fault, since deleting them to save room is usual.
SPARE = ("directions", "projections", "averages")
#: Artifacts that grow with every question that shares them, and so never have a marker; their objects have receipts.
GROWING = ("retrained",)
#: Artifacts of which single objects can be made again; of every other the whole is (tasks.aside).
BY_OBJECT = ("directions", "retrained")

#: Arrays of results.zarr that score tasks write.
SCORED = {
    "influence", "stderr", "train_loss", "self_influence", "query_measurement", "candidate_influence", "candidate_stderr", "candidate_loss",
}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What was found of one folder: a run's own, or an artifact's, named as in the store.

    note: what else there is to say; strangers: objects that are no part of it, which are no fault.
    """

    folder: str
    objects: int
    bytes: int
    faults: tuple[Fault, ...] = ()
    note: str = ""
    strangers: tuple[str, ...] = ()


def check(run: Run) -> list[Checked]:
    """Read every object of a run and of the artifacts it names, and compare it with what was written.

    Raises:
        InputError: the manifest names what is outside the store.
        StoreUnreachable: the store does not answer.
    """
    artifacts = run.manifest.get("artifacts", [])
    return [check_run(run), *(_check_artifact(run.store, name) for name in artifacts)]


def check_run(run: Run) -> Checked:
    """The run's own objects."""
    folder = f"runs/{run.id}"
    told = run.manifest.get("checksums")
    if told is None:
        return Checked(folder, 0, 0, note="written before checksums were kept: nothing to compare with")
    faults = [] if "repairing" in run.manifest or checksums.is_whole(run.manifest) else [Fault("run.json", "damaged")]
    try:
        sums = _run_sums(run.url, told)
    except FileNotFoundError:
        return Checked(folder, 0, 0, (*faults, Fault(checksums.NAME, "missing")))
    except InputError:
        return Checked(folder, 0, 0, (*faults, Fault(checksums.NAME, "damaged")))
    return _checked(run.store, folder, sums, [*faults, *checksums.compare(run.url, sums)])


def _run_sums(url: str, told: dict[str, Any]) -> Sums:
    where = location.join(url, checksums.NAME)
    sums = checksums.read(where)
    if sums is None or location.read_json(where)["sha256"] != told.get("sha256"):
        raise InputError(f"{where} is not what the run's manifest says")
    return sums


def _check_artifact(store: str, name: str) -> Checked:
    kind, _, mark = str(name).partition("/")
    url, folder = layout.artifact(store, kind, mark), f"artifacts/{name}"
    if kind in GROWING:
        return _check_growing(url, folder)
    marker = location.join(url, "complete.json")
    try:
        sums = checksums.read(marker)
    except FileNotFoundError:
        if kind in SPARE and not location.find(url):
            return Checked(folder, 0, 0, note="gone; the run opens without it, and the same configuration makes it again")
        return Checked(folder, 0, 0, (Fault("complete.json", "missing"),))
    except InputError:
        return Checked(folder, 0, 0, (Fault("complete.json", "damaged"),))
    if sums is None:
        return Checked(folder, 0, 0, note="written before checksums were kept: nothing to compare with")
    return _checked(store, folder, sums, checksums.compare(url, sums))


def _checked(store: str, folder: str, sums: Sums, faults: Sequence[Fault]) -> Checked:
    strangers = written.strangers(location.join(store, folder), sums)
    return Checked(folder, len(sums), sum(entry[0] for entry in sums.values()), tuple(faults), strangers=tuple(strangers))


def _check_growing(url: str, folder: str) -> Checked:
    """An artifact that has no marker: each object that has a receipt with its sum."""
    sums, faults, unchecked = Sums(), [], 0
    names = retrained.names(url)
    for name in names:
        receipt = f"{name.rpartition('.')[0]}.json"
        try:
            told = checksums.read(location.join(url, receipt))
        except FileNotFoundError:
            told = None
        except InputError:
            faults.append(Fault(receipt, "damaged"))
            continue
        sums |= told or {}
        unchecked += told is None
    note = f"{unchecked} of {len(names)} objects carry no checksum: not checked" if unchecked else ""
    faults += checksums.compare(url, sums)
    strangers = set(location.find(url)) - {each for name in names for each in (name, f"{name.rpartition('.')[0]}.json")}
    return Checked(folder, len(sums), sum(entry[0] for entry in sums.values()), tuple(faults), note, tuple(sorted(strangers)))


def digests(store: str, some: Sequence[Checked]) -> dict[str, str]:
    """One digest of all sums of each artifact among some folders, where its marker is whole: what it has to be once it is made again."""
    found = {}
    for each in some:
        if each.folder.startswith("artifacts/"):
            try:
                sums = checksums.read(location.join(store, each.folder, "complete.json"))
            except (FileNotFoundError, InputError):
                continue
            if sums is not None:
                found[each.folder] = str(checksums.signed({"objects": sums})["sha256"])
    return found


def by_object(folder: str) -> bool:
    """Whether single objects of a folder can be made again, rather than all that is in it."""
    return folder.startswith("runs/") or folder.split("/")[1] in BY_OBJECT


def take_away(store: str, found: Checked) -> None:
    """Delete what is damaged in a folder whose objects can be made one by one, with what says that they are done, and nothing else."""
    assert by_object(found.folder), found.folder
    url = location.join(store, found.folder)
    if found.folder.startswith("runs/"):
        for fault in found.faults:
            for name in (fault.name, *_receipts(url, fault.name)):
                storage.delete(location.join(url, name))
        return
    storage.delete(location.join(url, "complete.json"))  # first: what is half deleted must not look complete
    for fault in found.faults:
        stem = fault.name.rpartition(".")[0]
        # A block of directions is done once its tensors are there; one of measurements is done without its receipt.
        tensors = [] if found.folder.split("/")[1] in GROWING else [f"{stem}.safetensors"]
        for name in (fault.name, *tensors, f"{stem}.json"):
            storage.delete(location.join(url, name))


def _receipts(run_url: str, name: str) -> Iterator[str]:
    """The receipts that say that an object of a run is written."""
    before, is_zarr, inside = name.partition("results.zarr/")
    if "solves.zarr/" in name:
        yield f"{before.partition('solves.zarr/')[0]}receipts/solves.json"
    if not is_zarr:
        return
    array, is_chunk, place = inside.partition("/c/")
    # What is no score is written when the arrays are created.
    if not is_chunk or array not in SCORED:
        yield f"{before}receipts/created.json"
        yield f"{before}receipts/created-mean.json"
        yield "members/0/receipts/created-mean.json"
        return
    if array.startswith("candidate_") or location.list_names(location.join(run_url, f"{before}receipts", "candidates")):
        yield from _candidate_receipts(run_url, before, array, place)
        return
    for shard, block in _shards(location.join(run_url, before.rstrip("/")) if before else run_url, array, place):
        yield f"{before}receipts/scores/{shard:06d}-{block:06d}.json"


def _candidate_receipts(run_url: str, before: str, array: str, place: str) -> Iterator[str]:
    """The receipts of the query block that a chunk of the candidates' arrays belongs to, the piece by piece and the whole."""
    at = [int(part) for part in place.split("/")]
    url = location.join(run_url, before.rstrip("/")) if before else run_url
    block = at[0] if array == "query_measurement" else _block(url, array, at[-2])
    for folder in ("pieces", "candidates"):
        for name in location.list_names(location.join(url, "receipts", folder)):
            if block is None or name.startswith(f"{block:06d}"):
                yield f"{before}receipts/{folder}/{name}"


def _shards(url: str, array: str, place: str) -> Iterator[tuple[int, int]]:
    """Which shards (train chunk, query block) write a chunk. Where metadata are damaged too: every block of the train chunk."""
    at = [int(part) for part in place.split("/")]
    names = location.list_names(location.join(url, "receipts", "scores"))
    blocks = range(1 + max((int(name[7:13]) for name in names), default=0))
    if array == "query_measurement":
        yield 0, at[0]
    elif array in ("train_loss", "self_influence"):
        yield at[-1], 0
    else:
        written = _block(url, array, at[1])
        yield from ((at[2], block) for block in blocks if written in (None, block))


def _block(url: str, array: str, chunk: int) -> int | None:
    """The query block of a chunk of an array (method, query, train); None where that cannot be told."""
    try:
        group: Any = location.open_group(location.join(url, "results.zarr"))
        return int(chunk * group[array].chunks[-2] // group["query_measurement"].chunks[0])
    except Exception:  # noqa: BLE001  (damaged metadata may raise anything)
        return None
