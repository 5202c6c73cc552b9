"""A Prefect server that is killed while a run works: the run ends well, or in one line, and the same command goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tda
from infra.settings import quiet_prefect
from tests.flows.runs import CONFIG, command, finished, wait_until, write_config, written


@pytest.mark.soak
@pytest.mark.parametrize("written_before", [5, 60, 130])
def test_a_run_whose_prefect_server_dies_ends_well_or_in_one_line_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_before: int
) -> None:
    quiet_prefect()
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_CLIENT_MAX_RETRIES", "1")
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "infra.prefect_api"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    monkeypatch.setenv("PREFECT_API_URL", server.stdout.readline().strip())  # type: ignore[union-attr]
    config, store = write_config(tmp_path / "config", CONFIG), tmp_path / "store"
    process = command("run", config, "--store", store)
    wait_until(lambda: store.exists() and written(store) >= written_before, process, seconds=120)
    server.send_signal(signal.SIGKILL)
    server.communicate()
    status, _, err = finished(process, timeout=200)
    assert status in (0, 1), err
    if status:
        told = [line for line in err.splitlines() if line.startswith("tda: ")]
        assert len(told) == 1, err
        assert "Prefect's API does not answer any more" in told[0]
        assert "resumes it" in told[0]
        assert "Traceback" not in err, err
    monkeypatch.delenv("PREFECT_API_URL")
    status, _, err = finished(command("run", config, "--store", store, own_api=False))
    assert status == 0, err
    assert tda.open_run(store).manifest["complete"]
