"""A run on several hosts, over TLS and S3, outlives that one of them is cut off for a while."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from infra.cluster_spec import Tls
from tests.conftest import forget_s3, free_ports, new_bucket, use_s3
from tests.flows.runs import attribute, digests, reads, wait_until, write_config
from tests.hosts import Hosts, hosts

ROOT = Path(__file__).parents[2]
SCHEDULER, FIRST, SECOND = range(3)
# A host that says nothing for so long is given up; its shards go elsewhere.
PATIENCE = {
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "8s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",  # the least that Dask takes
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "10s",
}


@contextmanager
def dask_on(net: Hosts, tls: Tls, log: Path) -> Iterator[str]:
    """A scheduler and two workers, a host each; the scheduler's address."""
    environment = os.environ | PATIENCE | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    files = [f"--tls-ca-file={tls.ca}", f"--tls-cert={tls.cert}", f"--tls-key={tls.key}", "--protocol=tls", "--no-dashboard"]
    where = f"tls://{net.address(SCHEDULER)}:8786"
    python = [sys.executable, "-m"]
    scheduler = [*python, "distributed.cli.dask_scheduler", "--host", net.address(SCHEDULER), "--dashboard-address", "127.0.0.1:0", *files]
    started = []
    with log.open("wb") as into:
        try:
            started.append(net.start(SCHEDULER, scheduler, into, environment))
            for host in (FIRST, SECOND):
                worker = [*python, "distributed.cli.dask_worker", where, "--host", net.address(host), "--nthreads", "1", *files]
                # A worker that was given up ends; it is started again, as systemd or Kubernetes would.
                supervised = ["sh", "-c", f"while :; do {shlex.join(worker)}; sleep 0.2; done"]
                started.append(net.start(host, supervised, into, environment))
            yield where
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def net() -> Iterator[Hosts]:
    with hosts(3) as found:
        yield found


@pytest.fixture
def s3_for_all(net: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket that every host reaches."""
    (port,) = free_ports(1)
    server = ThreadedMotoServer(ip_address=net.here, port=port, verbose=False)
    server.start()
    use_s3(monkeypatch, f"http://{net.here}:{port}")
    yield new_bucket()
    forget_s3()
    server.stop()


@pytest.mark.soak
def test_a_host_is_cut_off_and_comes_back_and_the_run_has_the_same_bytes(
    net: Hosts, s3_for_all: str, tls: Tls, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traps = tmp_path / "traps"
    traps.mkdir()
    config = write_config(tmp_path)
    (tmp_path / "traps" / "reads.log").touch()
    problem = f'problem_options.traps="{traps}"'
    _, alone = attribute(config, str(tmp_path / "local"), cluster, problem)
    (traps / "reads.log").write_text("")
    (traps / "slow").touch()
    monkeypatch.setenv("TDA_CONNECT_TIMEOUT", "60")
    done = threading.Event()
    told: list[str] = []

    def cut() -> None:
        wait_until(lambda: len(reads(traps)) >= 20)
        net.cut_off(SECOND)
        told.append("cut off")
        time.sleep(12)  # long enough for the scheduler to give the host up, and give its shards to the other
        if not done.is_set():
            told.append("still running")
        net.restore(SECOND)

    cutter = threading.Thread(target=cut)
    with dask_on(net, tls, tmp_path / "dask.log") as where:
        over = f'cluster={{kind="address", address="{where}", tls={{ca="{tls.ca}", cert="{tls.cert}", key="{tls.key}"}}}}'
        cutter.start()
        try:
            _, run = attribute(config, s3_for_all, over, problem)
        except subprocess.SubprocessError:
            raise AssertionError((tmp_path / "dask.log").read_text()) from None
        finally:
            done.set()
            cutter.join()
        assert told == ["cut off", "still running"], (tmp_path / "dask.log").read_text()[-2000:]
        assert run.manifest["complete"]
        assert digests(run) == digests(alone)
