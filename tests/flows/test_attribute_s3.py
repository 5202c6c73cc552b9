"""Whole runs on object storage: quick on moto's server, and on a real one (Ceph radosgw), also when killed."""

import time
from pathlib import Path

import pytest
from s3fs import S3FileSystem

import tda
from tda import location
from tda.results import Run
from tda.s3 import PatientS3
from tests.conftest import forget_s3
from tests.flows.runs import CONFIG, attribute, command, digests, finished, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "config", CONFIG.replace("shard_size = 2", "shard_size = 8").replace("query_block = 3", "") + "[cluster]\nworkers = 1\n"
    )


@pytest.fixture
def on_disk(config: Path, cluster: str, tmp_path: Path) -> Run:
    return attribute(config, f"{tmp_path}/store", cluster)[1]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of everything that is read from S3 from now on."""
    sizes: list[int] = []
    original = PatientS3._cat_file

    async def counting(self: PatientS3, *arguments: object, **options: object) -> bytes:
        data = await original(self, *arguments, **options)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(PatientS3, "_cat_file", counting)
    return sizes


def proved(config: Path, bucket: str, on_disk: Run, capsys: pytest.CaptureFixture[str]) -> str:
    """A run on S3 and a second one that reuses it, both by workers that know S3 from the environment alone; the store's URL."""
    store = f"{bucket}/team/store"
    _, run = attribute(config, store)
    assert digests(run) == digests(on_disk)
    assert tda.list_runs(store)["complete"].tolist() == [True]
    assert not [
        name for name in location.list_names(f"{store}/artifacts/factors") if location.exists(f"{store}/artifacts/factors/{name}/partial")
    ]
    summary, again = attribute(config, store)
    assert summary.reused == ["checkpoint", "factors (sampled)", "factors (exact)", "directions"]
    assert digests(again) == digests(on_disk)
    assert len(tda.list_runs(store)) == 2
    for word in ("testkey", "testsecret"):
        assert word not in location.read_bytes(f"{run.url}/run.json").decode() + location.read_bytes(f"{run.url}/report.html").decode()
        assert word not in "".join(capsys.readouterr())
    return store


def test_a_run_on_s3_has_the_bytes_of_one_on_disk_and_is_reused(
    config: Path, on_disk: Run, moto_s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    proved(config, moto_s3, on_disk, capsys)


@pytest.mark.s3
def test_a_run_on_a_real_s3_server_has_the_bytes_of_one_on_disk_and_is_reused(
    config: Path, on_disk: Run, rgw_s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    proved(config, rgw_s3, on_disk, capsys)


@pytest.mark.s3
def test_one_row_of_influence_on_a_real_s3_server_is_read_without_the_rest(
    config: Path, cluster: str, rgw_s3: str, tmp_path: Path, fetched: list[int]
) -> None:
    large = (
        "problem_options={examples=4000, queries=64}",
        "shard_size=500",
        "query_block=8",
        'methods=[{name="graddot"}, {name="gradcos"}]',
    )
    _, run = attribute(config, f"{rgw_s3}/store", "cluster.workers=1", *large)
    whole = S3FileSystem().du(f"{run.url}/results.zarr".removeprefix("s3://"))
    assert whole > 1_500_000
    forget_s3()
    del fetched[:]
    row = tda.open_run(f"{rgw_s3}/store").influence.loc["gradcos", 17].values
    assert row.shape == (4000,)
    # Eight chunks of one method, eight queries and 500 examples, the coordinates and the metadata.
    assert sum(fetched) < 8 * 8 * 500 * 4 + 64_000
    assert len(fetched) < 20


@pytest.mark.s3
def test_a_run_killed_on_a_real_s3_server_is_resumed_with_the_same_bytes(
    config: Path, on_disk: Run, rgw_s3: str, prefect_api: None
) -> None:
    store, fs = f"{rgw_s3}/store", S3FileSystem(use_listings_cache=False)
    for target in (4, 18, 40):
        process = command("run", config, "--store", store)
        end = time.monotonic() + 60
        while process.poll() is None and len(fs.find(store)) < target:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.kill()
        process.communicate()
    time.sleep(1)  # what the orphaned workers still have in hand
    status, _, err = finished(command("run", config, "--store", store))
    assert status == 0, err
    assert len(tda.list_runs(store)) == 1
    assert digests(tda.open_run(store)) == digests(on_disk)
    uploads = fs.call_s3("list_multipart_uploads", Bucket=rgw_s3.removeprefix("s3://"))
    assert not uploads.get("Uploads"), "nothing dangles"
