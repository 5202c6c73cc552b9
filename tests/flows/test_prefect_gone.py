"""Prefect's server may vanish at any moment: a run that works goes on, one that cannot begin says so, and nothing is lost."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows import attribute as flow
from flows.failures import RunFailed
from tests.flows.prefect_server import PrefectServer
from tests.flows.runs import attribute, digests, wait_until, write_config, written


@contextmanager
def using(server: PrefectServer) -> Iterator[None]:
    """Let this process use it; without the pauses in which a server may start again."""
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with temporary_settings({PREFECT_API_URL: server.url, PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def undisturbed(config: Path, single: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digests(attribute(config, str(tmp_path_factory.mktemp("undisturbed")), single)[1])


def test_a_run_whose_prefect_server_is_killed_goes_on_to_the_same_bytes_and_says_who_does_not_know(
    config: Path, single: str, undisturbed: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server, store = PrefectServer(tmp_path / "prefect"), tmp_path / "store"

    def kill() -> None:
        wait_until(lambda: store.exists() and written(store) >= 10)
        server.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with using(server):
        summary, run = attribute(config, str(store), single)
    killer.join()
    assert run.id == summary.run_id
    assert run.manifest["complete"]
    assert digests(run) == undisturbed
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tda: ")]
    assert len(said) == 1
    assert f"Prefect's server at {server.url} does not answer any more" in said[0]
    assert "complete" in said[0]


def test_a_run_that_cannot_begin_without_its_server_names_it_and_the_same_command_finishes_with_another_one(
    config: Path, single: str, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, examine = PrefectServer(tmp_path / "prefect"), flow.examine

    def killed_meanwhile(request: object) -> object:
        server.kill()
        return examine(request)

    with monkeypatch.context() as patch, using(server):
        patch.setattr(flow, "examine", killed_meanwhile)
        with pytest.raises(RunFailed) as caught:
            attribute(config, str(tmp_path / "store"), single)
    said = str(caught.value)
    assert said.count("\n") == 0
    assert said.startswith(f"Prefect's server at {server.url} does not answer any more (ConnectError")
    assert f"start it again or unset PREFECT_API_URL, and `tda run {config}` resumes it" in said
    assert digests(attribute(config, str(tmp_path / "store"), single)[1]) == undisturbed
