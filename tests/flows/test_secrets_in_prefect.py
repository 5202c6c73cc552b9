"""What Prefect's server is told holds no secrets: states, which notifications quote, log records, artifacts."""

import logging
import os
import sys
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from flows import nightly as flow
from flows import nightly_told
from flows.config import load_config
from tests.flows.runs import PROBLEM, write_config
from tests.flows.test_nightly import CONFIG

SECRET, TOKEN = "correct-horse-battery", "ghp_staple"

LEAKY = PROBLEM.replace('f"example {i} is cursed', f'f"refused: {SECRET} at https://{TOKEN}@host/x?key={SECRET}; cursed')
CHECKED = CONFIG.replace('checkpoint = "ckpt/step-*.safetensors"\n', "")


@pytest.fixture
def masking_logs(monkeypatch: pytest.MonkeyPatch):
    """What a flow of its own process leaves as it is, a test puts back; loud, as under a Prefect worker."""
    before, levels = logging.getLogRecordFactory(), {}
    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        levels[logger] = logger.level
        logger.setLevel("INFO")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    logging.setLogRecordFactory(before)
    for logger, level in levels.items():
        logger.setLevel(level)


def everything(flow_run: str, seconds: float = 20) -> str:
    """All that the server knows of a flow run and those below it, once its log has arrived."""
    end = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while True:
            kinds = ("logs", "flow_runs", "task_runs", "artifacts", "events")
            told = [client.request("POST", f"/{kind}/filter", json={}).text for kind in kinds]
            arrived = flow_run in told[0] and "Finished in state Failed" in told[0] and "refused" in told[2]
            if arrived or time.monotonic() > end:
                return "\n".join(told)
            time.sleep(0.2)


def test_an_error_with_secrets_reaches_the_server_without_them(
    single: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masking_logs: None
) -> None:
    traps = tmp_path / "traps"
    traps.mkdir()
    (traps / "fail-3").touch()
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    text = f'{CHECKED}\n[problem_options]\ntraps = "{traps}"\n'
    # The worker was started before this test, without the variable: what it does not know, the flow's own process does.
    config = load_config(write_config(tmp_path / "config", text, LEAKY), [single], str(tmp_path / "store"), pin=False)
    state = flow.nightly(config.model_dump(mode="json"), str(tmp_path / "config"), return_state=True)
    assert state.is_failed()
    assert "refused: ***" in state.message, "notifications quote this"
    told = everything(str(state.state_details.flow_run_id))
    assert "https://***@host/x?key=***" in told
    assert SECRET not in told
    assert TOKEN not in told


def test_artifacts_hold_no_secrets_and_a_run_is_complete_where_they_cannot_be_made(
    single: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masking_logs: None
) -> None:
    config = write_config(tmp_path / "config", CHECKED)
    parsed = load_config(config, [single], str(tmp_path / "store"), pin=False)
    made: dict[str, str] = {}
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    monkeypatch.setattr(nightly_told, "page", lambda *_: f"a training text with {SECRET}")
    monkeypatch.setattr(nightly_told, "create_markdown_artifact", lambda text, **_: made.update(top=text))
    monkeypatch.setattr(nightly_told, "create_progress_artifact", gone)
    monkeypatch.setattr(nightly_told, "create_link_artifact", gone)
    state = flow.nightly(parsed.model_dump(mode="json"), str(tmp_path / "config"), return_state=True)
    assert made == {"top": "a training text with ***"}
    assert state.is_completed(), state.message
    assert os.environ["DB_PASSWORD"] == SECRET


def gone(*_: object, **__: object) -> None:
    raise ConnectionError("the server is gone")


def test_deployments_whose_names_differ_in_a_mark_do_not_share_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["my-model", "my_model", "my.model", "My-Model", "by-hand", None]
    keys = []
    for name in names:
        monkeypatch.setattr(nightly_told, "deployment", type("Deployment", (), {"name": name}))
        keys.append(nightly_told.key("top"))
    assert keys[0] == "tda-my-model-top"
    assert len(set(keys)) == len(names)
    assert all(key.replace("-", "").isalnum() and key == key.lower() for key in keys)
    for config in ("a", "b"):
        monkeypatch.setattr(nightly_told, "flow_run", type("FlowRun", (), {"parameters": {"config": config}}))
        keys.append(nightly_told.key("top"))
    assert keys[-1] != keys[-2]
