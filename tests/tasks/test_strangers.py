"""Objects that belong to nothing are told and left alone; measurements after retraining carry checksums."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra import storage
from tasks import checksums, prune, retraining, verify
from tasks.retraining import pieces, plan, retrain_piece
from tda import location
from tests.flows.runs import objects
from tests.tasks.test_retraining import job, run, spec, store

__all__ = ["spec", "store"]  # fixtures


@pytest.fixture
def artifact(tmp_path: Path) -> str:
    url = f"file://{tmp_path}/pruned/artifacts/directions/abc"
    storage.write_bytes(f"{url}/queries-000000.safetensors", b"x")
    checksums.complete(url, {"queries": 1})
    return url


def test_what_neither_sums_nor_a_try_of_it_name_is_a_stranger(artifact: str) -> None:
    for name in ("seconds.json", "state-0.json", "partial/3/x", "receipts/1.json", ".x.partial"):
        storage.write_bytes(f"{artifact}/{name}", b"x")
    sums = json.loads(location.read_bytes(f"{artifact}/complete.json"))["objects"]
    assert checksums.strangers(artifact, sums) == []
    for name in ("notes.txt", "factors.zarr/c/9", ".hidden"):
        storage.write_bytes(f"{artifact}/{name}", b"x")
    assert checksums.strangers(artifact, sums) == [".hidden", "factors.zarr/c/9", "notes.txt"]


def test_prune_deletes_no_object_that_it_does_not_know(artifact: str) -> None:
    store = artifact.rpartition("/artifacts/")[0]
    rules = prune.Rules(1, None, timedelta(0), datetime.now(UTC) + timedelta(days=1))
    planned = prune.plan(store, rules)
    assert [doomed.name for doomed in planned.artifacts] == ["abc"]
    storage.write_bytes(f"{artifact}/notes.txt", b"mine")
    before = objects(store)
    assert list(prune.delete(planned)) == []
    again = prune.plan(store, rules)
    assert again.artifacts == ()
    assert again.notes == ("directions abc stays: it holds notes.txt, which tda did not write; move that away, and prune again",)
    assert objects(store) == before
    storage.delete(f"{artifact}/notes.txt")
    assert [doomed.name for doomed in prune.delete(prune.plan(store, rules))] == ["abc"]
    assert not objects(store)


def checked(planned: retraining.RetrainJob, store: str) -> verify.Checked:
    return verify._check_artifact(store, planned.folders[0].partition("/artifacts/")[2])


def test_a_damaged_measurement_after_retraining_is_named_and_trained_again_alone(spec: str, store: str) -> None:
    planned = plan(store, job(spec, alphas=(0.3,)))
    run(planned)
    found = checked(planned, store)
    assert (found.faults, found.note, found.strangers) == ((), "", ())
    assert found.objects == 1
    before = objects(planned.folders[0])
    (name,) = (name for name in before if name.endswith(".safetensors"))
    data = bytearray(before[name])
    data[-1] ^= 1
    storage.write_bytes(f"{planned.folders[0]}/{name}", bytes(data))
    found = checked(planned, store)
    assert [(fault.name, fault.what) for fault in found.faults] == [(name, "damaged: its bytes have changed")]

    asked = plan(store, job(spec, alphas=(0.3,), seeds=2))  # another question, which would have taken the damaged values
    retraining.create(asked)
    with pytest.raises(ArithmeticError, match="its bytes have changed"):
        retraining.finish(asked)
    assert not location.exists(f"{planned.folders[0]}/{name}")
    run(asked)
    verify.take_away(store, found)
    assert checked(planned, store).faults == ()


def test_measurements_without_a_checksum_are_read_and_said_to_be_unchecked(spec: str, store: str) -> None:
    planned = plan(store, job(spec, alphas=(0.3,)))
    retraining.create(planned)
    (piece,) = pieces(planned)
    retrain_piece(piece)
    told = location.read_json(piece.receipt)
    storage.write_json(piece.receipt, {"seconds": told["seconds"], "models": told["models"]})
    found = checked(planned, store)
    assert (found.faults, found.note) == ((), "1 of 1 objects carry no checksum: not checked")
    retraining.finish(planned)
    storage.write_bytes(piece.receipt, b"{")
    assert [(fault.name, fault.what) for fault in checked(planned, store).faults] == [(piece.receipt.rpartition("/")[2], "damaged")]
    verify.take_away(store, checked(planned, store))
    assert location.exists(piece.url), "the measurements may be intact"
