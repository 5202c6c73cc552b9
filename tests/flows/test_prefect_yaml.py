"""infra/prefect.yaml deploys as it is, and what it deploys is what runs accept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from flows.config import RunConfig
from flows.deployment import ENTRYPOINT
from flows.newest import is_floating
from tda.methods import parse_all

ROOT = Path(__file__).parents[2]
FILE = ROOT / "infra" / "prefect.yaml"
DEPLOYMENTS = yaml.safe_load(FILE.read_text())["deployments"]


def test_every_configuration_in_it_is_one_that_runs_accept() -> None:
    configs = [each["parameters"]["config"] for each in DEPLOYMENTS if isinstance(each["parameters"]["config"], dict)]
    parsed = [RunConfig.model_validate(config) for config in configs]
    assert len(parsed) == len(DEPLOYMENTS) - 1 >= 2
    for each in parsed:
        parse_all(each.methods)
        assert each.store.startswith("s3://"), "a run may start in any folder"
    assert [is_floating(each.checkpoint) for each in parsed] == [False, True]


def test_it_deploys_all_of_them(prefect_api: None) -> None:
    with get_client(sync_client=True) as client:
        if "tda" not in [pool.name for pool in client.read_work_pools()]:
            client.create_work_pool(WorkPoolCreate(name="tda", type="process"))
    command = [Path(sys.executable).with_name("prefect"), "--no-prompt", "deploy", "--prefect-file", FILE, "--all"]
    told = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert told.returncode == 0, told.stdout + told.stderr
    with get_client(sync_client=True) as client:
        for wanted in DEPLOYMENTS:
            found = client.read_deployment_by_name(f"nightly/{wanted['name']}")
            assert found.entrypoint == ENTRYPOINT
            assert found.parameters == wanted["parameters"]
            assert found.global_concurrency_limit.limit == 1
            assert found.concurrency_options.collision_strategy.value == "CANCEL_NEW"
            (schedule,) = found.schedules
            assert (schedule.schedule.cron, schedule.schedule.timezone) == tuple(wanted["schedules"][0].values())
            triggers = [each for each in client.read_automations() if f"{found.id}" in each.model_dump_json()]
            assert [list(each.trigger.expect) for each in triggers] == [each["expect"] for each in wanted.get("triggers", [])]


@pytest.mark.parametrize("name", ["nightly.toml"])
def test_the_slurm_example_is_a_configuration(name: str) -> None:
    from flows.config import load_config

    assert load_config(ROOT / "infra" / "slurm" / name).cluster.kind == "address"
