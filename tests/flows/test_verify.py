"""`tda verify` finds every damaged or lost object of a run and of what it was computed from, and --repair brings the same bytes back."""

import json
import random
import shutil
from pathlib import Path

import fsspec
import pytest

import tda
from flows.cli import status
from tasks.verify import check
from tda import checksums, location
from tda.results import Run
from tests.flows.runs import CONFIG, attribute, objects, write_config

METHODS = CONFIG.replace("shard_size = 2", "shard_size = 8") + "[cluster]\nworkers = 1\n"


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory, single: str) -> Path:
    """A folder with a configuration and the store of its run, which is copied by whoever damages it."""
    folder = tmp_path_factory.mktemp("complete")
    config = write_config(folder / "config", METHODS)
    attribute(config, f"{folder}/store", single)
    return folder


@pytest.fixture
def store(complete: Path, tmp_path: Path) -> Path:
    shutil.copytree(complete / "store", tmp_path / "store")
    return tmp_path / "store"


def kept(store: Path | str) -> dict[str, bytes]:
    """Every object that is a result: nothing of how far a try had come or what it took."""
    passing = ("begun.json", "seconds.json")
    return {name: data for name, data in objects(str(store)).items() if "/receipts/" not in name and not name.endswith(passing)}


def faults(store: Path | str) -> list[str]:
    run = tda.open_run(store, next(iter(tda.list_runs(store)["run"])), incomplete=True)
    return [f"{each.folder}/{fault.name}: {fault.what}" for each in check(run) for fault in each.faults]


def damage(file: Path, rng: random.Random) -> str:
    """Spoil one object in one of three ways."""
    how, data = rng.choice(["flip", "cut", "lose"]), bytearray(file.read_bytes())
    if how == "lose":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    return how


def test_every_object_of_a_run_and_its_artifacts_is_covered(store: Path) -> None:
    run = tda.open_run(store)
    found = check(run)
    assert not [fault for each in found for fault in each.faults]
    assert not [each.note for each in found if each.note]
    markers = {"run.json", "checksums.json", "complete.json"}
    covered = sum(each.objects for each in found)
    assert covered == len([name for name in kept(store) if name.rpartition("/")[2] not in markers])
    assert {each.folder.split("/")[1] for each in found[1:]} == {"checkpoint", "factors", "directions"}


def test_each_single_damaged_object_is_found_by_its_name(store: Path) -> None:
    rng = random.Random(0)  # noqa: S311
    for name, whole in sorted(kept(store).items()):
        if name.endswith("run.json"):  # of that, the next test
            continue
        file = store / name
        damage(file, rng)
        said = faults(store)
        file.write_bytes(whole)
        assert [line for line in said if line.startswith(name)], (name, said)
    assert faults(store) == []


def test_a_changed_value_in_the_manifest_is_found_and_not_repaired(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next(store.glob("runs/*/run.json"))
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1', 1))
    assert status(["verify", "--store", str(store)]) == 1
    assert "  run.json: damaged" in capsys.readouterr().out
    assert status(["verify", "--repair", "--store", str(store)]) == 2
    assert "run.json is damaged, and with it the configuration" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 12))])
