"""The Dask cluster that a run's shards go to: worker processes on this machine, or a scheduler that runs elsewhere."""

import atexit
import gc
import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from infra.settings import Settings

if TYPE_CHECKING:
    from distributed import Client, Future

S = TypeVar("S")
R = TypeVar("R")

THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Dask sets these for its worker processes, by way of the environment of the process that starts them.
WORKER_ENVIRONMENT = dict.fromkeys(THREAD_COUNTS, "1") | {"MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONHASHSEED": "6640"}
LOCAL_CONFIG = {
    # torch may hold the GIL longer than any heartbeat; a local worker that dies closes its connection anyway.
    "distributed.scheduler.worker-ttl": None,
    "distributed.comm.timeouts.connect": "60s",
    # The profiler calls sys._current_frames() every 10 ms, which in Python 3.11 can deadlock a worker for good (a garbage
    # collection inside that call, dask/distributed#8616): neither work nor its parent's death is noticed from then on.
    "distributed.worker.profile.enabled": False,
}


class ClusterError(RuntimeError):
    """The cluster cannot be used. The message is one line: which, what is wrong, the way out."""


class ShardFailed(RuntimeError):  # noqa: N818 (the name users read in the message)
    """One shard of a stage failed for good; `cause` is what it raised last."""

    def __init__(self, stage: str, shard: int, cause: BaseException) -> None:
        """Args: the stage's name, the shard's position in its sequence, what it raised."""
        super().__init__(stage, shard, cause)
        self.stage = stage
        self.shard = shard
        self.cause = cause

    def __str__(self) -> str:
        return f"stage '{self.stage}', shard {self.shard}: {_describe(self.cause)}"


@dataclass(frozen=True)
class ClusterSpec:
    """Where shards are computed.

    kind "local": `workers` processes on this machine, each computing one shard at a time with `threads` torch threads, each
    restarted beyond `memory_limit` (bytes or "4GiB"; None: an equal share of the machine). kind "address": the scheduler
    at `address`, whose workers belong to whoever started them.
    """

    kind: Literal["local", "address"] = "local"
    workers: int = 2
    threads: int = 1
    address: str | None = None
    memory_limit: str | int | None = None


@contextmanager
def open_cluster(spec: ClusterSpec) -> "Iterator[Client]":
    """A Dask client of the cluster that `spec` describes; a local cluster lives as long as the block.

    Raises:
        ClusterError: no scheduler answers at the address, or it has no workers.
    """
    opened = _local(spec) if spec.kind == "local" else _remote(spec.address or "")
    with opened as client:
        yield client


def exit_quickly() -> None:
    """Let this process end without a last garbage collection, which takes seconds once torch and its like are imported."""
    atexit.register(gc.freeze)


def run_shards(
    client: "Client",
    function: Callable[[S], R],
    shards: Sequence[S],
    *,
    stage: str,
    on_done: Callable[[int], None] | None = None,
    retries: int = 2,
    final: tuple[type[Exception], ...] = (),
) -> list[R]:
    """Compute function(shard) for every shard on the cluster; the results come in the order of the shards.

    Args:
        client: of open_cluster.
        function: importable by the workers; safe to run twice, since a shard whose worker died is run again.
        shards: small descriptions (URLs, ranges), never tensors.
        stage: names the keys on the cluster and the error.
        on_done: called here with the position of each shard as it finishes, in any order.
        retries: how often a shard that raises is tried again.
        final: what is raised again however often it is tried: wrong input, say. It is not retried.

    Raises:
        ShardFailed: a shard failed for good, or still after its retries; the shards not yet started are cancelled.
    """
    key = f"{stage}-{uuid.uuid4().hex[:8]}"
    tried = partial(_tried, function, final)
    futures = client.map(tried, shards, key=[f"{key}-{i}" for i in range(len(shards))], pure=False, retries=retries)
    try:
        return _collect(client, futures, stage, on_done)
    except BaseException:  # a failed shard, or Ctrl-C: what has not started need not start
        client.cancel(futures)
        raise


@dataclass(frozen=True)
class _Refused:
    """What a shard raised that no other try would mend; as a result, since Dask retries whatever raises."""

    error: Exception


def _tried(function: Callable[[S], R], final: tuple[type[Exception], ...], shard: S) -> R | _Refused:
    try:
        return function(shard)
    except final as error:
        return _Refused(error)


def _collect(client: "Client", futures: "list[Future]", stage: str, on_done: Callable[[int], None] | None) -> list[Any]:
    from distributed import as_completed

    positions = {future.key: i for i, future in enumerate(futures)}
    results: list[Any] = [None] * len(futures)
    for future in as_completed(futures, loop=client.loop):
        position = positions[future.key]
        try:
            # Not by future.status: a result is lost when its worker dies before it is fetched, and is then computed again.
            result = future.result()
        except Exception as error:
            raise ShardFailed(stage, position, error) from error
        if isinstance(result, _Refused):
            raise ShardFailed(stage, position, result.error) from result.error
        results[position] = result
        if on_done is not None:
            on_done(position)
    return results


@contextmanager
def _local(spec: ClusterSpec) -> "Iterator[Client]":
    import dask
    from distributed import Client, LocalCluster

    with (
        _environment_of_workers(spec.threads),
        dask.config.set(LOCAL_CONFIG),
        _quiet_log(),
        _deaf_threads() as listening,
        LocalCluster(
            n_workers=spec.workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            # The scheduler always serves HTTP; with no dashboard, and on any free port, two runs on one machine do not meet.
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            memory_limit=spec.memory_limit or "auto",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(exit_quickly)
        listening()
        yield client


@contextmanager
def _remote(address: str) -> "Iterator[Client]":
    from distributed import Client

    timeout = Settings().connect_timeout
    message = f"no Dask scheduler answers at {address!r} within {timeout:g} s; start one or correct cluster.address"
    if not address:  # for Dask that means: start a cluster of your own
        raise ClusterError(message)
    try:
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(message) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError as error:
            message = f"the Dask scheduler at {address!r} has no workers; start some (dask worker {address})"
            raise ClusterError(message) from error
        yield client


@contextmanager
def _environment_of_workers(threads: int) -> Iterator[None]:
    """Set what each numeric library reads when a worker imports it, and put back what was there.

    It has to be this process's own environment: there Dask looks first, and it writes its defaults there for good.
    """
    count = str(threads)
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT | dict.fromkeys(THREAD_COUNTS, count))
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
def _quiet_log() -> Iterator[None]:
    """Dask tells its log about every worker that stops; errors reach the user as exceptions instead."""
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _describe(cause: BaseException) -> str:
    from distributed.scheduler import KilledWorker

    if isinstance(cause, KilledWorker):
        return "every worker that ran it died (out of memory? lower shard_size or batch_size, or raise cluster.memory_limit)"
    return " ".join(f"{type(cause).__name__}: {cause}".split())
