"""Clusters by configuration alone: what each kind starts, with which threads, memory and environment, and who is refused."""

import logging
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import psutil
import pytest
from distributed import Client, LocalCluster, Worker
from distributed.security import Security

from infra import clusters_here, clusters_there
from infra.certificates import files
from infra.certificates import main as certificates_main
from infra.cluster import ClusterError, ClusterSpec, open_cluster, run_shards
from infra.cluster_spec import Kubernetes, Slurm, Ssh, Tls
from infra.gate import Gate
from tests.certificates import certificates

ELSEWHERE: dict[str, Any] = {"processes": False, "host": "127.0.0.1", "protocol": "tcp://", "threads_per_worker": 1}
ELSEWHERE["dashboard_address"] = "127.0.0.1:0"
SIZES: dict[str, Any] = {"workers": 3, "threads": 4, "memory_limit": "8GiB"}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return certificates(tmp_path_factory.mktemp("certificates"))


def seen(_: int) -> dict[str, str]:
    return dict(os.environ)


def standing() -> dict[str, str]:
    return {"problem x with digest": os.environ.get("TDA_TEST_DIGEST", "same")}


def same() -> dict[str, str]:
    return {"problem x with digest": "same"}


def here_only() -> dict[str, str]:
    if os.environ.get("TDA_TEST_HERE") != str(os.getpid()):
        raise ModuleNotFoundError("No module named 'my_problem'")
    return {}


def test_nothing_of_a_local_cluster_listens_beyond_this_machine_or_speaks_without_its_own_certificates(tmp_path: Path, tls: Tls) -> None:
    before = {(address.ip, address.port) for address in listening()}
    with open_cluster(ClusterSpec(workers=1)) as client:
        addresses = [client.scheduler.address, *client.scheduler_info(n_workers=-1)["workers"]]
        assert all(address.startswith("tls://127.0.0.1:") for address in addresses)
        opened = {(address.ip, address.port) for address in listening()} - before
        assert {ip for ip, _ in opened} == {"127.0.0.1"}
        ports = {int(address.rpartition(":")[2]) for address in addresses}
        assert ports < {port for _, port in opened}, "what is looked at is theirs"
        own = written_pair(tmp_path, client.security)
        for port in ports:
            assert said(port, own) == "lets in"
            assert said(port, tls) == "UNKNOWN_CA"
            assert said(port, None) == "CERTIFICATE_REQUIRED"


def listening() -> list[Any]:
    """The addresses that this process and those it started listen at."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return [c.laddr for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]


def written_pair(folder: Path, security: Security) -> Tls:
    """The certificates of a client, which are kept in memory, as files."""
    held = security.get_tls_config_for_role("client")
    for name in ("ca_file", "cert", "key"):
        (folder / name).write_text(held[name])
    return Tls(ca=str(folder / "ca_file"), cert=str(folder / "cert"), key=str(folder / "key"))


def said(port: int, pair: Tls | None) -> str:
    """What a server answers to one who trusts it and shows a certificate, or none: "lets in", or by what name it refuses."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    try:
        with socket.create_connection((clusters_here.HOST, port), timeout=30) as plain, context.wrap_socket(plain) as wrapped:
            assert wrapped.recv(1), "Dask begins to talk"
            return "lets in"
    except ssl.SSLError as error:  # in TLS 1.3 a server refuses after the handshake
        return error.reason.partition("ALERT_")[2]


