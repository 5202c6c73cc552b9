"""Retention: old runs go, and what no run uses any more; nothing that stays is ever harmed, whenever the deletion is killed."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows import cli
from infra import storage
from infra.listing import listed
from tasks.prune import Rules, delete, plan
from tda.errors import InputError

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)


class Store:
    """A store made of small objects; ages are in days before NOW."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ages: dict[str, float] = {}

    def put(self, name: str, value: object = "x", age: float = 0.0) -> None:
        storage.write_json(f"{self.url}/{name}", value)
        self.ages[name] = age
        if self.url.startswith("file://"):
            at = (NOW - age * DAY).timestamp()
            os.utime(f"{self.url.removeprefix('file://')}/{name}", (at, at))

    def artifact(self, kind: str, name: str, age: float, marker: object = None) -> None:
        self.put(f"artifacts/{kind}/{name}/data", "x" * 100, age)
        self.put(f"artifacts/{kind}/{name}/complete.json", marker or {}, age)

    def run(self, run: str, age: float, *, complete: bool = True, problem: str = "p:P", **more: object) -> None:
        """A run with factors and directions of its own, the factors "shared", and a checkpoint that it names by its digest."""
        used = {"checkpoint": f"digest-{run}", "factors": {"exact": f"f-{run}", "sampled": "shared"}, "directions": {"ekfac": f"d-{run}"}}
        manifest = {"schema_version": 1, "complete": complete, "problem": problem, "created": (NOW - age * DAY).isoformat()}
        self.put(f"runs/{run}/results.zarr/c/0", "y" * 50, age)
        self.put(f"runs/{run}/run.json", manifest | {"config": {}, "fingerprints": used} | more, age)
        self.artifact("factors", f"f-{run}", age)
        self.artifact("directions", f"d-{run}", age)
        self.artifact("checkpoint", f"c-{run}", age, {"digest": f"digest-{run}"})

    def names(self) -> set[str]:
        return {each.url.removeprefix(f"{self.url}/") for each in listed(self.url)}

    def there(self, folder: str) -> bool:
        return any(name.startswith(f"{folder}/") for name in self.names())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(f"file://{tmp_path}/store")
    made.artifact("factors", "shared", 400)
    for run, age in {"a": 300, "b": 200, "c": 100, "d": 10}.items():
        made.run(run, age)
    return made


def rules(keep: int = 1, older: float | None = None) -> Rules:
    return Rules(keep, None if older is None else older * DAY, DAY, NOW)


def dropped(store: Store, *limits: float) -> list[str]:
    return [each.name for each in plan(store.url, rules(*limits)).runs]


def test_a_run_goes_where_neither_count_nor_age_protects_it(store: Store) -> None:
    assert dropped(store, 1) == ["a", "b", "c"]
    assert dropped(store, 1, 150) == ["a", "b"]
    assert dropped(store, 3, 150) == ["a"]
    assert dropped(store, 1, 250) == ["a"]
    assert dropped(store, 1, 5) == ["a", "b", "c"], "the newest stays at any age"
    assert dropped(store, 4) == dropped(store, 1, 500) == []


def test_each_problem_keeps_its_newest(store: Store) -> None:
    store.run("other", 350, problem="q:Q")
    assert dropped(store, 1) == ["a", "b", "c"]
    store.run("wider", 360, config={"problem_options": {"width": 3}})
    assert dropped(store, 1) == ["a", "b", "c"]


def test_artifacts_go_with_the_last_run_that_names_them(store: Store) -> None:
    before = store.names()
    pruning = plan(store.url, rules(2))
    assert store.names() == before, "a plan changes nothing"
    gone = list(delete(pruning))
    assert [each.name for each in gone[:2]] == ["a", "b"]
    assert {each.name for each in gone[2:]} == {f"{kind}-{run}" for kind in "fdc" for run in "ab"}
    assert store.names() == {name for name in before if not any(f"/{part}" in f"/{name}" for part in ("runs/a", "runs/b"))
                             and not any(f"{kind}-{run}/" in name for kind in "fdc" for run in "ab")}  # fmt: skip
    assert sum(each.bytes for each in gone[:1]) == sum(each.size for each in listed(f"{store.url}/runs")) / 2, (
        "two runs of the same sizes are left"
    )
    list(delete(plan(store.url, rules(1))))
    assert store.there("artifacts/factors/shared")


