"""Shards on a cluster: one function over many small descriptions, so many at a time that neither workers nor scheduler wait."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from infra import interrupts

if TYPE_CHECKING:
    from distributed import Client, Future

S = TypeVar("S")
R = TypeVar("R")

#: Shards that the scheduler knows of at a time: at least so many, and so many for each worker. Its memory and the work of each of its
#: steps grow with the tasks that it knows (docs/scaling.md).
WINDOW, WINDOW_PER_WORKER = 512, 8
#: What a worker with a GPU offers, and each shard then takes one of.
GPU = "GPU"


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

    Where workers offer a GPU, every shard takes one.

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
    from distributed import as_completed

    key, tried = f"{stage}-{uuid.uuid4().hex[:8]}", partial(_tried, function, final)
    window, resources = _offered(client)
    pending: dict[str, tuple[Future, int]] = {}
    results: list[Any] = [None] * len(shards)
    completed = as_completed(loop=client.loop)
    sent = 0

    def send() -> None:
        """Fill the window up, in pieces that are worth a message."""
        nonlocal sent
        some = range(sent, min(sent + window - len(pending), len(shards)))
        if not some or (pending and len(some) < min(window // 8, len(shards) - sent)):
            return
        futures = client.map(
            tried, [shards[i] for i in some], key=[f"{key}-{i}" for i in some], pure=False, retries=retries, resources=resources,
            priority=-some[0],
        )  # fmt: skip
        pending.update({future.key: (future, i) for i, future in zip(some, futures, strict=True)})
        completed.update(futures)
        sent = some[-1] + 1

    try:
        send()
        while pending:
            interrupts.check()
            # Held until it is read: a result is lost when its worker dies before that, and is then computed again.
            future, position = pending[next(completed).key]
            results[position] = _result(future, stage, position)
            del pending[future.key], future
            send()
            if on_done is not None:
                on_done(position)
    except BaseException:  # a failed shard, or Ctrl-C: what has not started need not start
        client.cancel([future for future, _ in pending.values()])
        raise
    return results


def _offered(client: "Client") -> tuple[int, dict[str, float] | None]:
    """Shards to be known at a time, and what each takes of the resources that workers offer."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    gpu = any(worker.get("resources", {}).get(GPU) for worker in workers)
    return max(WINDOW, WINDOW_PER_WORKER * len(workers)), {GPU: 1} if gpu else None


@dataclass(frozen=True)
class _Refused:
    """What a shard raised that no other try would mend; as a result, since Dask retries whatever raises."""

    error: Exception


def _tried(function: Callable[[S], R], final: tuple[type[Exception], ...], shard: S) -> R | _Refused:
    try:
        return function(shard)
    except final as error:
        return _Refused(error)


def _result(future: "Future", stage: str, position: int) -> Any:
    try:
        result = future.result()
    except Exception as error:
        raise ShardFailed(stage, position, error) from error
    if isinstance(result, _Refused):
        raise ShardFailed(stage, position, result.error) from result.error
    return result


def _describe(cause: BaseException) -> str:
    from distributed.scheduler import KilledWorker

    if isinstance(cause, KilledWorker):
        return "every worker that ran it died (out of memory? lower shard_size or batch_size, or raise cluster.memory_limit)"
    return " ".join(f"{type(cause).__name__}: {cause}".split())
