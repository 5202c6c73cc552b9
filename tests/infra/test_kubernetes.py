"""The kind "kubernetes" where no Kubernetes is, or none that lets us in: told in one line, and nothing more when the process ends."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra.cluster import ClusterError, ClusterSpec, open_cluster
from infra.cluster_spec import Kubernetes

pytest.importorskip("dask_kubernetes")
from dask_kubernetes.operator.kubecluster.kubecluster import reap_clusters

SPEC = ClusterSpec(kind="kubernetes", memory_limit="4GiB", kubernetes=Kubernetes(image="registry.example/tda:1", namespace="lab"))


class Denies(BaseHTTPRequestHandler):
    """Says which version it is, and lets nobody do anything."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        allowed = self.path.startswith("/version")
        body = json.dumps({"gitVersion": "v1.34.0"} if allowed else {"kind": "Status", "message": "not you"}).encode()
        self.send_response(200 if allowed else 403)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing: the test prints what matters."""


class Quiet(ThreadingHTTPServer):
    """Says nothing of clients that hang up, as kr8s does where it authenticates once more."""

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture
def denying() -> Iterator[str]:
    with Quiet(("127.0.0.1", 0), Denies) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def refused(match: str) -> None:
    with pytest.raises(ClusterError, match=match) as caught, open_cluster(SPEC):
        pass
    assert "\n" not in str(caught.value)
    reap_clusters()  # what dask-kubernetes does at exit: it would raise what opening the cluster raised


def named(file: Path, server: str) -> str:
    users, contexts = [{"name": "me", "user": {}}], [{"name": "here", "context": {"cluster": "here", "user": "me"}}]
    clusters = [{"name": "here", "cluster": {"server": server}}]
    told = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
    file.write_text(json.dumps(told | {"clusters": clusters, "contexts": contexts, "users": users}))
    return str(file)


def test_without_a_kubeconfig_the_kind_kubernetes_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    refused(r"no Kubernetes answers \(ValueError: Unable to find valid credentials\); name one in ~/.kube/config")


def test_a_kubernetes_that_does_not_answer_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", named(tmp_path / "config", "http://127.0.0.1:9"))
    refused(r"no Kubernetes answers \(ConnectError")


def test_a_kubernetes_that_does_not_let_us_in_is_told_in_one_line(
    denying: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", named(tmp_path / "config", denying))
    # Asked a second time, it may also have hung up while the first answer was read.
    refused(r"(not you|ReadError).*; check `kubectl get daskclusters -n lab`")
    assert capfd.readouterr().err == ""