def test_what_is_damaged_is_named_and_repaired_to_the_same_bytes(
    complete: Path, store: Path, single: str, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    rng, before = random.Random(seed), kept(store)  # noqa: S311
    names = [name for name in before if not name.endswith("run.json")]
    spoilt = rng.sample(sorted(names), 3)
    for name in spoilt:
        damage(store / name, rng)
    run = next(iter(tda.list_runs(store)["run"]))
    assert status(["verify", run, "--store", str(store)]) == 1
    said = capsys.readouterr().out
    for name in spoilt:
        assert f"  {name.split('/', 3 if name.startswith('artifacts/') else 2)[-1]}: " in said
    assert f"mend     tda verify {run} --repair --store {store}" in said
    assert status(["verify", run, "--repair", "--store", str(store)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert kept(store) == before


def test_a_damaged_chunk_is_computed_again_alone(store: Path) -> None:
    run = tda.open_run(store)
    chunk = store / f"runs/{run.id}/results.zarr/influence/c/1/0/2"
    chunk.write_bytes(b"\0" + chunk.read_bytes()[1:])
    receipts = {file: file.stat().st_mtime_ns for file in store.glob("runs/*/receipts/scores/*.json")}
    fits = {file: file.stat().st_mtime_ns for file in store.glob("artifacts/**/*") if file.is_file()}
    assert status(["verify", "--repair", "--store", str(store)]) == 0
    again = [file.name for file, time in receipts.items() if file.stat().st_mtime_ns != time]
    assert again == ["000002-000000.json"]
    assert {file: file.stat().st_mtime_ns for file in fits} == fits


def test_a_run_from_before_checksums_is_told_and_not_failed(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tda.open_run(store)
    old = {key: value for key, value in run.manifest.items() if key not in ("checksums", "artifacts", "sha256")}
    (store / f"runs/{run.id}/run.json").write_text(json.dumps(old))
    assert status(["verify", "--store", str(store)]) == 0
    assert "written before checksums were kept" in capsys.readouterr().out


def test_deleted_directions_are_told_and_no_fault(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(store / "artifacts" / "directions")
    assert status(["verify", "--store", str(store)]) == 0
    assert "gone; the run opens without it" in capsys.readouterr().out


def test_a_run_whose_data_changed_is_not_repaired_and_nothing_is_deleted(
    complete: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tda.open_run(store)
    manifest = json.loads((store / f"runs/{run.id}/run.json").read_text())
    manifest["fingerprints"]["train_data"] = "other"
    manifest = checksums.signed(manifest)
    (store / f"runs/{run.id}/run.json").write_text(json.dumps(manifest))
    (store / f"runs/{run.id}/results.zarr/influence/c/1/0/2").write_bytes(b"")
    before = objects(str(store))
    assert status(["verify", "--repair", "--store", str(store)]) == 2
    assert "cannot be repaired: its train data changed" in capsys.readouterr().err
    assert objects(str(store)) == before


def test_a_repair_that_was_killed_is_finished_by_the_same_command(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import repair

    before, run = kept(store), tda.open_run(store)
    (store / f"runs/{run.id}/results.zarr/influence/c/1/0/2").unlink()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(repair, "mend", killed)
        assert status(["verify", "--repair", "--store", str(store)]) == 130
    assert not tda.list_runs(store)["complete"].any(), "a reader sees no half-repaired run"
    assert status(["verify", run.id, "--store", str(store)]) == 1
    assert status(["verify", run.id, "--repair", "--store", str(store)]) == 0
    assert kept(store) == before


def test_what_is_made_again_to_other_bytes_is_told(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on another machine: its marker tells of other bytes than are computed here; also where the repair is killed in between."""
    from flows import repair

    marker = next(store.glob("artifacts/factors/*/complete.json"))
    stored = json.loads(marker.read_text())
    name = next(iter(stored["objects"]))
    stored["objects"][name][1] = "0" * 64
    marker.write_text(json.dumps(checksums.signed(stored)))
    run = tda.open_run(store)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(repair, "mend", killed)
        assert status(["verify", "--repair", "--store", str(store)]) == 130
    capsys.readouterr()
    assert status(["verify", run.id, "--repair", "--store", str(store)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(f"artifacts/factors/{marker.parent.name}: made again, and its bytes are others")
    assert faults(store) == []


def test_a_run_on_s3_is_verified_and_repaired_alike(complete: Path, moto_s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    fs, url = fsspec.filesystem("s3", use_listings_cache=False), f"{moto_s3}/store"
    fs.put(f"{complete}/store", url, recursive=True)
    run: Run = tda.open_run(url)
    chunk = f"{run.url}/results.zarr/influence/c/2/0/1"
    whole = location.read_bytes(chunk)
    fs.pipe_file(chunk, whole[:-1] + bytes([whole[-1] ^ 1]))
    assert status(["verify", "--store", url]) == 1
    assert "results.zarr/influence/c/2/0/1: damaged: its bytes have changed" in capsys.readouterr().out
    assert status(["verify", "--repair", "--workers", "1", "--store", url]) == 0
    assert location.read_bytes(chunk) == whole


def test_a_run_of_candidates_is_repaired_alike(tmp_path: Path, single: str) -> None:
    chosen = "[candidates]\nrandom = 4\n"
    config = write_config(tmp_path / "config", METHODS.replace("[cluster]", f"{chosen}[cluster]"))
    store = tmp_path / "store"
    attribute(config, str(store), single)
    before = kept(store)
    for name in [name for name in before if "/candidate_" in name and "/c/" in name and "/runs/" in f"/{name}"]:
        (store / name).unlink()
    assert faults(store)
    assert status(["verify", "--repair", "--store", str(store)]) == 0
    assert kept(store) == before
