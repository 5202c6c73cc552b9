"""Workers are looked at before they are given anything: what runs there has to be what runs here."""

import asyncio
import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from infra.cluster_spec import ClusterError

if TYPE_CHECKING:
    from distributed import Client, Worker

#: By name, what has to be the same everywhere.
Standing = Callable[[], Mapping[str, str]]


@contextmanager
def admitted(client: "Client", standing: Standing | None) -> Iterator[None]:
    """Look at every worker of a cluster, and let those that join during the block be looked at as they do.

    Raises:
        ClusterError: a worker cannot import what it needs, or has another version of it.
    """
    from infra.gate import Gate

    if standing is None:
        client.run(exit_quickly, on_error="return")
        yield
        return
    here = dict(standing())
    for worker, found in sorted(client.run(looked_at, standing, here, on_error="return").items()):
        if isinstance(found, BaseException):
            raise ClusterError(f"worker {worker} cannot start: {said(found)}; install the same there as here")
        if found:
            raise ClusterError(f"worker {worker} {found}; make them the same, and start the run again")
    gate = f"tda-{client.id}"
    client.register_plugin(Gate(client.id, standing, here), name=gate)
    try:
        yield
    finally:
        with suppress(Exception):  # where the scheduler is gone, so is its gate
            client.unregister_worker_plugin(gate)


def check_threads(client: "Client") -> None:
    """Look at how workers that others started divide their hosts.

    Raises:
        ClusterError: a worker computes several shards in one process, or the workers of a host have more threads between them than it
            has processors.
    """
    found: Mapping[str, Any] = client.run(_threads, on_error="return")
    hosts: dict[str, list[tuple[int, int]]] = {}
    for worker, seen in sorted(found.items()):
        if isinstance(seen, BaseException):
            raise ClusterError(f"worker {worker} cannot start: {said(seen)}; install the same there as here")
        host, processors, shards, threads = seen
        if shards > 1:
            raise ClusterError(f"worker {worker} computes {shards} shards at once in one process; start it with --nthreads 1")
        hosts.setdefault(host, []).append((threads, processors))
    for host, workers in hosts.items():
        _check_host(host, workers)


def exit_quickly() -> None:
    """Let this process end without a last garbage collection, which takes seconds once torch and its like are imported."""
    atexit.register(gc.freeze)


async def looked_at(standing: Standing, here: Mapping[str, str]) -> str:
    """The same as `examined`, in a thread, since imports take seconds: a worker that is silent for long is given up."""
    return await asyncio.to_thread(examined, standing, here)


def examined(standing: Standing, here: Mapping[str, str]) -> str:
    """What of a worker is not as it is where the run was started; empty where all is."""
    exit_quickly()
    there = standing()
    others = {name: there.get(name, "nowhere") for name, value in here.items() if there.get(name) != value}
    wrong = [f"has {name} {value} where this process has {here[name]}" for name, value in others.items()]
    return " and ".join(wrong)


def _threads(dask_worker: "Worker") -> tuple[str, int, int, int]:
    """A worker's host, the host's processors, shards at a time, and the threads of each."""
    torch = sys.modules.get("torch")
    processors = os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = torch.get_num_threads() if torch else int(asked) if asked.isdecimal() else processors
    return dask_worker.ip, processors, dask_worker.state.nthreads, threads


def _check_host(host: str, workers: Sequence[tuple[int, int]]) -> None:
    """Several workers with several threads each are slow where they are more than the processors; one alone takes what there is."""
    wanted, processors = sum(threads for threads, _ in workers), workers[0][1]
    if len(workers) > 1 and wanted > max(processors, len(workers)):
        raise ClusterError(
            f"the {len(workers)} workers on {host} have {wanted} threads for {processors} processors, and would wait for each other; "
            f"start them with OMP_NUM_THREADS={max(1, processors // len(workers))}"
        )


def said(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
