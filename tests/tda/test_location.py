import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import zarr

from tda import location
from tda.errors import InputError
from tests.stored_run import put


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path):
    return f"file://{tmp_path}/store" if request.param == "file" else request.getfixturevalue("moto_s3") + "/prefix"


@pytest.mark.parametrize(
    ("url", "absolute"),
    [
        ("./store", "file:///srv/here/store"),
        ("store/", "file:///srv/here/store"),
        ("file:./store", "file:///srv/here/store"),
        ("file:store", "file:///srv/here/store"),
        ("file:/data/store/", "file:///data/store"),
        ("file:///data/a/../store", "file:///data/store"),
        ("file://localhost/data", "file:///data"),
        ("file:///with%20space", "file:///with%20space"),
        ("file:///with space", "file:///with space"),
        ("./a%20b", "file:///srv/here/a%20b"),
        ("/with space/100%25", "file:///with space/100%25"),
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://bucket//a///b", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
    ],
)
def test_a_url_becomes_absolute_and_stays_itself_when_resolved_again(url, absolute):
    assert location.resolve(url, "/srv/here") == absolute
    assert location.resolve(absolute) == absolute


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert location.resolve("~/store") == "file:///home/someone/store"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("http://host/x", "scheme 'http'"),
        ("gs://bucket", "scheme 'gs'"),
        ("memory:x", "scheme 'memory'"),
        ("s3://", "no bucket"),
        ("s3:bucket", "no bucket"),
        ("s3:///key", "no bucket"),
        ("s3://bucket/../other", "not of the form"),
        ("s3://bucket/x?versionId=1", "not of the form"),
        ("file://server/share", "host 'server'"),
        ("file:", "no folder"),
    ],
)
def test_an_unusable_url_is_refused_in_one_line(url, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        location.resolve(url)
    assert "\n" not in str(caught.value)


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(InputError, match="carries credentials") as caught:
        location.resolve("s3://AKIAKEY:secret@bucket/prefix")
    assert "secret" not in str(caught.value)
    assert "AKIAKEY" not in str(caught.value)


@pytest.mark.parametrize("part", ["..", "../other", "a/../../b", "/etc/passwd", "", "a//b", ".", "a\\b"])
def test_names_never_leave_their_store(part):
    with pytest.raises(InputError, match="cannot be a name below"):
        location.join("file:///store", "runs", part)


def test_parts_are_joined_with_single_slashes():
    assert location.join("s3://bucket/p", "runs", "a/b") == "s3://bucket/p/runs/a/b"
    assert location.join("file:///", "x") == "file:///x"


def test_objects_are_found_read_and_listed(store):
    put(f"{store}/runs/b/run.json", json.dumps({"n": 1}).encode())
    put(f"{store}/runs/a/run.json", b"[1]")
    put(f"{store}/runs/c/run.json", b'{"n": ')
    assert location.list_names(f"{store}/runs") == ["a", "b", "c"]
    assert location.list_names(f"{store}/absent") == []
    assert location.exists(f"{store}/runs/b")
    assert location.exists(f"{store}/runs/b/run.json")
    assert not location.exists(f"{store}/runs/absent")
    assert location.read_json(f"{store}/runs/b/run.json") == {"n": 1}
    assert location.read_json_many([f"{store}/runs/{name}/run.json" for name in ("absent", "b")]) == [None, {"n": 1}]
    assert location.read_json_many([]) == []
    with pytest.raises(FileNotFoundError):
        location.read_bytes(f"{store}/runs/absent/run.json")
    with pytest.raises(InputError, match="JSON list, not an object"):
        location.read_json(f"{store}/runs/a/run.json")
    with pytest.raises(InputError, match="is not JSON"):
        location.read_json(f"{store}/runs/c/run.json")
    damaged = [f"{store}/runs/{name}/run.json" for name in ("a", "b", "c")]
    assert location.read_json_many(damaged) == [{}, {"n": 1}, {}], "the damaged hide no other"


def test_a_listing_sees_what_another_process_added(store):
    put(f"{store}/runs/a/run.json", b"{}")
    assert location.list_names(f"{store}/runs") == ["a"]
    put(f"{store}/runs/b/run.json", b"{}")
    assert location.list_names(f"{store}/runs") == ["a", "b"]


def test_arrays_are_written_and_read_through_the_same_call(store):
    group = location.open_group(f"{store}/deep/results.zarr", "w")
    group.create_array("layers/0/x", shape=(4,), chunks=(2,), dtype="float32")[:] = np.arange(4)
    found = location.open_group(f"{store}/deep/results.zarr")["layers/0/x"]
    np.testing.assert_array_equal(found[:], np.arange(4))
    with pytest.raises(ValueError, match=r"read.only"):
        found[:] = 0
    assert list(location.open_group(f"{store}/deep/results.zarr", "w").array_keys()) == []


def test_an_absent_group_is_file_not_found(store):
    with pytest.raises(FileNotFoundError):
        location.open_group(f"{store}/absent.zarr")


def test_a_sealed_group_opens_with_all_metadata_and_writers_still_see_the_truth(store):
    group = location.open_group(f"{store}/x.zarr", "w")
    group.create_array("a", shape=(2,), dtype="float32")
    location.seal(f"{store}/x.zarr")
    assert location.open_group(f"{store}/x.zarr").metadata.consolidated_metadata is not None
    location.open_group(f"{store}/x.zarr", "r+").create_array("b", shape=(2,), dtype="float32")
    assert sorted(location.open_group(f"{store}/x.zarr", "r+").array_keys()) == ["a", "b"]
    assert sorted(location.open_group(f"{store}/x.zarr").array_keys()) == ["a"]


def test_string_arrays_need_no_warning(store):
    group = location.open_group(f"{store}/x.zarr", "w")
    group.create_array("method", shape=(2,), dtype="str", dimension_names=["method"])[:] = np.array(["ekfac", "graddot"])
    assert [str(label) for label in location.open_group(f"{store}/x.zarr")["method"][:]] == ["ekfac", "graddot"]


def test_a_failed_chunk_write_leaves_the_old_chunk_and_no_litter(tmp_path, monkeypatch):
    array = location.open_group(f"file://{tmp_path}/x.zarr", "w").create_array("a", shape=(2,), dtype="float32")
    array[:] = 1
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "replace", _disk_full)
    with pytest.raises(OSError, match="disk full"):
        array[:] = 2
    assert sorted(tmp_path.rglob("*")) == before
    np.testing.assert_array_equal(location.open_group(f"file://{tmp_path}/x.zarr")["a"][:], [1, 1])