def test_members_stages_and_evaluations_of_a_run_that_stays_hold_their_artifacts(store: Store) -> None:
    for name in ("f-member", "f-stage", "truth", "litter"):
        store.artifact("factors", name, 100)
    store.artifact("checkpoint", "c-member", 100, {"digest": "digest-member"})
    stages = {"pretraining": {"fingerprints": {"factors": {"exact": "f-stage"}}}}
    store.run("e", 5, members=[{"checkpoint": "digest-member", "factors": {"exact": "f-member"}}], stages=stages)
    for kind in ("retraining", "retrained", "untrained", "averages"):
        store.artifact(kind, "other", 100)
    store.put("runs/e/evaluation/x/complete.json", {"retraining": "truth"}, 5)
    pruning = plan(store.url, rules(10))
    assert {(each.kind, each.name) for each in pruning.all} == {("factors", "litter"), ("averages", "other")}
    assert any("retrained stay: a run that stays was evaluated" in note for note in pruning.notes)


def test_what_was_retrained_goes_once_no_evaluated_run_stays(store: Store) -> None:
    store.artifact("retrained", "other", 100)
    store.put("runs/a/evaluation/x/complete.json", {"retraining": "truth"}, 300)
    assert not [each for each in plan(store.url, rules(4)).artifacts if each.kind == "retrained"]
    assert [each.name for each in plan(store.url, rules(1)).artifacts if each.kind == "retrained"] == ["other"]


def test_a_store_with_studies_keeps_what_they_share(store: Store) -> None:
    store.put("studies/s/study.json", {"points": [{"checkpoint": "c-study"}]}, 50)
    store.artifact("checkpoint", "c-study", 50, {"digest": "z"})
    store.artifact("spectra", "s", 50)
    assert {each.kind for each in plan(store.url, rules(1)).artifacts} == {"directions", "checkpoint"}
    assert "c-study" not in {each.name for each in plan(store.url, rules(1)).artifacts}


def test_a_study_that_cannot_be_read_stops_it_before_anything_is_deleted(store: Store) -> None:
    store.put("studies/s/study.json", [1], 50)
    before = store.names()
    with pytest.raises(InputError, match=r"studies/s/study.json is damaged, so what its study uses is not known"):
        list(delete(plan(store.url, rules(1))))
    assert store.names() == before


def test_nothing_that_may_be_at_work_is_touched(store: Store) -> None:
    store.run("young", 0.5, complete=False)
    store.run("busy", 40, complete=False)
    store.put("runs/busy/receipts/7", "x", 0.1)  # it began long ago and still writes
    store.run("idle", 40, complete=False)
    store.artifact("factors", "writing", 3)
    store.put("artifacts/factors/writing/partial/9", "x", 0.1)
    store.artifact("averages", "mean", 100)
    pruning = plan(store.url, rules(4))
    assert {(each.kind, each.name) for each in pruning.all} == {
        ("unfinished run", "idle"), ("factors", "f-idle"), ("directions", "d-idle"), ("checkpoint", "c-idle"),
    }  # fmt: skip
    assert "2 unfinished runs may still be at work, and stay" in pruning.notes
    assert [each.name for each in plan(store.url, rules(4, 90)).all] == [], "what is younger than the age that was given stays too"


def test_what_came_into_use_meanwhile_stays(store: Store) -> None:
    store.artifact("factors", "wanted", 100)
    store.artifact("factors", "grown", 100)
    doomed = delete(plan(store.url, rules(1)))
    next(doomed)
    store.run("new", 0, fingerprints={"factors": {"exact": "wanted"}, "directions": {"ekfac": "d-b"}})
    store.put("artifacts/factors/grown/more", "x", 0)
    list(doomed)
    for name in ("factors/wanted", "directions/d-b", "factors/grown"):
        assert store.there(f"artifacts/{name}")
    assert not store.there("artifacts/factors/f-b")


def test_a_run_whose_repair_was_interrupted_counts_as_the_complete_one_that_it_was(store: Store) -> None:
    store.run("broken", 5, complete=False, repairing=True)
    assert dropped(store, 1) == ["a", "b", "c", "d"], "it is the newest"
    assert dropped(store, 5) == []
    store.run("e", 1)
    assert dropped(store, 1) == ["a", "b", "broken", "c", "d"]
    store.put("runs/broken/receipts/7", "x", 0.1)  # somebody repairs it now
    assert dropped(store, 1) == ["a", "b", "c", "d"]


def test_a_run_that_is_created_or_resumed_while_others_are_deleted_stays(store: Store) -> None:
    store.run("idle", 40, complete=False)
    store.run("idling", 40, complete=False)
    born = "runs/new/.run.json.0.partial"  # so a folder looks a moment before its run.json is there
    store.put(born, "x", 0)
    pruning = plan(store.url, rules(4))
    assert {each.name for each in pruning.runs} == {"idle", "idling", "new"}
    store.put("runs/new/run.json", {"schema_version": 1, "complete": False}, 0)
    store.put("runs/idle/receipts/7", "x", 0)
    assert [each.name for each in delete(pruning) if "run" in each.kind] == ["idling"]
    assert store.there("runs/new")
    assert store.there("runs/idle")
    assert store.there("artifacts/factors/f-idle")


