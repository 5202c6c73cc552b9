"""What of a store nobody needs any more, and its deletion in an order that a kill half way cannot harm.

A run goes manifest first, so that it is either there or not; then its folder; then artifacts that no run names which stays. An artifact
goes marker first, so that no later run takes half of it for whole. Whatever is left of a deletion is found, and finished, by the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from infra import storage
from infra.listing import listed
from tasks import layout
from tasks.checksums import strangers
from tasks.uses import OF_EVALUATIONS, kept_kinds, names_of_run, names_of_studies
from tda import checksums, location, schema
from tda.errors import InputError

_NEVER = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class Rules:
    """What stays. keep: so many of the newest complete runs of each problem, at least 1; older_than: what is younger, where it is not None.

    The newest stays at any age: where nothing changes no newer one is made, and it is what everybody opens.

    grace: nothing that was written to within this time is touched, except complete runs; now: what ages are counted from.
    """

    keep: int
    older_than: timedelta | None
    grace: timedelta
    now: datetime

    @property
    def untouched(self) -> timedelta:
        """How long nothing may have been written to what is deleted for being unfinished or unused."""
        return max(self.grace, self.older_than or timedelta(0))


@dataclass(frozen=True)
class Doomed:
    """One thing to delete. kind: "run", "unfinished run", "rest of a run", or the artifact's; written: when something of it last was."""

    kind: str
    name: str
    url: str
    bytes: int
    objects: int
    written: datetime
    why: str


@dataclass(frozen=True)
class Pruning:
    """What is to be deleted of a store, and how many complete runs stay. notes: what was left alone, and why."""

    store: str
    rules: Rules
    runs: tuple[Doomed, ...]
    artifacts: tuple[Doomed, ...]
    staying: int
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Doomed, ...]:
        """In the order of deletion."""
        return self.runs + self.artifacts


@dataclass
class _Used:
    """Names that manifests hold, and which runs were asked for them."""

    store: str
    runs: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    def look(self, ignored: Iterable[str] = ()) -> None:
        """Read what runs have come since."""
        new = [run for run in location.list_names(location.join(self.store, "runs")) if run not in self.runs]
        self.runs |= set(new)
        manifests = zip(new, _manifests(self.store, new), strict=True)
        self.names |= {name for run, found in manifests if run not in ignored for name in names_of_run(layout.run(self.store, run), found)}


def plan(store: str, rules: Rules) -> Pruning:
    """Decide what goes; nothing is written. store: absolute.

    Raises:
        InputError: a run.json is damaged or written by a newer tda, so that what its run uses is not known; or the store cannot be read.
        StoreError: it cannot be listed.
    """
    ids = location.list_names(location.join(store, "runs"))
    manifests = dict(zip(ids, _manifests(store, ids), strict=True))
    for run, found in manifests.items():
        _check(layout.run(store, run), found)
    outdated = _outdated(manifests, rules)
    runs, young, foreign = [], 0, list[str]()
    for run, found in manifests.items():
        doomed = _doomed_run(store, run, found, outdated, rules)
        if doomed is not None and not (said := _foreign(doomed)):
            runs.append(doomed)
        elif doomed is not None:
            foreign.append(said)
        elif found and not found.get("complete"):  # under repair, too
            young += 1
    going = {each.name for each in runs}
    used = _Used(store, names=names_of_studies(store))
    used.look(ignored=going)
    staying = [run for run, found in manifests.items() if run not in going and found]
    held = kept_kinds(store, [layout.run(store, run) for run in staying], unfinished=young)
    unused = [each for each in (_unused(store, kind, name, used, rules) for kind, name in _artifacts(store, held)) if each is not None]
    artifacts = tuple(each for each in unused if not _foreign(each))
    foreign += filter(None, map(_foreign, unused))
    complete = sum(bool(found.get("complete")) for run, found in manifests.items() if found and run not in going)
    notes = [f"{kind} stay: {why}" for kind, why in held.items()]
    notes += [f"{young} unfinished run{'s' * (young > 1)} may still be at work, and stay"] * bool(young)
    return Pruning(store, rules, tuple(runs), artifacts, complete, (*notes, *foreign))


def _foreign(doomed: Doomed) -> str:
    """Why something stays that would go: objects in it that tda did not write; empty where there are none, or no list of what it wrote."""
    try:
        sums = checksums.read(location.join(doomed.url, checksums.NAME if "run" in doomed.kind.split() else "complete.json"))
    except (FileNotFoundError, InputError):
        return ""
    names = [] if sums is None else strangers(doomed.url, sums)
    if not names or doomed.kind in OF_EVALUATIONS:  # those hold runs of their own
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{doomed.kind} {doomed.name} stays: it holds {names[0]}{more}, which tda did not write; move that away, and prune again"