def test_a_running_scheduler_is_reached_by_tls_with_files_and_not_without(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDA_CONNECT_TIMEOUT", "2")
    with LocalCluster(**ELSEWHERE | {"n_workers": 1, "protocol": "tls://", "security": files(tls)}) as elsewhere:
        where = elsewhere.scheduler_address
        with open_cluster(ClusterSpec(kind="address", address=where, tls=tls)) as client:
            assert run_shards(client, abs, [-3], stage="absolute") == [3]
        with (
            pytest.raises(ClusterError, match=r"and set \[cluster.tls\] ca, cert and key") as caught,
            open_cluster(ClusterSpec(kind="address", address=where)),
        ):
            pass
        assert "\n" not in str(caught.value)


def test_the_pair_that_the_command_writes_serves_a_cluster_is_its_owner_s_alone_and_is_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tls"
    assert certificates_main([str(folder)]) == 0
    pair = Tls(**{name: str(folder / f"{name}.pem") for name in ("ca", "cert", "key")})
    assert [stat.S_IMODE(Path(file).stat().st_mode) for file in (folder, pair.key)] == [0o700, 0o600]
    with (
        LocalCluster(**ELSEWHERE | {"n_workers": 1, "protocol": "tls://", "security": files(pair)}) as elsewhere,
        open_cluster(ClusterSpec(kind="address", address=elsewhere.scheduler_address, tls=pair)) as client,
    ):
        assert run_shards(client, abs, [-3], stage="absolute") == [3]
    before = Path(pair.key).read_bytes()
    assert certificates_main([str(folder)]) == 0
    assert Path(pair.key).read_bytes() == before
    assert re.match(r"written: .*key.pem\nkept: ", capsys.readouterr().out)
    Path(pair.cert).unlink()
    for wrong, said in (
        ([str(folder)], "has ca.pem, key.pem alone"),
        ([], "usage: "),
        (["/proc/none"], "name a folder that can be written"),
    ):
        assert certificates_main(wrong) == 2
        assert said in capsys.readouterr().err


def test_a_certificate_that_is_not_there_is_named() -> None:
    spec = ClusterSpec(kind="address", address="tls://127.0.0.1:9", tls=Tls(ca="/no/ca.pem", cert="/c", key="/k"))
    with pytest.raises(ClusterError, match=r"cluster\.tls\.ca = '/no/ca.pem' is no file here"), open_cluster(spec):
        pass


def test_a_worker_that_cannot_import_the_problem_or_has_another_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDA_TEST_HERE", str(os.getpid()))
    with (
        pytest.raises(
            ClusterError, match=r"worker tls://127.0.0.1:\d+ cannot start: ModuleNotFoundError: No module named 'my_problem'; install"
        ),
        open_cluster(ClusterSpec(workers=1), here_only),
    ):
        pass
    with monkeypatch.context() as patch:
        patch.setenv("TDA_TEST_DIGEST", "other")  # the workers inherit it, and then it changes here
        original = clusters_here.local

        def local(spec):
            from contextlib import contextmanager

            @contextmanager
            def opened():
                with original(spec) as client:
                    patch.setenv("TDA_TEST_DIGEST", "mine")
                    yield client

            return opened()

        patch.setitem(sys.modules["infra.cluster"]._OPENED, "local", local)  # type: ignore[arg-type]
        with (
            pytest.raises(ClusterError, match=r"has problem x with digest other where this process has mine; make them the same"),
            open_cluster(ClusterSpec(workers=1), standing),
        ):
            pass


async def _joined(scheduler: str, environment: str) -> Worker:
    os.environ["TDA_TEST_DIGEST"] = environment
    try:
        return await Worker(scheduler, nthreads=1, host="127.0.0.1", dashboard=False)
    finally:
        del os.environ["TDA_TEST_DIGEST"]


def test_a_worker_that_joins_later_and_differs_leaves_again_and_the_run_finishes() -> None:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with (
        LocalCluster(n_workers=1, **ELSEWHERE) as elsewhere,
        open_cluster(ClusterSpec(kind="address", address=elsewhere.scheduler_address), standing) as client,
    ):
        worker = client.sync(_joined, elsewhere.scheduler_address, "other")
        assert run_shards(client, abs, range(-20, 0), stage="absolute") == list(range(20, 0, -1))
        client.sync(worker.finished, callback_timeout=30)
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 1
        ((_, told),) = client.get_events("tda")
        assert told == {"worker": worker.address, "refused": "has problem x with digest other where this process has same"}
        welcome = client.sync(_joined, elsewhere.scheduler_address, "same")
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
        client.sync(welcome.close)


def test_the_gate_of_a_run_that_was_killed_lets_everyone_in() -> None:
    with LocalCluster(n_workers=1, **ELSEWHERE) as elsewhere, Client(elsewhere, set_as_default=False) as client:
        client.register_plugin(Gate("Client-gone", standing, same()))
        worker = client.sync(_joined, elsewhere.scheduler_address, "other")
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
        client.sync(worker.close)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads_per_worker": 2}, "computes 2 shards at once in one process; start it with --nthreads 1"),
        ({"n_workers": 2}, r"the 2 workers on 127.0.0.1 have \d+ threads for \d+ processors, .* OMP_NUM_THREADS=1"),
    ],
)
def test_workers_that_would_be_in_each_others_way_are_refused(options: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads((os.cpu_count() or 1) + 1)
    try:
        with LocalCluster(**ELSEWHERE | {"n_workers": 1} | options) as elsewhere:
            spec = ClusterSpec(kind="address", address=elsewhere.scheduler_address)
            with pytest.raises(ClusterError, match=said), open_cluster(spec):
                pass
    finally:
        torch.set_num_threads(before)


def test_each_gpu_gets_a_worker_of_its_own_and_each_shard_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters_here, "visible_devices", lambda: ["2", "GPU-5a"])
    with open_cluster(ClusterSpec(kind="cuda", threads=3)) as client:
        info = client.scheduler_info(n_workers=-1)["workers"]
        assert [worker["resources"] for worker in info.values()] == [{"GPU": 1}] * 2
        found = run_shards(client, seen, range(8), stage="seen")
        assert {env["CUDA_VISIBLE_DEVICES"] for env in found} == {"2", "GPU-5a"}
        assert {env["OMP_NUM_THREADS"] for env in found} == {"3"}


