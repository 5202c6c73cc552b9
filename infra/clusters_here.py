"""Clusters of worker processes on this machine. They listen on 127.0.0.1, and talk in TLS with certificates that end with them."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from infra.certificates import files
from infra.cluster_spec import ClusterError, ClusterSpec
from infra.shards import GPU

if TYPE_CHECKING:
    from distributed import Client

HOST = "127.0.0.1"
LOCAL_CONFIG = {
    # torch may hold the GIL longer than any heartbeat; a local worker that dies closes its connection anyway.
    "distributed.scheduler.worker-ttl": None,
    "distributed.comm.timeouts.connect": "60s",
    # The profiler calls sys._current_frames() every 10 ms, which in Python 3.11 can deadlock a worker for good (a garbage
    # collection inside that call, dask/distributed#8616): neither work nor its parent's death is noticed from then on.
    "distributed.worker.profile.enabled": False,
}
#: Of the scheduler: it always serves HTTP; with no dashboard, and on any free port, two runs on one machine do not meet.
SCHEDULER: dict[str, Any] = {"dashboard": False, "dashboard_address": f"{HOST}:0"}


@contextmanager
def local(spec: ClusterSpec) -> "Iterator[Client]":
    """A client of `spec.workers` processes."""
    with _quietly(spec) as listening:
        from distributed import Client, LocalCluster

        with (
            LocalCluster(
                n_workers=spec.workers,
                threads_per_worker=1,
                processes=True,
                host=HOST,
                dashboard_address=SCHEDULER["dashboard_address"],
                scheduler_kwargs={"dashboard": False},
                memory_limit=spec.memory_limit or "auto",
                silence_logs=logging.CRITICAL,
                protocol="tls://",
                security=_security(spec),
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            listening()
            yield client


@contextmanager
def cuda(spec: ClusterSpec) -> "Iterator[Client]":
    """A client of one process for each GPU, which sees no other; each offers one GPU to the shards.

    Raises:
        ClusterError: there is no GPU that torch can use.
    """
    devices = visible_devices()
    if not devices:
        raise ClusterError('cluster.kind = "cuda" finds no GPU that torch can use; `tda doctor` says why, or use cluster.kind = "local"')
    with _quietly(spec) as listening:
        from distributed import Client, Scheduler, SpecCluster

        security = _security(spec)
        scheduler = {"cls": Scheduler, "options": SCHEDULER | {"host": HOST, "port": 0, "protocol": "tls://", "security": security}}
        workers = cuda_workers(spec, devices, security)
        with (
            SpecCluster(workers, scheduler, security=security, silence_logs=logging.CRITICAL) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            client.wait_for_workers(len(devices))
            listening()
            yield client


def cuda_workers(spec: ClusterSpec, devices: list[str], security: Any) -> dict[str, Any]:
    """What starts each worker, by its name."""
    from distributed import Nanny
    from distributed.system import MEMORY_LIMIT

    common = {
        "nthreads": 1,
        "host": HOST,
        "protocol": "tls://",
        "security": security,
        "resources": {GPU: 1},
        "memory_limit": spec.memory_limit or MEMORY_LIMIT // len(devices),
        "silence_logs": logging.CRITICAL,
        "dashboard": False,
    }
    return {
        f"gpu-{device}": {"cls": Nanny, "options": common | {"env": {"CUDA_VISIBLE_DEVICES": device, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}}}
        for device in devices
    }


def visible_devices() -> list[str]:
    """The GPUs that a process started here may use, by what CUDA_VISIBLE_DEVICES calls them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(i) for i in range(count)])[:count]


def _security(spec: ClusterSpec) -> Any:
    """Certificates in memory alone, so that other users of this machine cannot send tasks to the workers; or those of `spec.tls`."""
    from distributed.security import Security

    return files(spec.tls) or Security.temporary()


@contextmanager
def _quietly(spec: ClusterSpec) -> Iterator[Callable[[], object]]:
    """The environment that workers are started in; what it gives lets this thread hear Ctrl-C again."""
    import dask
    import distributed  # noqa: F401 (its defaults have to be there: imported in the block below, they would be taken away at its end)

    with _environment_of_workers(spec.environment), dask.config.set(LOCAL_CONFIG), quiet_log(), _deaf_threads() as listening:
        yield listening


@contextmanager
def _environment_of_workers(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set what each numeric library reads when a worker imports it, and put back what was there.

    It has to be this process's own environment: there Dask looks first, and it writes its defaults there for good.
    """
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _deaf_threads() -> "Iterator[Callable[[], object]]":
    """Threads started in the block, and the processes that they start, never see Ctrl-C.

    A terminal sends it to every process of a command: workers would print tracebacks over the message of the one that ends the run.
    The calling thread hears it again once it calls the function given, or at the end of the block.
    """
    resource_tracker.ensure_running()  # starting it later would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def quiet_log() -> Iterator[None]:
    """Dask tells its log about every worker that stops; errors reach the user as exceptions instead."""
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
