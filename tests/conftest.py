"""Fixtures that every part of the tests may use: two S3 servers, one quick and mocked, one real."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

RGW_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the mathematics, which starts no server and no cluster; and of the rest, what one process runs, since it shares what it starts.

    That is a file, whose fixtures are for all its tests; and all that needs the real S3 server, which takes long to start.
    """
    for item in items:
        path, real = item.path.relative_to(item.config.rootpath), item.get_closest_marker("s3") is not None
        if "tda" in path.parts and not real:
            item.add_marker("pure")
        elif item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group("s3" if real else str(path)))


@pytest.fixture
def moto_s3(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on moto's server: quick, right about conditional writes, but it checks no credentials."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # where Prefect is imported, it would print each request
    use_s3(monkeypatch, moto_server)
    yield new_bucket()
    forget_s3()


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """The endpoint of moto's server, in this process, for the test session."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def rgw_s3(rgw_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on a real S3 server, which checks credentials; a test that uses it is marked s3."""
    use_s3(monkeypatch, rgw_server)
    yield new_bucket()
    forget_s3()


@pytest.fixture(scope="session")
def rgw_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a Ceph radosgw that lives as long as the test session."""
    if no_rgw():
        pytest.skip(f"no real S3 server: {no_rgw()}")
    folder = tmp_path_factory.mktemp("rgw")
    port, monitor_port = free_ports(2)
    script = Path(__file__).with_name("rgw_up.sh")
    log = folder / "start.log"
    try:
        # Into a file, not a pipe: the daemons keep what they inherit open, and a pipe would never end.
        with log.open("wb") as output:
            start = subprocess.run([script, folder, str(port), str(monitor_port)], stdout=output, stderr=output, timeout=200, check=False)
        assert start.returncode == 0, f"radosgw did not start:\n{log.read_text()}"
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_daemons(folder)


def no_rgw() -> str:
    """Why there can be no radosgw here; empty where there can."""
    missing = [program for program in RGW_PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: ceph-mon ceph-osd ceph-common radosgw)"
    return "" if os.geteuid() == 0 else "Ceph's daemons need root"


def use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Point this process, and those it starts, at a server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    forget_s3()


def forget_s3() -> None:
    """Drop the file systems that remember another server."""
    from s3fs import S3FileSystem
    from zarr.core.sync import sync

    from tda.s3 import PatientS3

    for kind in (S3FileSystem, PatientS3):
        for filesystem in list(kind._cache.values()):
            # s3fs closes its own connections when it is dropped, but not those that Zarr opened in its event loop.
            if filesystem.asynchronous and filesystem._s3 is not None:
                sync(filesystem._s3creator.__aexit__(None, None, None))
        kind.clear_instance_cache()


def new_bucket() -> str:
    from s3fs import S3FileSystem

    bucket = f"tda-{uuid.uuid4().hex[:12]}"
    S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def stop_daemons(folder: Path) -> None:
    """Stop what left a *.pid file: gently, then by force after ten seconds."""
    pids = [int(file.read_text()) for file in folder.glob("*.pid") if file.read_text().strip()]
    for pid in pids:
        send(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in pids:
        send(pid, signal.SIGKILL)


def send(pid: int, signal_number: int) -> None:
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