def test_without_a_gpu_the_kind_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters_here, "visible_devices", list)
    with (
        pytest.raises(ClusterError, match="finds no GPU that torch can use; `tda doctor` says why"),
        open_cluster(ClusterSpec(kind="cuda")),
    ):
        pass


@pytest.mark.parametrize(("kind", "module"), [("slurm", "dask_jobqueue"), ("kubernetes", "dask_kubernetes"), ("ssh", "asyncssh")])
def test_a_kind_whose_package_is_missing_names_the_extra(kind: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(ClusterError, match=rf'needs .* not installed; install the extra: pip install "tda\[{kind}\]"'),
        open_cluster(ClusterSpec(kind)),
    ):
        pass


@pytest.fixture
def slurm(tmp_path: Path) -> ClusterSpec:
    options = Slurm(
        queue="long", account="lab", walltime="03:00:00", directives=("--qos=high",), gpus=1, interface="lo", folder=str(tmp_path)
    )
    return ClusterSpec(kind="slurm", slurm=options, **SIZES)


def test_a_slurm_job_is_given_what_its_worker_uses_and_holds_no_secret(
    slurm: ClusterSpec, tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dask_jobqueue.slurm import SLURMJob

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    options = clusters_there.slurm_options(slurm, tls)
    del options["scheduler_options"]
    script = SLURMJob(scheduler="tls://10.0.0.1:8786", name="w", **options).job_script()
    lines = script.splitlines()
    head = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"-p long", "-A lab", "-t 03:00:00", "--cpus-per-task=4", "--mem=8G", "--gres=gpu:1", "--qos=high"} <= head
    assert {"export OMP_NUM_THREADS=4", "export MKL_NUM_THREADS=4", "export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False"} <= {*lines}
    command = lines[-1].split()
    assert command[0] == sys.executable
    expected = {"--nthreads": "1", "--memory-limit": "8.00GiB", "--resources": "GPU=1", "--interface": "lo", "--tls-key": tls.key}
    assert {option: command[command.index(option) + 1] for option in expected} == expected
    assert "hunter2" not in script
    assert "PRIVATE KEY" not in script


