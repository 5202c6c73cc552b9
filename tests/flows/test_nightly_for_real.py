"""Nightly for real: a server, a worker, a schedule that fires by itself, and a browser that looks at it."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import tda
from flows.nightly import UNCHANGED
from tests.conftest import free_ports
from tests.flows.runs import TDA, wait_until, write_config
from tests.flows.test_nightly import CONFIG, write_checkpoint

CHROMIUM = shutil.which("chromium")
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


@dataclass
class Server:
    """A Prefect server, and the environment in which its commands run."""

    url: str
    environment: dict[str, str]
    log: Path

    def runs(self, *names: str) -> list[dict[str, Any]]:
        """Flow runs of `nightly` in states of these names, the first begun first."""
        wanted = {
            "flows": {"name": {"any_": ["nightly"]}},
            "flow_runs": {"state": {"name": {"any_": list(names)}}},
            "sort": "START_TIME_ASC",
        }
        return list(httpx.post(f"{self.url}/api/flow_runs/filter", json=wanted).json())

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/api/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    # What commands of ours set to be quiet is not what a worker has.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_LOGGING")} | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    found = Server(url, environment, tmp_path / "server.log")
    process = started(found, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), log=found.log)
    try:
        wait_until(found.answers, process, 90)
        yield found
    finally:
        stop(process)


def started(server: Server, program: str, *words: str, log: Path) -> subprocess.Popen[bytes]:
    command = [Path(sys.executable).with_name(program), *words]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=server.environment, cwd=log.parent)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.mark.browser
def test_a_deployment_fires_by_itself_and_the_second_firing_does_nothing(server: Server, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config", CONFIG + "[cluster]\nworkers = 1\n")
    (config.parent / "ckpt").mkdir()
    write_checkpoint(config, 1, at=1000)
    store = tmp_path / "store"
    command = [TDA, "nightly", config, "--cron", "* * * * *", "--store", store, "--name", "real", "--event", "tda.checkpoint.published"]
    made = subprocess.run(command, env=server.environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    worker = started(server, "prefect", "worker", "start", "--pool", "tda", log=tmp_path / "worker.log")
    try:
        wait_until(lambda: bool(server.runs("Completed")), worker, 180)
        (first,) = server.runs("Completed")
        (run,) = tda.list_runs(store)["run"]
        opened = tda.open_run(store, run)
        assert opened.manifest["complete"]
        assert opened.influence.shape == (1, 5, 23)
        assert first["auto_scheduled"], "nobody started it"

        wait_until(lambda: bool(server.runs(UNCHANGED)), worker, 120)
        again = server.runs(UNCHANGED)[0]
        assert run in again["state"]["message"]
        assert again["total_run_time"] < 20, "seconds from the start of the flow to its end, on a busy machine"
        assert list(tda.list_runs(store)["run"]) == [run]

        emitted(server, write_checkpoint(config, 2, at=2000))
        wait_until(lambda: len(tda.list_runs(store)) == 2 and all(tda.list_runs(store)["complete"]), worker, 120)
        look(server, first, opened.id, tmp_path)
    finally:
        stop(worker)


def emitted(server: Server, checkpoint: Path) -> None:
    """Tell Prefect of a checkpoint, as a training would."""
    words = [
        Path(sys.executable).with_name("prefect"),
        "event",
        "emit",
        "tda.checkpoint.published",
        "--resource-id",
        f"tda.{checkpoint.name}",
    ]
    told = subprocess.run(words, env=server.environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


def look(server: Server, flow_run: dict[str, Any], run: str, folder: Path) -> None:
    """Open the pages of a flow run and of its table in a browser, as a person would."""
    if CHROMIUM is None:
        pytest.skip("no chromium: install Debian's package of that name")
    from playwright.sync_api import expect, sync_playwright

    wanted = {"artifacts": {"key": {"any_": ["tda-real-top"]}, "flow_run_id": {"any_": [flow_run["id"]]}}}
    (artifact,) = httpx.post(f"{server.url}/api/artifacts/filter", json=wanted).json()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        tab.goto(f"{server.url}/runs/flow-run/{flow_run['id']}")
        expect(tab.get_by_text(f"run {run} is complete").first).to_be_visible(timeout=20_000)
        expect(tab.get_by_text("Completed", exact=True).first).to_be_visible()
        time.sleep(1.5)  # the page fades in
        tab.screenshot(path=folder / "flow-run.png")
        tab.goto(f"{server.url}/artifacts/artifact/{artifact['id']}")
        expect(tab.get_by_role("heading", name=f"Run {run}")).to_be_visible(timeout=20_000)
        assert tab.locator("table tr").count() == 6, "a head and five queries"
        time.sleep(1.5)
        tab.screenshot(path=folder / "table.png")
        browser.close()