def test_whatever_a_complete_run_lists_stays_with_it(store: Store) -> None:
    store.artifact("averages", "mean", 100)
    store.artifact("retrained", "models", 100)
    store.run("e", 5, artifacts=["averages/mean", "retrained/models"])
    assert plan(store.url, rules(5)).all == ()


@pytest.mark.parametrize("kept", [1, 2])
def test_killed_at_any_moment_it_leaves_every_run_whole_and_the_next_finishes(
    store: Store, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each deletion of an object in turn is the last one before the kill."""
    expected = None
    original, count = os.unlink, [0]

    class Killed(BaseException):
        pass

    def unlink(*arguments: object, **options: object) -> None:
        count[0] -= 1
        if count[0] < 0:
            raise Killed
        original(*arguments, **options)  # type: ignore[arg-type]

    objects = sum(each.objects for each in plan(store.url, rules(kept)).all)
    for moment in range(0, objects, 3):
        again = Store(f"{store.url}-{moment}")
        for name in store.names():
            again.put(name, json.loads(Path(f"{store.url.removeprefix('file://')}/{name}").read_text()), store.ages[name])
        count[0] = moment
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            with pytest.raises(Killed):
                list(delete(plan(again.url, rules(kept))))
        for run in "abcd":
            if f"runs/{run}/run.json" in again.names():
                assert {f"artifacts/factors/f-{run}/data", f"artifacts/factors/f-{run}/complete.json", f"runs/{run}/results.zarr/c/0",
                        "artifacts/factors/shared/data", f"artifacts/checkpoint/c-{run}/data"} <= again.names()  # fmt: skip
        for kind in ("factors", "directions", "checkpoint"):  # a marker means that all is there
            whole = {name.rpartition("/")[0] for name in again.names() if name.startswith(f"artifacts/{kind}") and "complete.json" in name}
            assert all(f"{folder}/data" in again.names() for folder in whole)
        list(delete(plan(again.url, rules(kept))))
        expected = expected or again.names()
        assert again.names() == expected
        assert {name.split("/")[1] for name in expected if name.startswith("runs/")} == set("abcd"[-kept:])


def test_a_run_that_cannot_be_read_stops_it_before_anything_is_deleted(store: Store) -> None:
    before = store.names()
    store.put("runs/c/run.json", [1], 100)
    with pytest.raises(InputError, match=r"runs/c/run.json is damaged, so what its run uses is not known"):
        plan(store.url, rules(1))
    store.put("runs/c/run.json", {"schema_version": 99}, 100)
    with pytest.raises(InputError, match="upgrade tda"):
        plan(store.url, rules(1))
    assert store.names() == before


def test_it_works_on_a_bucket(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Store(f"{moto_s3}/team")
    made.artifact("factors", "shared", 0)
    for run, age in {"a": 300, "b": 200}.items():
        made.run(run, age)
    later = Rules(1, None, DAY, datetime.now(UTC) + 10 * DAY)  # objects on a bucket are as old as they are
    found = plan(made.url, later)
    assert {each.name for each in found.all} == {"a", "f-a", "d-a", "c-a"}
    assert all(each.bytes > 0 for each in found.all)
    list(delete(found))
    assert {name.split("/")[1] for name in made.names() if name.startswith("runs/")} == {"b"}
    assert plan(made.url, later).all == ()


def test_the_command_says_what_would_go_and_then_what_went(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, before = store.url, store.names()
    assert cli.status(["prune", "--store", url, "--keep", "1", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "would drop 3 runs and 9 artifacts" in printed
    assert "1 complete run stays; nothing was deleted" in printed
    assert store.names() == before
    assert cli.status(["prune", "--store", url, "--keep", "1"]) == 0
    assert "dropped 3 runs and 9 artifacts" in capsys.readouterr().out
    assert cli.status(["prune", "--store", url, "--keep", "1"]) == 0
    assert f"nothing to drop in {url}: 1 complete run stays" in capsys.readouterr().out
    for words, said in {
        (): "give --keep 30, --older-than 90d or both",
        ("--older-than", "soon"): "is no age; write hours, days or weeks",
        ("--keep", "0"): "--keep",
    }.items():
        assert cli.status(["prune", "--store", url, *words]) == cli.BAD_INPUT
        assert said in capsys.readouterr().err