def _disk_full(*_):
    raise OSError("disk full")


def test_processes_write_disjoint_chunks_of_one_array(tmp_path):
    url = f"file://{tmp_path}/x.zarr"
    location.open_group(url, "w").create_array("a", shape=(8,), chunks=(1,), dtype="int64", fill_value=-1)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_write_one, [(url, i) for i in range(8)])
    np.testing.assert_array_equal(location.open_group(url)["a"][:], np.arange(8))


def _write_one(url, i):
    array = location.open_group(url, "r+")["a"]
    assert isinstance(array, zarr.Array)
    array[i] = i


def test_a_relative_url_is_not_read():
    with pytest.raises(InputError, match="not an absolute"):
        location.read_bytes("./store/run.json")


def test_an_absent_bucket_holds_nothing(moto_s3):
    assert location.list_names("s3://no-such-bucket/x") == []
    with pytest.raises(FileNotFoundError):
        location.read_bytes("s3://no-such-bucket/x")


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    monkeypatch.setattr(LocalFileSystem, "cat_file", _refuse)
    with pytest.raises(InputError, match="may not be read"):
        location.read_bytes(f"file://{tmp_path}/run.json")


def _refuse(*_args, **_kwargs):
    raise PermissionError(13, "Permission denied")


def test_a_chunk_reaches_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    group = location.open_group(f"file://{tmp_path}/g", "w")
    array = group.create_array("x", shape=(4,), chunks=(4,), dtype="int64")
    steps, sync, rename = [], os.fsync, Path.replace

    def told_sync(descriptor):
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.rpartition(".")[2])
        sync(descriptor)

    def told_rename(self, target):
        steps.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", told_sync)
    monkeypatch.setattr(Path, "replace", told_rename)
    array[...] = 1
    assert steps == ["partial", "rename", "c"]
