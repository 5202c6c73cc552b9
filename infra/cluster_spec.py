"""What a cluster is to be: its kind, its workers, and what each kind alone needs to know."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["local", "address", "cuda", "slurm", "kubernetes", "ssh"]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]  # a list in TOML

THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ClusterError(RuntimeError):
    """The cluster cannot be used. The message is one line: which, what is wrong, the way out."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Tls(_Table):
    """Files of certificates (PEM), where all processes of the cluster see them: paths, never what is in them."""

    ca: Text
    cert: Text
    key: Text


class Slurm(_Table):
    """One job per worker, by dask-jobqueue.

    The scheduler is this process, so it has to listen where the nodes reach it: at `interface` or at `host`, one of the two. folder: seen
    by this machine and by the nodes; the jobs' output goes there.
    """

    queue: Text | None = None
    account: Text | None = None
    walltime: Text = "01:00:00"
    directives: Texts = ()
    """More lines of the job's head, each behind #SBATCH."""
    prologue: Texts = ()
    """Lines of shell that run in a job before its worker."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """Of a worker."""
    interface: Text | None = None
    host: Text | None = None
    python: Text | None = None
    folder: Text = "~/.cache/tda/slurm"


class Kubernetes(_Table):
    """A DaskCluster of the Dask operator. image: has this package and what the problem needs.

    secrets: names of Secrets whose entries become environment variables of the workers: credentials of the store, for one.
    """

    image: Text
    namespace: Text = "default"
    name: Text = "tda"
    service_account: Text | None = None
    secrets: Texts = ()
    gpus: Annotated[int, Field(ge=0, le=1)] = 0


class Ssh(_Table):
    """The scheduler on the first host, workers on all. User, port, key and known hosts are those of ~/.ssh/config.

    address: where the scheduler listens, if the first host's name is not what the others reach it by. python: the interpreter on the hosts.
    """

    hosts: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    address: Text | None = None
    python: Text | None = None


@dataclass(frozen=True)
class ClusterSpec:
    """Where shards are computed.

    kind "local": `workers` processes on this machine, each computing one shard at a time with `threads` torch threads, each restarted
    beyond `memory_limit` (bytes or "4GiB"; None: an equal share of the machine). "cuda": the same, one for each GPU. "address": the
    scheduler at `address`, whose workers belong to whoever started them. The others start workers elsewhere, "ssh" so many on each host.
    tls: for "address", "slurm" and "ssh"; None: what Dask's own configuration says.
    """

    kind: Kind = "local"
    workers: int = 2
    threads: int = 1
    address: str | None = None
    memory_limit: str | int | None = None
    tls: Tls | None = None
    slurm: Slurm | None = None
    kubernetes: Kubernetes | None = None
    ssh: Ssh | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What each numeric library reads when a worker imports it."""
        return dict.fromkeys(THREAD_COUNTS, str(self.threads)) | {"MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONHASHSEED": "6640"}
