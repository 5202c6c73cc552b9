"""An artifact that is made again is lost at no moment: what is intact of it lies in its place or aside."""

from collections.abc import Callable
from pathlib import Path

import pytest

from infra import storage
from tasks import aside, checksums
from tests.flows.runs import objects

FOLDER = "artifacts/checkpoint/abc"
WHOLE = {"weights.safetensors": b"weights" * 9, "steps/1.safetensors": b"step", "trajectory.json": b"{}"}


@pytest.fixture
def store(tmp_path: Path) -> str:
    make(f"file://{tmp_path}")
    return f"file://{tmp_path}"


def make(store: str, **changed: bytes) -> None:
    for name, data in WHOLE.items():
        storage.write_bytes(f"{store}/{FOLDER}/{name}", changed.get(name.partition(".")[0], data))
    checksums.complete(f"{store}/{FOLDER}", {"seed": 0})


def spoil(store: str, name: str) -> None:
    storage.write_bytes(f"{store}/{FOLDER}/{name}", b"spoilt")


@pytest.mark.parametrize("name", [*WHOLE, "complete.json"])
def test_what_is_made_again_to_the_same_bytes_replaces_what_was_damaged(store: str, name: str) -> None:
    before = objects(store)
    spoil(store, name)
    aside.set_aside(store, FOLDER, [name])
    assert aside.pending(store, [FOLDER, "artifacts/other/x"]) == {FOLDER: [name]}
    make(store)
    assert aside.is_same(store, FOLDER, [name])
    aside.drop(store, FOLDER)
    assert objects(store) == before


@pytest.mark.parametrize("name", ["trajectory.json", "complete.json"])
def test_other_weights_are_noticed_and_everything_is_put_back_as_it_was(store: str, name: str) -> None:
    spoil(store, name)
    before = objects(store)
    aside.set_aside(store, FOLDER)
    assert not aside.is_same(store, FOLDER, [name]), "nothing is made yet"
    make(store, weights=b"others")
    assert not aside.is_same(store, FOLDER, [name])
    aside.put_back(store, FOLDER)
    assert objects(store) == before
    assert aside.pending(store, [FOLDER]) == {}


def test_what_is_damaged_of_what_was_set_aside_is_known_to_every_later_try(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(store, "weights.safetensors")
    aside.set_aside(store, FOLDER, ["weights.safetensors"])
    assert aside.set_aside(store, FOLDER, ["complete.json"]) == ["weights.safetensors"], "all is gone from its place: that is no damage"
    make(store, weights=b"others")
    with monkeypatch.context() as patch:
        patch.setattr(aside, "_copy", raising)
        with pytest.raises(KeyboardInterrupt):
            aside.put_back(store, FOLDER)
    assert aside.pending(store, [FOLDER]) == {FOLDER: ["weights.safetensors"]}
    assert aside.set_aside(store, FOLDER, ["complete.json"]) == ["weights.safetensors"]


def raising(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_kept_for_whoever_wants_it_concerns_no_later_repair(store: str) -> None:
    before = objects(store)
    aside.set_aside(store, FOLDER, ["weights.safetensors"])
    make(store, weights=b"others")
    aside.keep(store, FOLDER)
    assert aside.pending(store, [FOLDER]) == {}
    kept = {name.partition("/objects/")[2]: data for name, data in objects(f"{store}/aside").items() if "/objects/" in name}
    assert kept == {name.removeprefix(f"{FOLDER}/"): data for name, data in before.items()}


@pytest.mark.parametrize("step", [aside.set_aside, aside.put_back])
def test_killed_before_any_write_or_deletion_nothing_intact_is_lost_and_the_next_call_finishes(
    store: str, step: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(store, "trajectory.json")
    before = objects(store)
    intact = {data for name, data in before.items() if not name.endswith("trajectory.json")}
    done = {name: getattr(storage, name) for name in ("write_bytes", "write_json", "delete", "delete_tree")}
    for moment in range(40):
        left = moment

        def counted(name: str) -> Callable[..., object]:
            def run(*arguments: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return done[name](*arguments)

            return run

        if step is aside.put_back:
            aside.set_aside(store, FOLDER)
            make(store, weights=b"others")
        with monkeypatch.context() as patch:
            for name in done:
                patch.setattr(storage, name, counted(name))
            try:
                step(store, FOLDER)
            except KeyboardInterrupt:
                assert intact <= set(objects(store).values()), moment
        aside.set_aside(store, FOLDER)
        assert not objects(f"{store}/{FOLDER}")
        aside.put_back(store, FOLDER)
        assert objects(store) == before
        if left >= 0:
            return
    pytest.fail("it never came through")