def delete(pruning: Pruning) -> Iterator[Doomed]:
    """Delete what was decided, one thing at a time; what was is given back after it is gone.

    A run that began, or was resumed, meanwhile stays and keeps what it names, and what was written to meanwhile stays.

    Raises:
        StoreError: the store refuses.
    """
    store, rules = pruning.store, pruning.rules
    for run in pruning.runs:
        if _still(store, run, rules) and not _foreign(run):
            _delete_run(run.url)
            yield run
    used = _Used(store, names=names_of_studies(store))
    for artifact in pruning.artifacts:
        used.look()
        if _unused(store, artifact.kind, artifact.name, used, rules) is not None and not _foreign(artifact):
            _delete_artifact(artifact.url)
            yield artifact


def _still(store: str, doomed: Doomed, rules: Rules) -> bool:
    """Whether a run that was to go is as it was: one that is just created has a folder a moment before its run.json."""
    found = _manifests(store, [doomed.name])[0]
    now = _doomed_run(store, doomed.name, found, {doomed.name: ""}, rules)
    return now is not None and now.kind == doomed.kind


def _delete_run(url: str) -> None:
    storage.delete(location.join(url, "run.json"))
    storage.delete_tree(url)


def _delete_artifact(url: str) -> None:
    for run in location.list_names(location.join(url, "runs")):  # an untrained model's scores are a store of their own
        _delete_run(layout.run(url, run))
    storage.delete(location.join(url, "complete.json"))
    storage.delete_tree(url)


def _manifests(store: str, runs: list[str]) -> list[dict[str, Any] | None]:
    return location.read_json_many([location.join(layout.run(store, run), "run.json") for run in runs])


def _check(url: str, manifest: Mapping[str, Any] | None) -> None:
    if manifest is None:
        return
    where = location.join(url, "run.json")
    if not manifest:
        raise InputError(f"{where} is damaged, so what its run uses is not known; delete the folder {url} or mend it, then prune again")
    schema.check_version(dict(manifest), where)


def _outdated(manifests: Mapping[str, Mapping[str, Any] | None], rules: Rules) -> dict[str, str]:
    """Complete runs that no rule protects, with the reason."""
    groups: dict[str, list[tuple[datetime, str]]] = {}
    for run, found in manifests.items():
        if found and _counts(found):
            problem = f"{found.get('problem')} {found.get('config', {}).get('problem_options')}"
            groups.setdefault(problem, []).append((_created(found), run))
    gone: dict[str, str] = {}
    for group in groups.values():
        for place, (created, run) in enumerate(sorted(group, reverse=True)):
            age = rules.now - created
            if place < rules.keep or (rules.older_than is not None and age <= rules.older_than):
                continue
            gone[run] = f"{_age(age)} old, {place} newer of its problem"
    return gone


def _counts(manifest: Mapping[str, Any]) -> bool:
    """Whether a run is complete, or was until a repair of it began: that it is damaged is no reason to lose it."""
    return bool(manifest.get("complete")) or "repairing" in manifest


def _created(manifest: Mapping[str, Any]) -> datetime:
    """When a run began; one that does not say counts as new."""
    try:
        created = datetime.fromisoformat(str(manifest.get("created")))
    except ValueError:
        return datetime.now(UTC)
    return created if created.tzinfo is not None else created.replace(tzinfo=UTC)


def _doomed_run(store: str, run: str, manifest: Mapping[str, Any] | None, outdated: Mapping[str, str], rules: Rules) -> Doomed | None:
    url = layout.run(store, run)
    if manifest is None:  # a run's manifest is the first of it to be written, and the first to be deleted
        return _doomed("rest of a run", run, url, "its run.json is gone: an earlier deletion was interrupted")
    if manifest.get("complete"):
        return _doomed("run", run, url, outdated[run]) if run in outdated else None
    if _counts(manifest) and run not in outdated:
        return None
    found = _doomed("unfinished run", run, url, "")
    idle = rules.now - found.written
    return _why(found, f"nothing written for {_age(idle)}") if idle > rules.untouched else None


def _artifacts(store: str, held: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Kind and name of each artifact of the kinds that may be deleted."""
    for kind in location.list_names(location.join(store, "artifacts")):
        if kind not in held:
            for name in location.list_names(location.join(store, "artifacts", kind)):
                yield kind, name


def _unused(store: str, kind: str, name: str, used: _Used, rules: Rules) -> Doomed | None:
    url = layout.artifact(store, kind, name)
    if name in used.names or (kind == "checkpoint" and _weights(url) in used.names):
        return None
    found = _doomed(kind, name, url, "no run that stays uses it")
    return found if rules.now - found.written > rules.untouched else None


def _weights(url: str) -> str:
    """The digest of a training's weights, by which runs name it; "" where it is not complete."""
    told = location.read_json_many([location.join(url, "complete.json")])[0]
    return str((told or {}).get("digest", ""))


def _doomed(kind: str, name: str, url: str, why: str) -> Doomed:
    objects = listed(url)
    written = max((each.modified for each in objects), default=_NEVER)
    return Doomed(kind, name, url, sum(each.size for each in objects), len(objects), written, why)


def _why(doomed: Doomed, why: str) -> Doomed:
    return Doomed(doomed.kind, doomed.name, doomed.url, doomed.bytes, doomed.objects, doomed.written, why)


def _age(age: timedelta) -> str:
    return f"{age.days} days" if age.days else f"{age.seconds // 3600} hours"
