"""The files that set up an installation: well formed, pinned, closed to strangers, without secrets, and true to what they start."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).parents[2] / "infra"
MANIFESTS = sorted(file for file in (INFRA / "kubernetes").glob("*.yaml") if file.name != "kustomization.yaml")
KUBERNETES = "1.32"
SECRET = re.compile(r"PASSWORD|SECRET|ACCESS_KEY|TOKEN|AUTH|_USER$|DATABASE_CONNECTION_URL")
#: What docs/nightly.md tells to create.
SECRETS = {"prefect-database": {"password", "url"}, "prefect-access": {"auth"}, "tda-s3": None, "dask-tls": None}
#: Those of what `python -m infra.certificates` writes, and the option of Dask's commands for each.
TLS = {"--tls-ca-file": "ca.pem", "--tls-cert": "cert.pem", "--tls-key": "key.pem"}


class Strict(yaml.SafeLoader):
    """Refuses a key that is given twice: the first would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(keys) == len(set(keys)), f"a key is given twice: {keys}"
        return super().construct_mapping(node, deep)


def documents(file: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.load_all(file.read_text(), Strict) if found]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return documents(INFRA / "compose.yaml")[0]


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return [found for file in MANIFESTS for found in documents(file)]


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Workloads, with the pods that they make."""
    for found in objects:
        if "template" in found.get("spec", {}):
            yield found, found["spec"]["template"]


def is_pinned(image: str) -> bool:
    """By a version: a tag that has digits and a dot or a date."""
    tag = image.rpartition("/")[2].partition(":")[2]
    return "@sha256:" in image or re.search(r"\d+[.-]\d+", tag) is not None


def test_compose_publishes_to_this_machine_alone_and_pins_what_it_runs(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(published) >= 4
    assert all(port.startswith("127.0.0.1:") for port in published)
    for name, service in compose["services"].items():
        assert "build" in service or is_pinned(service["image"]), name
        assert not {"privileged", "network_mode", "pid"} & set(service), name


def test_compose_takes_every_secret_from_the_environment_and_stops_without_it(compose: dict[str, Any]) -> None:
    seen = 0
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if SECRET.search(name) and name != "POSTGRES_USER":
                seen += 1
                assert re.search(r"\$\{[A-Z_]+:\?[^}]+\}", value), name
    assert seen >= 8


def test_compose_refers_only_to_what_is_there(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for needed, how in service.get("depends_on", {}).items():
            other = compose["services"][needed]
            assert how["condition"] != "service_healthy" or "healthcheck" in other, f"{name} waits for ever for {needed}"
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"], name
        if "build" in service:
            assert (INFRA / service["build"]["context"] / service["build"]["dockerfile"]).samefile(INFRA / "Dockerfile")


def test_docker_compose_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no docker compose here: its plugin is not installed")
    environment = dict.fromkeys(("POSTGRES_PASSWORD", "PREFECT_API_AUTH_STRING", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "x") | {
        "PATH": "/usr/bin:/usr/local/bin"
    }
    command = [docker, "compose", "-f", INFRA / "compose.yaml", "config", "--quiet"]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert told.returncode == 0, told.stderr


def test_the_commands_and_settings_that_containers_start_with_exist(compose: dict[str, Any], objects: list[dict[str, Any]]) -> None:
    from distributed.cli import dask_scheduler, dask_worker
    from prefect import settings

    commands = [service["command"] for service in compose["services"].values() if service.get("command")]
    containers = [container for _, pod in pods(objects) for container in pod["spec"]["containers"]]
    commands += [container["command"] for container in containers if "command" in container]
    click = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}
    helps: dict[tuple[str, ...], str] = {}
    checked = 0
    for command in commands:
        options = [word for word in command if word.startswith("--")]
        if command[0] == "dask":
            known = [option for each in click[command[1]].params for option in (*each.opts, *each.secondary_opts)]
            assert set(options) <= set(known), command
        elif command[0] == "prefect":
            words = tuple(command[1:3])
            if words not in helps:
                prefect = Path(sys.executable).with_name("prefect")
                helps[words] = subprocess.run([prefect, *words, "--help"], capture_output=True, text=True, check=True).stdout
            assert all(option in helps[words] for option in options), command
        else:
            continue
        checked += 1
    assert checked == 8
    names = [name for service in compose["services"].values() for name in service.get("environment", {})]
    names += [each["name"] for container in containers for each in container.get("env", [])]
    assert [name for name in names if name.startswith("PREFECT_") and not hasattr(settings, name)] == []


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_every_manifest_fits_the_schema_of_kubernetes(file: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    found = documents(file)
    assert found
    for each in found:
        validate.validate(each, KUBERNETES, strict=True)


def test_kustomize_builds_all_of_them_with_pinned_images() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here")
    told = subprocess.run([kubectl, "kustomize", INFRA / "kubernetes"], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    built = list(yaml.safe_load_all(told.stdout))
    assert len(built) == sum(len(documents(file)) for file in MANIFESTS), "every file is listed"
    for _, pod in pods(built):
        assert all(is_pinned(container["image"]) for container in pod["spec"]["containers"])


def test_pods_run_without_rights_within_limits_and_with_secrets_by_reference(objects: list[dict[str, Any]]) -> None:
    assert "Secret" not in {each["kind"] for each in objects}
    found = list(pods(objects))
    assert len(found) == 5
    for workload, pod in found:
        name, spec = workload["metadata"]["name"], pod["spec"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items(), name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert (rights["allowPrivilegeEscalation"], rights["capabilities"]["drop"]) == (False, ["ALL"]), name
            assert set(container["resources"]["limits"]) == {"cpu", "memory"}, name
            assert {mount["name"] for mount in container["volumeMounts"]} <= {
                volume["metadata"]["name"] if "metadata" in volume else volume["name"]
                for volume in (*spec.get("volumes", []), *workload["spec"].get("volumeClaimTemplates", []))
            }
            for each in container.get("env", []):
                assert not SECRET.search(each["name"]) or "valueFrom" in each or each["name"] == "POSTGRES_USER", name
                reference = each.get("valueFrom", {}).get("secretKeyRef")
                assert reference is None or reference["key"] in SECRETS[reference["name"]], name
            assert all(each["secretRef"]["name"] in SECRETS for each in container.get("envFrom", [])), name
        assert all(volume["secret"]["secretName"] in SECRETS for volume in spec.get("volumes", []) if "secret" in volume), name


def test_services_lead_to_pods_and_nothing_is_open_to_the_outside(objects: list[dict[str, Any]]) -> None:
    labels = [pod["metadata"]["labels"] for _, pod in pods(objects)]
    services = [each for each in objects if each["kind"] == "Service"]
    assert {each["metadata"]["name"] for each in services} == {"postgres", "prefect", "dask-scheduler"}
    for service in services:
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
        assert service["spec"]["selector"] in labels
    (policy,) = (each for each in objects if each["kind"] == "NetworkPolicy")
    assert policy["spec"]["podSelector"] == {}
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {}}]}]


def speaks_tls(command: list[str], mounted: set[str]) -> bool:
    """Whether a command of Dask has certificates from a mounted folder, and neither listens nor connects in the clear."""
    told = dict(pairwise(command))
    files = {option: Path(told.get(option, "")) for option in TLS}
    spoken = told.get("--protocol") == "tls" if command[1] == "scheduler" else command[2].startswith("tls://")
    return spoken and all(file.name == TLS[option] and str(file.parent) in mounted for option, file in files.items())


def test_every_process_of_dask_speaks_tls_with_certificates_that_runs_have_too(
    compose: dict[str, Any], objects: list[dict[str, Any]]
) -> None:
    mounts = {name: {volume.split(":")[1] for volume in service.get("volumes", [])} for name, service in compose["services"].items()}
    processes = [(service["command"], mounts[name]) for name, service in compose["services"].items() if service.get("command")]
    for _, pod in pods(objects):
        files = {volume["name"] for volume in pod["spec"].get("volumes", []) if volume.get("secret", {}).get("secretName") == "dask-tls"}
        for container in pod["spec"]["containers"]:
            mounted = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in files and mount["readOnly"]}
            processes.append((container.get("command", []), mounted))
    dask = [(command, mounted) for command, mounted in processes if command[:1] == ["dask"]]
    assert len(dask) == 4
    assert [command for command, mounted in dask if not speaks_tls(command, mounted)] == []
    runs = [mounted for command, mounted in processes if command[:2] == ["prefect", "worker"]]
    assert len(runs) == 2
    assert all("/tls" in mounted for mounted in runs), "a nightly run that cannot reach the cluster"
    assert "tls:/tls:ro" in compose["services"]["scheduler"]["volumes"]


def test_a_job_of_slurm_speaks_tls_and_does_not_start_without_certificates(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    dask = tmp_path / "bin" / "dask"
    dask.write_text('#!/bin/sh\necho "$@"\n')
    dask.chmod(0o755)
    slurm = {"SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_NODE": "16384", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    given = slurm | {"PATH": os.environ["PATH"], "TDA_VENV": str(tmp_path), "SCHEDULER": "tls://login-1:8786", "TDA_TLS": "/shared/tls"}
    script = ["bash", INFRA / "slurm" / "dask.sbatch"]
    command = ["dask", *subprocess.run(script, env=given, capture_output=True, text=True, check=True).stdout.split()]
    assert speaks_tls(command, {"/shared/tls"})
    for name in ("SCHEDULER", "TDA_TLS"):
        told = subprocess.run(script, env=given | {name: ""}, capture_output=True, text=True, check=False)
        assert told.returncode != 0
        assert name in told.stderr


def test_the_image_is_pinned_and_does_not_run_as_root() -> None:
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    assert all(is_pinned(line.split()[1]) for line in lines if line.startswith("FROM "))
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    copied = {word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]}
    assert all((INFRA.parent / name).exists() for name in copied)
    allowed = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed


def test_workers_are_started_without_the_profiler_that_may_stop_them_for_good() -> None:
    """docs/reliability.md asks it of everybody who starts workers."""
    for name in ("Dockerfile", "slurm/dask.sbatch"):
        assert "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False" in (INFRA / name).read_text().split()


def test_the_job_script_of_slurm_is_a_script_that_slurm_reads() -> None:
    script = INFRA / "slurm" / "dask.sbatch"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    lines = script.read_text().splitlines()
    options = [line.split()[1].partition("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert set(options) == {"--job-name", "--ntasks", "--cpus-per-task", "--mem", "--time", "--output", "--signal"}
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:]), "sbatch reads no options after the first command"