def test_jobs_of_slurm_compute_shards(slurm: ClusterSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch is played by a script that runs the job at once."""
    programs = tmp_path / "bin"
    programs.mkdir()
    submit = 'cp "$1" "$0.job"\nsetsid bash "$0.job" >"$0.out" 2>&1 &\necho "Submitted batch job $!"\n'
    (programs / "sbatch").write_text(f"#!/bin/sh\n{submit}")
    (programs / "scancel").write_text('#!/bin/sh\nkill -TERM -- "-$1"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("TDA_WORKER_TIMEOUT", "60")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    spec = ClusterSpec(**{**vars(slurm), "workers": 1})
    with open_cluster(spec, same) as client:
        (pair,) = tmp_path.glob(".tls-*")
        assert [stat.S_IMODE(path.stat().st_mode) for path in (pair, tmp_path)] == [0o700] * 2
        (found,) = run_shards(client, seen, [0], stage="seen")
        assert (found["OMP_NUM_THREADS"], client.scheduler.address[:6]) == ("4", "tls://")
    assert not pair.exists(), "its key ends with the cluster"


def test_without_slurm_s_commands_the_kind_slurm_is_refused(slurm: ClusterSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="there is no command sbatch here; run tda where jobs are submitted"), open_cluster(slurm):
        pass


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"interface": "no0"}, "'no0' is not a valid network interface"), ({"folder": "/dev/null"}, r"cluster\.slurm\.folder = '/dev/null'")],
)
def test_a_place_where_no_scheduler_of_slurm_can_stand_is_refused(
    slurm: ClusterSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: dict[str, str], says: str
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.slurm is not None
    spec = ClusterSpec(**vars(slurm) | {"slurm": slurm.slurm.model_copy(update=wrong)})
    with pytest.raises(ClusterError, match=says), open_cluster(spec):
        pass


def test_a_kubernetes_cluster_is_given_what_its_workers_use_and_names_its_secrets_only() -> None:
    options = Kubernetes(image="registry/tda:1", namespace="lab", service_account="tda", secrets=("s3",), gpus=1)
    found = clusters_there.kubernetes_cluster(ClusterSpec(kind="kubernetes", kubernetes=options, **SIZES))
    assert (found["apiVersion"], found["kind"], found["metadata"]) == ("kubernetes.dask.org/v1", "DaskCluster", {"name": "tda"})
    worker, scheduler = (found["spec"][part]["spec"] for part in ("worker", "scheduler"))
    assert found["spec"]["worker"]["replicas"] == 3
    (container,) = worker["containers"]
    size = str(8 << 30)
    assert container["args"][:8] == ["dask", "worker", "--nthreads", "1", "--memory-limit", size, "--resources", "GPU=1"]
    assert container["resources"] == {"requests": {"cpu": "4", "memory": size}, "limits": {"memory": size, "nvidia.com/gpu": "1"}}
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert (environment["OMP_NUM_THREADS"], environment["DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"]) == ("4", "False")
    assert "nvidia.com/gpu" not in str(scheduler), "the scheduler takes no GPU from the workers"
    assert (container["image"], worker["serviceAccountName"], scheduler["serviceAccountName"]) == ("registry/tda:1", "tda", "tda")


def test_ssh_starts_a_scheduler_on_the_first_host_and_workers_on_all(tls: Tls) -> None:
    options = clusters_there.ssh_options(ClusterSpec(kind="ssh", ssh=Ssh(hosts=("one", "two"), python="/opt/python"), tls=tls, **SIZES))
    assert (options["hosts"], options["remote_python"]) == (["one", "one", "two"], "/opt/python")
    assert options["scheduler_options"]["host"] == "one"
    assert {"n_workers": 3, "nthreads": 1, "memory_limit": "8GiB", "protocol": "tls://"}.items() <= options["worker_options"].items()


@pytest.fixture
def ssh_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client's side is in ~/.ssh, as a user's is."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    key, host_key = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(home / ".ssh" / "id_ed25519")
    key.write_public_key(home / "authorized")
    host_key.write_private_key(home / "host_key")
    command = [sys.executable, Path(__file__).parents[1] / "ssh_server.py", home / "host_key", home / "authorized"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key.export_public_key().decode()}")
        (home / ".ssh" / "config").write_text(f"Host *\n  Port {port}\n  User tda\n  IdentityFile {home}/.ssh/id_ed25519\n")
        monkeypatch.setenv("HOME", str(home))
        yield
        server.terminate()


def test_hosts_reached_by_ssh_compute_shards(ssh_server: None, tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    spec = ClusterSpec(kind="ssh", workers=1, threads=3, memory_limit="1GiB", ssh=Ssh(hosts=("127.0.0.1",)), tls=tls)
    with open_cluster(spec, same) as client:
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        (worker,) = client.scheduler_info(n_workers=-1)["workers"].values()
        assert (worker["nthreads"], worker["memory_limit"]) == (1, 1 << 30)
        (found,) = run_shards(client, seen, [0], stage="seen")
        assert found["OMP_NUM_THREADS"] == "3"


def test_a_host_that_ssh_does_not_reach_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host *\n  Port 9\n")
    spec = ClusterSpec(kind="ssh", ssh=Ssh(hosts=("127.0.0.1",)))
    with pytest.raises(ClusterError, match=r"no cluster on 127.0.0.1 \(.*; try `ssh HOST`") as caught, open_cluster(spec):
        pass
    assert "\n" not in str(caught.value)
