"""A write is whole or absent, on a file system, on moto and on a real S3 server alike."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from infra import storage
from infra.storage import StoreError, check_store, create_once, delete, delete_tree, write_bytes, write_json


@pytest.fixture(params=["file", "moto", pytest.param("rgw", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return request.getfixturevalue(f"{request.param}_s3") + "/store"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDA_STORAGE_WAIT", "0.001")
    monkeypatch.setenv("TDA_CONNECT_TIMEOUT", "3")


def read(url: str) -> bytes:
    protocol, path = storage.split(url)
    return fsspec.filesystem(protocol).cat_file(path)


def exists(url: str) -> bool:
    protocol, path = storage.split(url)
    return fsspec.filesystem(protocol, use_listings_cache=False).exists(path)


def test_what_is_written_is_read_back_and_replaced_whole(store: str) -> None:
    write_bytes(f"{store}/a/b", b"first, and longer")
    write_bytes(f"{store}/a/b", b"second")
    write_bytes(f"{store}/a/empty", b"")
    assert read(f"{store}/a/b") == b"second"
    assert read(f"{store}/a/empty") == b""


def test_json_is_utf8_and_refuses_what_is_not_json(store: str) -> None:
    write_json(f"{store}/run.json", {"größe": [1, 2.5, None]})
    assert json.loads(read(f"{store}/run.json")) == {"größe": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(f"{store}/nan.json", {"x": float("nan")})
    assert not exists(f"{store}/nan.json")


def test_of_racing_creators_exactly_one_wins(store: str) -> None:
    barrier = threading.Barrier(8)

    def create(i: int) -> bool:
        barrier.wait()
        return create_once(f"{store}/lock", f"{i}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert read(f"{store}/lock") == str(won.index(True)).encode()
    assert not create_once(f"{store}/lock", str(won.index(True)).encode()), "equal bytes do not make a second winner"


def test_delete_removes_and_does_not_mind_absence(store: str) -> None:
    for name in ("x/1", "x/y/2", "z"):
        write_bytes(f"{store}/{name}", b"1")
    delete(f"{store}/x/1")
    delete(f"{store}/x/1")
    assert not exists(f"{store}/x/1")
    assert exists(f"{store}/x/y/2")
    delete_tree(f"{store}/x")
    delete_tree(f"{store}/x")
    assert not exists(f"{store}/x/y/2")
    assert exists(f"{store}/z")


def test_check_accepts_a_usable_store_and_leaves_nothing_behind(store: str) -> None:
    check_store(store)
    assert not exists(store)
    write_bytes(f"{store}/a", b"1")
    check_store(store)
    protocol, path = storage.split(store)
    assert [name.rpartition("/")[2] for name in fsspec.filesystem(protocol, use_listings_cache=False).ls(path, detail=False)] == ["a"]


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "file:///"])
def test_a_whole_bucket_or_file_system_is_never_deleted(url: str) -> None:
    with pytest.raises(StoreError, match="never deleted"):
        delete_tree(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [("", "empty"), ("s3:b", "no bucket"), ("s3://", "no bucket"), ("gs://b/p", "gs"), ("http://x/y", "http"), ("s3://b/../c", "meaning")],
)
def test_an_url_that_names_no_store_is_refused(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        check_store(url)
    assert "\n" not in str(caught.value)


def test_credentials_in_an_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(StoreError, match="credentials") as caught:
        check_store("s3://key:secret@bucket/prefix")
    assert "secret@" not in str(caught.value)


def test_a_store_without_parent_or_below_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url, message in [
        (f"file:{tmp_path}/no/store", "does not exist; create it"),
        (f"file:{tmp_path}/file", "is not a folder"),
        (f"file:{tmp_path}/file/store", "is not a folder"),
        ("file:/proc/store", "cannot write to /proc"),
    ]:
        with pytest.raises(StoreError, match=message) as caught:
            check_store(url)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot write"):
        check_store(f"file:{tmp_path}")


def test_an_absent_bucket_is_named(moto_s3: str) -> None:
    with pytest.raises(StoreError, match=r'bucket "nowhere-at-all" does not exist; create it'):
        check_store("s3://nowhere-at-all/prefix")


def test_an_endpoint_that_does_not_answer_is_named(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage._s3().clear_instance_cache()
    with pytest.raises(StoreError, match=r"no answer from S3 at http://127\.0\.0\.1:9 .*check AWS_ENDPOINT_URL") as caught:
        check_store("s3://bucket/prefix")
    assert "\n" not in str(caught.value)
    assert "testsecret" not in str(caught.value)


def test_missing_credentials_are_named(moto_s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage._s3().clear_instance_cache()
    with pytest.raises(StoreError, match="no S3 credentials; set AWS_ACCESS_KEY_ID"):
        check_store(f"{moto_s3}/prefix")


@pytest.mark.s3
def test_wrong_credentials_are_refused_without_showing_them(rgw_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    storage._s3().clear_instance_cache()
    with pytest.raises(StoreError, match="refuses access to bucket") as caught:
        check_store(f"{rgw_s3}/prefix")
    assert "wrong-secret" not in str(caught.value)


def test_transient_failures_are_retried_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[OSError] = []
    write = storage._replace_file

    def flaky(path: Path, data: bytes) -> None:
        if failures:
            raise failures.pop()
        write(path, data)

    monkeypatch.setattr(storage, "_replace_file", flaky)
    failures[:] = [TimeoutError("slow"), BlockingIOError(11, "busy"), ConnectionResetError("gone")]
    write_bytes(f"file:{tmp_path}/a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"

    failures[:] = [PermissionError(13, "no"), PermissionError(13, "no")]
    with pytest.raises(StoreError, match="no; choose another folder"):
        write_bytes(f"file:{tmp_path}/a", b"2")
    assert len(failures) == 1, "a refusal is not retried"

    failures[:] = [TimeoutError("slow")] * 9
    with pytest.raises(StoreError, match="slow"):
        write_bytes(f"file:{tmp_path}/a", b"2")
    assert len(failures) == 1, "eight attempts, then it fails"
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_creator_whose_answer_was_lost_still_knows_that_it_won(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage._put_new
    lost: list[bool] = []

    def loses_the_first_answer(path: str, data: bytes, creator: str) -> bool:
        won = real(path, data, creator)
        if not lost:
            lost.append(True)
            raise ConnectionResetError("answer lost")
        return won

    monkeypatch.setattr(storage, "_put_new", loses_the_first_answer)
    assert create_once(f"{moto_s3}/lock", b"1")
    assert not create_once(f"{moto_s3}/lock", b"1")


def test_a_write_that_breaks_leaves_the_old_object_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(f"file:{tmp_path}/a", b"old")

    def full(descriptor: int) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        write_bytes(f"file:{tmp_path}/a", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_readers_never_see_half_an_object(tmp_path: Path) -> None:
    url, stop = f"file:{tmp_path}/a", threading.Event()
    versions = [bytes([i]) * 300_000 for i in range(4)]
    write_bytes(url, versions[0])

    def look() -> bool:
        whole = True
        while not stop.is_set():
            whole &= (tmp_path / "a").read_bytes() in versions
        return whole

    with ThreadPoolExecutor(2) as pool:
        looks = [pool.submit(look) for _ in range(2)]
        for i in range(40):
            write_bytes(url, versions[i % 4])
        stop.set()
        assert all(each.result() for each in looks)


@pytest.mark.parametrize("write", ["write_bytes", "create_once"])
def test_a_writer_whose_temporary_file_another_process_sweeps_away_writes_again(tmp_path, monkeypatch, write):
    sync, swept = os.fsync, []

    def sweeping(descriptor):
        sync(descriptor)
        if len(swept) < 2:
            swept.append(storage.sweep(f"file://{tmp_path}"))

    monkeypatch.setattr(os, "fsync", sweeping)
    getattr(storage, write)(f"file://{tmp_path}/folder/object", b"data")
    assert len(swept) == 2
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["object"]
    assert (tmp_path / "folder" / "object").read_bytes() == b"data"


@pytest.mark.parametrize(("code", "again"), [("BadDigest", True), ("IncompleteBody", True), ("InvalidArgument", False)])
def test_a_body_that_was_damaged_on_its_way_is_sent_again_and_a_refusal_is_not(code: str, again: bool) -> None:
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    refused = ClientError({"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 400}}, "PutObject")
    assert storage.is_transient(translate_boto_error(refused)) is again
