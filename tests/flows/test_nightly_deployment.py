"""`tda nightly` declares a deployment: whatever an earlier call made is replaced by what this one asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Pending

from flows import cli
from flows.nightly import UNCHANGED
from tests.flows.runs import finished, wait_until, write_config
from tests.flows.test_nightly import CONFIG, fire, write_checkpoint

pytestmark = pytest.mark.usefixtures("prefect_api")
BLOCK = "https://hooks.example.org/secret-part"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = write_config(tmp_path / "config", CONFIG)
    (path.parent / "ckpt").mkdir()
    write_checkpoint(path, 1, at=1000)
    return path


def deployed(name: str):
    """The deployment and the automations that are about it."""
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(f"nightly/{name}")
        return found, [each for each in client.read_automations() if str(found.id) in each.model_dump_json()]


def tda(*words: object) -> int:
    return cli.status([str(word) for word in words])


def test_a_deployment_holds_the_resolved_configuration_and_excludes_overlapping_runs(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tda("nightly", config, "--name", "one", "--cron", "30 1 * * 1-5", "--timezone", "Europe/Berlin", "--store", tmp_path / "s") == 0
    found, automations = deployed("one")
    assert found.parameters["config"]["checkpoint"] == f"file://{config.parent}/ckpt/step-*.safetensors", "found anew every night"
    assert found.parameters["config"]["problem"] == f"{config.parent}/tiny.py:Tiny"
    assert found.parameters["config"]["store"] == f"file://{tmp_path}/s"
    (schedule,) = found.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone, schedule.active) == ("30 1 * * 1-5", "Europe/Berlin", True)
    assert found.global_concurrency_limit.limit == 1
    assert found.concurrency_options.collision_strategy.value == "CANCEL_NEW"
    assert found.tags == ["tda", "Tiny"]
    assert automations == []
    printed = capsys.readouterr().out
    for words in (
        "nightly/one",
        "next 20",
        "01:30 CE",
        "prefect worker start --pool tda",
        "prefect deployment run nightly/one",
        str(found.id),
    ):
        assert words in printed
    assert f"now file://{config.parent}/ckpt/step-1.safetensors" in printed


def test_a_second_call_replaces_what_the_first_declared_and_keeps_the_pool(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tda("nightly", config, "--name", "two", "--pool", "nights", "--notify", BLOCK, "--event", "tda.checkpoint.published") == 0
    before, automations = deployed("two")
    assert len(automations) == 2
    with get_client(sync_client=True) as client:
        client.request("PATCH", "/work_pools/nights", json={"concurrency_limit": 3})
    assert tda("nightly", config, "--name", "two", "--pool", "nights", "--cron", "0 5 * * *", "--overlap", "wait", "--set", "seed=3") == 0
    after, automations = deployed("two")
    assert after.id == before.id
    assert [each.schedule.cron for each in after.schedules] == ["0 5 * * *"]
    assert after.parameters["config"]["seed"] == 3
    assert after.concurrency_options.collision_strategy.value == "ENQUEUE"
    assert automations == []
    with get_client(sync_client=True) as client:
        assert client.read_work_pool("nights").concurrency_limit == 3
    other = config.with_name("other.toml")
    other.write_text(config.read_text())
    capsys.readouterr()
    assert tda("nightly", other, "--name", "two") == 0
    assert f"before: of {config}" in capsys.readouterr().out


def test_a_run_that_begins_beside_an_unfinished_one_is_cancelled_and_says_so(config: Path) -> None:
    assert tda("nightly", config, "--name", "alone") == 0
    with get_client(sync_client=True) as client:
        first, second = (client.create_flow_run_from_deployment(deployed("alone")[0].id).id for _ in range(2))
        for each in (first, second):
            client.set_flow_run_state(each, Pending())
        assert client.read_flow_run(first).state.is_pending()
        kept_out = client.read_flow_run(second).state
    assert kept_out.is_cancelled()
    assert kept_out.message == "Deployment concurrency limit reached."


def test_failures_of_this_deployment_alone_are_told_and_the_hook_is_a_secret(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tda("nightly", config, "--name", "three", "--notify", BLOCK) == 0
    found, (automation,) = deployed("three")
    trigger = automation.trigger
    assert {f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "Late")} <= set(trigger.expect)
    assert trigger.match_related.root["prefect.resource.id"] == f"prefect.deployment.{found.id}"
    (action,) = automation.actions
    assert action.type == "send-notification"
    with get_client(sync_client=True) as client:
        block = client.request("GET", f"/block_documents/{action.block_document_id}").json()
    assert block["name"] == "tda-nightly-three"
    assert "secret-part" not in json.dumps(block) + capsys.readouterr().out
    assert tda("nightly", config, "--name", "four", "--notify", "custom-webhook/tda-nightly-three") == 0
    assert deployed("four")[1][0].actions[0].block_document_id == action.block_document_id


def test_an_event_starts_a_run_of_it(config: Path) -> None:
    assert tda("nightly", config, "--name", "five", "--event", "tda.checkpoint.published") == 0
    found, (automation,) = deployed("five")
    assert automation.trigger.expect == {"tda.checkpoint.published"}
    assert [(action.type, action.deployment_id) for action in automation.actions] == [("run-deployment", found.id)]


def test_a_server_that_does_not_know_us_is_told_with_the_way_in(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from httpx import HTTPStatusError, Request, Response
    from prefect.exceptions import PrefectHTTPStatusError

    from flows import deployment

    def refuse(*_: object) -> None:
        request = Request("GET", "http://server/api")
        refused = HTTPStatusError("401", request=request, response=Response(401, request=request, json={}))
        raise PrefectHTTPStatusError.from_httpx_error(refused)

    monkeypatch.setattr(deployment, "_pool", refuse)
    assert tda("nightly", config) == cli.BAD_INPUT
    assert "refuses (401): set PREFECT_API_AUTH_STRING" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cron", "61 2 * * *"], "is no cron expression that ever fires"),
        (["--cron", "0 0 30 2 *"], "is no cron expression that ever fires"),
        (["--timezone", "Mars"], '--timezone "Mars" is not known; give a name'),
        (["--name", "a b"], "give another by --name"),
        (["--notify", "nobody"], "is neither a block"),
        (["--notify", "slack-webhook/none"], "there is no such block; `prefect block ls`"),
        (["--set", "problem=none.py:Tiny"], "does not exist"),
        (["--store", "/proc/none/store"], "/proc/none does not exist"),
    ],
)
def test_wrong_input_is_told_in_one_line_and_nothing_is_deployed(
    config: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tda("nightly", config.rename(config.with_name("wrong.toml")), *words) == cli.BAD_INPUT
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    with get_client(sync_client=True) as client:
        assert "wrong" not in [each.name for each in client.read_deployments()]


def test_a_worker_runs_a_firing_that_has_nothing_to_do_and_says_so(config: Path, cluster: str, tmp_path: Path) -> None:
    assert fire(config, tmp_path / "store", cluster).name == "Completed"
    assert tda("nightly", config, "--name", "six", "--store", tmp_path / "store", "--set", cluster, "--pool", "six") == 0
    with get_client(sync_client=True) as client:
        made = client.create_flow_run_from_deployment(deployed("six")[0].id)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    prefect = Path(sys.executable).with_name("prefect")
    command = [prefect, "worker", "start", "--pool", "six", "--run-once"]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        with get_client(sync_client=True) as client:
            wait_until(lambda: bool(client.read_flow_run(made.id).end_time), seconds=180)
            ended = client.read_flow_run(made.id)
    finally:
        worker.terminate()
        _, said, _ = finished(worker)
    assert ended.state.name == UNCHANGED, said
    assert "nothing to do: no input changed since run" in ended.state.message
