"""Shards come back in order; what goes wrong on a worker is told in one line; nothing is left running."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from infra.cluster import ClusterError, ClusterSpec, ShardFailed, open_cluster, run_shards

ELSEWHERE: dict[str, Any] = {"processes": False, "host": "127.0.0.1", "protocol": "tcp", "dashboard_address": "127.0.0.1:0"}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with open_cluster(ClusterSpec(workers=2)) as opened:
        yield opened


def slow_square(x: int) -> int:
    time.sleep(0.02 * (5 - x))  # the first shards finish last
    return x * x


def fails_on_three(x: int) -> int:
    if x == 3:
        raise ValueError("three\nis not a shard")
    return x


def fails_once(folder: str) -> str:
    marker = Path(folder) / "tried"
    if not marker.exists():
        marker.touch()
        raise OSError("first try")
    return "second try"


def always_refuses(folder: str) -> str:
    with (Path(folder) / "tries").open("a") as log:
        log.write("x")
    raise LookupError("the user's to mend")


def dies_once(folder: str) -> str:
    marker = Path(folder) / "died"
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return "alive"


def always_dies(x: int) -> int:
    if x == 1:
        os._exit(1)
    return x


def dies_late(folder: str) -> str:
    time.sleep(0.3)  # by then the quick shards are done, here or on the other worker
    return dies_once(folder)


def environment(_: int) -> dict[str, str]:
    return dict(os.environ)


def test_results_come_in_the_order_of_the_shards_and_each_is_reported(client: Client) -> None:
    done: list[int] = []
    assert run_shards(client, slow_square, range(6), stage="squares", on_done=done.append) == [0, 1, 4, 9, 16, 25]
    assert sorted(done) == [0, 1, 2, 3, 4, 5]
    assert run_shards(client, slow_square, [], stage="none") == []


def test_the_same_shards_are_computed_again_when_asked_again(client: Client, tmp_path: Path) -> None:
    first, second = (run_shards(client, time_of, [0], stage="time") for _ in range(2))
    assert first != second


def time_of(_: int) -> float:
    return time.monotonic()


def test_a_shard_that_raises_is_named_with_what_it_raised(client: Client) -> None:
    with pytest.raises(ShardFailed) as caught:
        run_shards(client, fails_on_three, range(6), stage="score", retries=1)
    assert str(caught.value) == "stage 'score', shard 3: ValueError: three is not a shard"
    assert (caught.value.stage, caught.value.shard) == ("score", 3)
    assert isinstance(caught.value.cause, ValueError)


def test_a_shard_that_raises_once_is_tried_again(client: Client, tmp_path: Path) -> None:
    assert run_shards(client, fails_once, [str(tmp_path)], stage="fit") == ["second try"]


def test_a_worker_that_is_killed_costs_nothing_but_time(client: Client, tmp_path: Path) -> None:
    assert run_shards(client, dies_once, [str(tmp_path)], stage="fit") == ["alive"]


def test_results_of_a_worker_that_dies_later_are_not_lost(client: Client, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / str(i)).mkdir()
    folders = [str(tmp_path / str(i % 3)) for i in range(8)]
    assert run_shards(client, dies_late, folders, stage="fit") == ["alive"] * 8


def test_a_shard_that_kills_every_worker_is_told_apart(client: Client) -> None:
    # Dask may blame a shard that waited on the same worker.
    with pytest.raises(ShardFailed, match=r"stage 'fit', shard [0-2]: every worker that ran it died \(out of memory"):
        run_shards(client, always_dies, range(3), stage="fit")
    assert run_shards(client, slow_square, [2], stage="after") == [4], "the cluster survives it"


def test_workers_get_the_threads_asked_for_and_the_environment_of_this_process_is_put_back(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    (seen,) = run_shards(client, environment, [0], stage="environment")
    assert [seen[name] for name in names] == ["1", "1", "1"], "one each, where nothing is asked for"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with open_cluster(ClusterSpec(workers=1, threads=3)) as other:
        (seen,) = run_shards(other, environment, [0], stage="environment")
        assert [seen[name] for name in names] == ["3", "3", "3"]
        info = other.scheduler_info(n_workers=-1)
        assert [worker["nthreads"] for worker in info["workers"].values()] == [1]
    assert dict(os.environ) == before


def test_workers_are_not_profiled(client: Client) -> None:
    # The profiler deadlocks one in some hundreds of them.
    assert run_shards(client, profiled, range(4), stage="profile") == [False] * 4


def profiled(_: int) -> bool:
    import dask
    from distributed import get_worker

    return bool(dask.config.get("distributed.worker.profile.enabled")) or "profile" in get_worker().periodic_callbacks


def test_clusters_one_after_another_start_and_stop_silently_and_completely(tmp_path: Path) -> None:
    """In a process that has not imported Dask before, and after the first cluster still knows Dask's defaults."""
    script = tmp_path / "main.py"
    script.write_text(
        "from infra.cluster import ClusterSpec, open_cluster, run_shards\n"
        "if __name__ == '__main__':\n"
        "    for workers in (2, 1):\n"
        "        with open_cluster(ClusterSpec(workers=workers)) as client:\n"
        "            assert run_shards(client, str, range(4), stage='text') == ['0', '1', '2', '3']\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_cluster_elsewhere_is_used_by_its_address() -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, **ELSEWHERE) as elsewhere:
        with open_cluster(ClusterSpec(kind="address", address=elsewhere.scheduler_address)) as client:
            assert run_shards(client, slow_square, [3], stage="squares") == [9]
        assert len(elsewhere.workers) == 1, "it is not ours to stop"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "not an address", ""])
def test_an_address_that_does_not_answer_is_refused_in_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDA_CONNECT_TIMEOUT", "1")
    with (
        pytest.raises(ClusterError, match="no Dask scheduler answers") as caught,
        open_cluster(ClusterSpec(kind="address", address=address)),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_scheduler_without_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDA_CONNECT_TIMEOUT", "1")
    with LocalCluster(n_workers=0, **ELSEWHERE) as elsewhere:
        spec = ClusterSpec(kind="address", address=elsewhere.scheduler_address)
        with pytest.raises(ClusterError, match="has no workers"), open_cluster(spec):
            pass


def test_what_no_other_try_would_mend_is_not_tried_again(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ShardFailed, match="shard 0: LookupError: the user's to mend") as caught:
        run_shards(client, always_refuses, [str(tmp_path)], stage="scores", final=(LookupError,))
    assert isinstance(caught.value.cause, LookupError)
    assert (tmp_path / "tries").read_text() == "x"
