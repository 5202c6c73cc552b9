"""The Dask cluster that a run's shards go to: processes on this machine, a scheduler that runs already, or workers started elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from infra import clusters_here, clusters_there
from infra.cluster_spec import ClusterError, ClusterSpec
from infra.shards import ShardFailed, run_shards
from infra.workers import Standing, admitted, exit_quickly

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client

__all__ = ["ClusterError", "ClusterSpec", "ShardFailed", "exit_quickly", "open_cluster", "run_shards"]

_OPENED: "Mapping[str, Callable[[ClusterSpec], AbstractContextManager[Client]]]" = {
    "local": clusters_here.local,
    "cuda": clusters_here.cuda,
    "address": clusters_there.address,
    "slurm": clusters_there.slurm,
    "kubernetes": clusters_there.kubernetes,
    "ssh": clusters_there.ssh,
}


@contextmanager
def open_cluster(spec: ClusterSpec, standing: Standing | None = None) -> "Iterator[Client]":
    """A Dask client of the cluster that `spec` describes; what was started for it lives as long as the block.

    Args:
        spec: which.
        standing: gives by name what has to be the same on every worker as it is here, such as versions; it is importable by the workers,
            and may raise. A worker that joins later and is not the same leaves again.

    Raises:
        ClusterError: no scheduler answers, there are no workers, one of them is not as this process is, or what starts workers of this
            kind is not installed.
    """
    with _OPENED[spec.kind](spec) as client, admitted(client, standing):
        yield client
