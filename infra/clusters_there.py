"""Clusters beyond this machine: a Dask scheduler that runs already, and workers that Slurm, Kubernetes or ssh start."""

import asyncio
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from infra.certificates import files, temporary_files
from infra.cluster_spec import ClusterError, ClusterSpec, Tls
from infra.clusters_here import SCHEDULER, quiet_log
from infra.settings import Settings
from infra.shards import GPU
from infra.workers import check_threads, said

if TYPE_CHECKING:
    from distributed import Client

#: As in a local cluster: the profiler can deadlock a worker.
UNPROFILED = ("DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED", "False")


@contextmanager
def address(spec: ClusterSpec) -> "Iterator[Client]":
    """A client of the scheduler at `spec.address`.

    Raises:
        ClusterError: none answers, it has no workers, or they compute several shards in one process.
    """
    from distributed import Client

    where, timeout = spec.address or "", Settings().connect_timeout
    message = f"no Dask scheduler answers at {where!r} within {timeout:g} s; start one or correct cluster.address"
    if not where:  # for Dask that means: start a cluster of your own
        raise ClusterError(message)
    try:
        client = Client(where, timeout=timeout, set_as_default=False, security=files(spec.tls))
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(f"{message}{_hint(where, spec.tls)}") from error
    with client:
        _wait(client, timeout, f"the Dask scheduler at {where!r} has no workers; start some (dask worker {where})")
        check_threads(client)
        yield client


