"""What object storage does on a bad day costs time and nothing else: a run through a proxy that injects faults has the same bytes."""

import os
from pathlib import Path

import pytest

from infra import storage
from tda import location
from tda.errors import StoreUnreachable
from tda.results import Run
from tests.conftest import use_s3
from tests.faulty_proxy import FAULTS, proxied
from tests.flows.runs import CONFIG, attribute, digests, write_config


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDA_STORAGE_WAIT", "0.01")
    monkeypatch.setenv("TDA_STORAGE_TIMEOUT", "0.4")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = CONFIG.replace("shard_size = 2", "shard_size = 8").replace("query_block = 3", "")
    return write_config(tmp_path_factory.mktemp("config"), text + "[cluster]\nworkers = 1\n")


@pytest.fixture(scope="module")
def on_disk(config: Path, single: str) -> Run:
    return attribute(config, f"{config.parent}/store", single)[1]


def disturbed(config: Path, bucket: str, on_disk: Run, monkeypatch: pytest.MonkeyPatch, rate: float, seed: int) -> None:
    """A whole run through the proxy; its results are read without it."""
    server = endpoint()
    with proxied(server, seed=seed, rate=rate) as (url, proxy):
        use_s3(monkeypatch, url)
        _, run = attribute(config, f"{bucket}/store")
    use_s3(monkeypatch, server)
    assert digests(run) == digests(on_disk)
    assert sum(proxy.injected.values()) > rate * proxy.requests / 3
    if rate >= 0.1:
        assert set(proxy.injected) == set(FAULTS), "every kind of fault came up"


@pytest.mark.parametrize(
    ("rate", "seed"), [(0.2, 0), *(pytest.param(rate, seed, marks=pytest.mark.soak) for rate in (0.01, 0.05, 0.2) for seed in (1, 2, 3))]
)
def test_a_run_through_faults_has_the_bytes_of_an_undisturbed_one(
    config: Path, on_disk: Run, moto_s3: str, monkeypatch: pytest.MonkeyPatch, rate: float, seed: int
) -> None:
    disturbed(config, moto_s3, on_disk, monkeypatch, rate, seed)


@pytest.mark.s3
@pytest.mark.soak
@pytest.mark.parametrize("rate", [0.1])
def test_a_run_through_faults_on_a_real_server_has_the_bytes_of_an_undisturbed_one(
    config: Path, on_disk: Run, rgw_s3: str, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    disturbed(config, rgw_s3, on_disk, monkeypatch, rate, 7)


def endpoint() -> str:
    return os.environ["AWS_ENDPOINT_URL"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_read_is_tried_again_after_each_kind_of_fault(moto_s3: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    server = endpoint()
    storage.write_bytes(f"{moto_s3}/store/a", bytes(range(256)) * 64)
    with proxied(server, seed=1, rate=0.5, kinds=(kind,)) as (url, proxy):
        use_s3(monkeypatch, url)
        for _ in range(3):
            assert location.read_bytes(f"{moto_s3}/store/a") == bytes(range(256)) * 64
            assert location.read_range(f"{moto_s3}/store/a", 100, 200) == bytes(range(100, 200))
        assert location.exists(f"{moto_s3}/store/a")
        assert location.list_names(f"{moto_s3}/store") == ["a"]
        assert not location.exists(f"{moto_s3}/store/b")
        assert proxy.injected[kind]
        monkeypatch.setenv("TDA_STORAGE_ATTEMPTS", "3")
        proxy.rate = 1.0
        with pytest.raises(StoreUnreachable) as caught:
            location.read_bytes(f"{moto_s3}/store/a")
        assert "\n" not in str(caught.value)
        proxy.rate = 0.0
    use_s3(monkeypatch, server)
