"""Whole runs on object storage, also when killed: on a real server (Ceph radosgw) where there is one, else on moto's."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

import tda
from flows import cli
from infra.cluster import ClusterSpec, open_cluster
from infra.cluster_spec import Tls
from tda import location
from tda.results import Run
from tda.s3 import PatientS3
from tests.conftest import forget_s3, new_bucket, no_rgw, use_s3
from tests.flows.conftest import at_address
from tests.flows.processes import forked
from tests.flows.runs import CONFIG, attribute, digests, wait_until, write_config

pytestmark = pytest.mark.xdist_group("s3")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = CONFIG.replace("shard_size = 2", "shard_size = 8").replace("query_block = 3", "")
    return write_config(tmp_path_factory.mktemp("config"), text)


@pytest.fixture(scope="module")
def on_disk(config: Path, single: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return attribute(config, f"{tmp_path_factory.mktemp('on-disk')}/store", single)[1]


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("moto_server" if no_rgw() else "rgw_server")


@pytest.fixture(scope="module")
def workers(server: str, prefect_api: None, tls: Tls) -> Iterator[str]:
    """A worker that knows the server from its environment alone; the override that makes a run use it."""
    with pytest.MonkeyPatch.context() as patch:
        use_s3(patch, server)
        with open_cluster(ClusterSpec(workers=1, tls=tls)) as client:
            yield at_address(client, tls)
    forget_s3()


@pytest.fixture
def bucket(workers: str, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use_s3(monkeypatch, server)
    yield new_bucket()
    forget_s3()


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


def test_a_run_on_s3_has_the_bytes_of_one_on_disk_and_is_reused(
    config: Path, on_disk: Run, bucket: str, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"{bucket}/team/store"
    _, run = attribute(config, store, workers)
    assert digests(run) == digests(on_disk)
    assert tda.list_runs(store)["complete"].tolist() == [True]
    assert not [
        name for name in location.list_names(f"{store}/artifacts/factors") if location.exists(f"{store}/artifacts/factors/{name}/partial")
    ]
    summary, again = attribute(config, store, workers)
    assert summary.reused == ["checkpoint", "factors (sampled)", "factors (exact)", "directions"]
    assert digests(again) == digests(on_disk)
    assert len(tda.list_runs(store)) == 2
    for word in ("testkey", "testsecret"):
        assert word not in location.read_bytes(f"{run.url}/run.json").decode() + location.read_bytes(f"{run.url}/report.html").decode()
        assert word not in "".join(capsys.readouterr())


def test_one_row_of_influence_on_s3_is_read_without_the_rest(config: Path, bucket: str, workers: str, fetched: list[int]) -> None:
    large = (
        "problem_options={examples=1000, queries=64}",
        "shard_size=125",
        "query_block=16",
        'methods=[{name="graddot"}, {name="gradcos"}]',
    )
    _, run = attribute(config, f"{bucket}/store", workers, *large)
    whole = S3FileSystem().du(f"{run.url}/results.zarr".removeprefix("s3://"))
    assert whole > 400_000
    forget_s3()
    del fetched[:]
    row = tda.open_run(f"{bucket}/store").influence.loc["gradcos", 17].values
    assert row.shape == (1000,)
    # Eight chunks of one method, sixteen queries and 125 examples, the coordinates and the metadata.
    assert sum(fetched) < 8 * 16 * 125 * 4 + 64_000
    assert len(fetched) < 20


def test_a_run_killed_on_s3_is_resumed_with_the_same_bytes(
    config: Path, on_disk: Run, bucket: str, workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, fs = f"{bucket}/store", S3FileSystem(use_listings_cache=False)
    words = ("run", str(config), "--store", store, "--set", workers)
    for target in (4, 18, 40):
        process = forked(tmp_path / "run.log", *words)
        wait_until(lambda target=target, process=process: process.poll() is not None or len(fs.find(store)) >= target)  # type: ignore[misc]
        process.kill()
        process.communicate()
    time.sleep(1)  # what the workers still have in hand
    assert cli.status(list(words)) == 0, capsys.readouterr().err
    assert len(tda.list_runs(store)) == 1
    assert digests(tda.open_run(store)) == digests(on_disk)
    uploads = fs.call_s3("list_multipart_uploads", Bucket=bucket.removeprefix("s3://"))
    assert not uploads.get("Uploads"), "nothing dangles"