@contextmanager
def slurm(spec: ClusterSpec) -> "Iterator[Client]":
    """A client of workers in Slurm jobs, one each; the scheduler is this process.

    Raises:
        ClusterError: dask-jobqueue or Slurm's commands are missing, or no job started in time.
    """
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise _missing("slurm", "dask-jobqueue") from error
    from distributed import Client

    assert spec.slurm is not None
    if shutil.which("sbatch") is None:
        raise ClusterError('cluster.kind = "slurm": there is no command sbatch here; run tda where jobs are submitted')
    folder = Path(spec.slurm.folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ClusterError(f"cluster.slurm.folder = {str(folder)!r}: {error.strerror}; name one that can be written to") from error
    with quiet_log(), TemporaryDirectory(prefix=".tls-", dir=folder) as own:
        options = slurm_options(spec, spec.tls or temporary_files(Path(own)))
        try:
            opened = SLURMCluster(n_workers=spec.workers, silence_logs=logging.CRITICAL, **options)
        except (OSError, RuntimeError, ValueError) as error:  # no such interface, or host, or port
            raise ClusterError(f'cluster.kind = "slurm": {said(error)}; check interface and host of cluster.slurm') from error
        with opened as cluster, Client(cluster, set_as_default=False) as client:
            _wait(client, Settings().worker_timeout, "no Slurm job started its worker; `squeue` says where they wait")
            yield client


def slurm_options(spec: ClusterSpec, tls: Tls) -> dict[str, Any]:
    """What SLURMCluster is told, but for the number of jobs."""
    asked = spec.slurm
    assert asked is not None
    exports = [f"export {name}={value}" for name, value in (*spec.environment.items(), UNPROFILED)]
    place = {"interface": asked.interface} if asked.interface else {"host": asked.host}
    return {
        "cores": 1,  # shards at a time; what Slurm gives a job is job_cpu
        "processes": 1,
        "job_cpu": spec.threads,
        "memory": str(spec.memory_limit),
        "queue": asked.queue,
        "account": asked.account,
        "walltime": asked.walltime,
        "job_extra_directives": [*(["--gres=gpu:1"] if asked.gpus else []), *asked.directives],
        "job_script_prologue": [*exports, *asked.prologue],
        "interface": asked.interface,
        "python": asked.python or sys.executable,
        "log_directory": str(Path(asked.folder).expanduser()),
        "worker_extra_args": ["--no-dashboard", *(["--resources", f"{GPU}=1"] if asked.gpus else [])],
        "scheduler_options": SCHEDULER | place,
        "protocol": "tls://",
        "security": files(tls),
    }


@contextmanager
def kubernetes(spec: ClusterSpec) -> "Iterator[Client]":
    """A client of a DaskCluster that the Dask operator runs.

    Raises:
        ClusterError: dask-kubernetes is missing, no Kubernetes answers, or no pod started in time.
    """
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError as error:
        raise _missing("kubernetes", "dask-kubernetes") from error
    from distributed import Client

    asked = spec.kubernetes
    assert asked is not None
    with quiet_log():
        _check_kubernetes()
        try:
            opened = KubeCluster(namespace=asked.namespace, custom_cluster_spec=kubernetes_cluster(spec), quiet=True)
        except Exception as error:
            _give_up(KubeCluster)
            raise ClusterError(
                f'cluster.kind = "kubernetes": {said(error)}; check `kubectl get daskclusters -n {asked.namespace}`'
            ) from error
        with opened as cluster, Client(cluster, set_as_default=False) as client:
            _wait(client, Settings().worker_timeout, f"no worker pod started; `kubectl get pods -n {asked.namespace}` says why")
            yield client


def _check_kubernetes() -> None:
    """Raise ClusterError where no Kubernetes answers."""
    import kr8s.asyncio

    timeout = Settings().connect_timeout
    try:
        asyncio.run(asyncio.wait_for(kr8s.asyncio.api(), timeout))
    except Exception as error:
        why = f"none within {timeout:g} s" if isinstance(error, TimeoutError) else said(error)
        raise ClusterError(
            f'cluster.kind = "kubernetes": no Kubernetes answers ({why}); name one in ~/.kube/config or in the file of KUBECONFIG, '
            "as `kubectl version` needs it, or run tda in a pod with a service account"
        ) from error


def _give_up(kind: Any) -> None:
    """Delete now what was begun: at exit, where dask-kubernetes would do it, each failure is a traceback."""
    for begun in list(kind._instances):  # noqa: SLF001  (nothing else holds what failed while it was made)
        with suppress(Exception):
            begun.close(timeout=10)
        begun.shutdown_on_close = False


def kubernetes_cluster(spec: ClusterSpec) -> dict[str, Any]:
    """The DaskCluster resource."""
    from dask.utils import parse_bytes
    from dask_kubernetes.operator import make_cluster_spec

    asked = spec.kubernetes
    assert asked is not None
    size = str(parse_bytes(spec.memory_limit))
    command = ["dask", "worker", "--nthreads", "1", "--memory-limit", size, *(["--resources", f"{GPU}=1"] if asked.gpus else [])]
    environment = dict([*spec.environment.items(), UNPROFILED])
    found: dict[str, Any] = make_cluster_spec(
        name=asked.name,
        image=asked.image,
        n_workers=spec.workers,
        worker_command=command,
        env=environment,
    )
    needs = {"cpu": str(spec.threads), "memory": size}
    limits = {"memory": size} | ({"nvidia.com/gpu": "1"} if asked.gpus else {})
    worker = found["spec"]["worker"]["spec"]
    worker["containers"][0]["resources"] = {"requests": needs, "limits": limits}
    worker["containers"][0]["envFrom"] = [{"secretRef": {"name": name}} for name in asked.secrets]
    for pod in (worker, found["spec"]["scheduler"]["spec"]):
        if asked.service_account:
            pod["serviceAccountName"] = asked.service_account
    return found


@contextmanager
def ssh(spec: ClusterSpec) -> "Iterator[Client]":
    """A client of workers that ssh starts, `spec.workers` on each host, and of a scheduler on the first.

    Raises:
        ClusterError: asyncssh is missing, or a host does not let us in or does not start them.
    """
    try:
        import asyncssh
    except ImportError as error:
        raise _missing("ssh", "asyncssh") from error
    from distributed import Client, SSHCluster

    with quiet_log(), _inherited(spec):
        try:
            opened = SSHCluster(security=files(spec.tls), silence_logs=logging.CRITICAL, **ssh_options(spec))
        except (asyncssh.Error, OSError, RuntimeError) as error:
            hosts = ", ".join(spec.ssh.hosts if spec.ssh else ())
            raise ClusterError(
                f'cluster.kind = "ssh": no cluster on {hosts} ({said(error)}); try `ssh HOST` and cluster.ssh.python there'
            ) from error
        with opened as cluster, Client(cluster, set_as_default=False) as client:
            _wait(client, Settings().worker_timeout, "no worker started on the hosts of cluster.ssh")
            yield client


def ssh_options(spec: ClusterSpec) -> dict[str, Any]:
    """What SSHCluster is told."""
    asked = spec.ssh
    assert asked is not None
    protocol = {"protocol": "tls://"} if spec.tls else {}
    memory = {} if spec.memory_limit is None else {"memory_limit": spec.memory_limit}
    return {
        "hosts": [asked.hosts[0], *asked.hosts],
        "remote_python": asked.python,
        "scheduler_options": SCHEDULER | protocol | {"host": asked.address or asked.hosts[0], "port": 0},
        "worker_options": {"n_workers": spec.workers, "nthreads": 1, "dashboard": False, "env": spec.environment} | protocol | memory,
    }


@contextmanager
def _inherited(spec: ClusterSpec) -> Iterator[None]:
    """What processes that ssh starts take over from this one is Dask's configuration."""
    import dask

    # Before a worker is spawned, for what is read then; where a host sets the same, the workers' own `env` wins.
    told: dict[str, Any] = {"distributed.nanny.pre-spawn-environ": spec.environment, "distributed.worker.profile.enabled": False}
    if spec.tls:
        told["distributed.comm.tls.ca-file"] = spec.tls.ca
        for role in ("client", "scheduler", "worker"):
            told |= {f"distributed.comm.tls.{role}.cert": spec.tls.cert, f"distributed.comm.tls.{role}.key": spec.tls.key}
        told["distributed.comm.require-encryption"] = True
    with dask.config.set(told):
        yield


def _hint(where: str, tls: Tls | None) -> str:
    if where.startswith("tls:") and tls is None:
        return ", and set [cluster.tls] ca, cert and key, or DASK_DISTRIBUTED__COMM__TLS__*"
    return ", and check that the certificates in [cluster.tls] are of one authority" if tls else ""


def _wait(client: "Client", timeout: float, message: str) -> None:
    try:
        client.wait_for_workers(1, timeout=timeout)
    except TimeoutError as error:
        raise ClusterError(message) from error


def _missing(kind: str, package: str) -> ClusterError:
    return ClusterError(f'cluster.kind = "{kind}" needs {package}, which is not installed; install the extra: pip install "tda[{kind}]"')
