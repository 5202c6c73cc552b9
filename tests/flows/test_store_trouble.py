"""A store that is full, read-only or gone half way ends a run with one line; the same command goes on once it is mended."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import tda
from flows.attribute import RunFailed
from infra.cluster import ClusterSpec, open_cluster
from infra.cluster_spec import Tls
from tests.conftest import use_s3
from tests.faulty_proxy import proxied
from tests.flows.conftest import at_address
from tests.flows.runs import CONFIG, attribute, digests, write_config, written

SMALL = 300
GONE = r"(cannot be reached|no answer from S3|[Cc]onnection).*kept in s3://.*resumes it"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), CONFIG.replace("shard_size = 2", "shard_size = 8"))


@pytest.fixture(scope="module")
def undisturbed(config: Path, single: str) -> dict[str, str]:
    return digests(attribute(config, f"{config.parent}/undisturbed", single)[1])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of few blocks."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}k", "tda-test", folder], check=False).returncode:
        pytest.skip("a small file system needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remounted(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def test_a_store_that_is_full_half_way_says_so_and_the_run_goes_on_when_there_is_room(
    config: Path, undisturbed: dict[str, str], disk: Path, single: str
) -> None:
    with pytest.raises(RunFailed, match=r"the store is full: .*make room.*what is finished is kept in .*resumes it") as caught:
        attribute(config, f"{disk}/store", single)
    assert "\n" not in str(caught.value)
    kept = written(disk / "store")
    assert kept
    remounted(disk, "size=64m")
    _, run = attribute(config, f"{disk}/store", single)
    assert digests(run) == undisturbed


def test_a_store_that_becomes_read_only_half_way_says_so(
    config: Path, undisturbed: dict[str, str], single: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import scores

    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "results.zarr")

    with monkeypatch.context() as patch:
        patch.setattr(scores, "create_results", refused)
        with pytest.raises(RunFailed, match=r"the store has become read-only: .*make it writable.*resumes it") as caught:
            attribute(config, f"{tmp_path}/store", single)
        assert "\n" not in str(caught.value)
    assert digests(attribute(config, f"{tmp_path}/store", single)[1]) == undisturbed


def test_a_server_that_stops_half_way_ends_the_run_with_one_line_and_the_run_goes_on_when_it_is_back(
    config: Path, undisturbed: dict[str, str], moto_s3: str, tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDA_STORAGE_WAIT", "0.01")
    server = os.environ["AWS_ENDPOINT_URL"]
    with proxied(server, rate=0.0) as (url, proxy):
        use_s3(monkeypatch, url)
        with open_cluster(ClusterSpec(workers=1, tls=tls)) as client:  # it knows the server from its environment
            proxy.ends_after = 150
            with pytest.raises(RunFailed, match=GONE) as caught:
                attribute(config, f"{moto_s3}/store", at_address(client, tls))
            assert "\n" not in str(caught.value)
            proxy.ends_after = None
            _, run = attribute(config, f"{moto_s3}/store", at_address(client, tls))
    use_s3(monkeypatch, server)
    assert digests(run) == undisturbed
    assert len(tda.list_runs(f"{moto_s3}/store")) == 1
