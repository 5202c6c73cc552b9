"""Whatever is killed and whenever, the same command finishes the run; what was done is not done again; what fails is told in one line."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import tda
from flows import cli
from flows.attribute import RunFailed
from tda.errors import InputError
from tda.results import Run
from tests.flows.processes import forked
from tests.flows.runs import (
    CONFIG,
    attribute,
    command,
    digests,
    finished,
    left_behind,
    manifests,
    objects,
    reads,
    wait_until,
    write_config,
    written,
)

LOCAL = '[cluster]\nworkers = 1\nmemory_limit = "2GB"\n'


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    folder = tmp_path / "traps"
    folder.mkdir()
    return folder


@pytest.fixture
def config(tmp_path: Path, traps: Path) -> Path:
    # Half of the training examples per shard of the tests of whole runs: many places to be killed at.
    text = CONFIG.replace("shard_size = 2", f'shard_size = 2\nproblem_options = {{traps = "{traps}"}}')
    return write_config(tmp_path / "config", text + LOCAL)


@pytest.fixture(scope="module")
def undisturbed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Traps are not part of the bytes: one run for all tests."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return attribute(write_config(folder / "config"), f"{folder}/store", cluster)[1]


@pytest.fixture
def again(config: Path, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[str, str]]:
    """The same command once more, in this process and on workers that stay; it has to end well. What it printed."""

    def run() -> tuple[str, str]:
        capsys.readouterr()
        status = cli.status(["run", str(config), "--store", str(tmp_path / "store"), "--set", cluster])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out, printed.err

    return run


@pytest.mark.parametrize("kills", [1, pytest.param(15, marks=pytest.mark.soak)])
def test_killed_again_and_again_a_run_ends_under_its_first_id_with_the_same_bytes(
    config: Path, undisturbed: Run, again: Callable[[], tuple[str, str]], tmp_path: Path, kills: int
) -> None:
    store, rng = tmp_path / "store", random.Random(0)  # noqa: S311
    whole = len(objects(undisturbed.store))
    ids: set[str] = set()
    for kill in range(kills):
        # Each a little further: at once, then between any two objects that a run writes.
        target = written(store) + rng.randrange(1, max(2, 2 * whole // kills)) if store.exists() else 1
        process = command("run", config, "--store", store, "--set", "cluster.workers=2", marker=str(tmp_path), own_api=kill == 1)
        wait_until(lambda target=target, process=process: written(store) >= target or process.poll() is not None)  # type: ignore[misc]
        process.kill()
        process.communicate()
        ids |= set(manifests(store))
        wait_until(lambda: not left_behind(str(tmp_path)), seconds=20)
    for folder in (*store.glob("runs/*"), *store.glob("artifacts/factors/*/partial")):
        (folder / ".0.0a1b2c.partial").touch()  # as a writer leaves it that is killed at the wrong moment
    out, _ = again()
    assert not list(store.rglob("*.partial"))
    ids |= set(manifests(store))
    assert len(ids) == 1, "every try took up the same run"
    assert f"run      {min(ids)}" in out
    assert digests(tda.open_run(store)) == digests(undisturbed)
    assert not [name for name in objects(f"file://{store}/artifacts") if "/partial/" in name]


def test_a_killed_run_does_not_redo_the_shards_that_it_had_finished(
    config: Path, traps: Path, tmp_path: Path, undisturbed: Run, again: Callable[[], tuple[str, str]], cluster: str
) -> None:
    store = tmp_path / "store"
    (traps / "slow").touch()
    process = forked(tmp_path / "run.log", "run", config, "--store", store, "--set", cluster)
    wait_until(lambda: len(list(store.glob("runs/*/receipts/scores/*.json"))) >= 5, process, seconds=120)
    process.kill()
    process.communicate()
    (traps / "slow").unlink()
    receipts = {file: file.stat().st_mtime_ns for file in store.glob("runs/*/receipts/scores/*.json")}
    done = {int(file.name[:6]) for file in receipts if file.name.endswith("-000000.json")}
    time.sleep(0.5)  # a worker in the middle of a shard may still finish it
    (traps / "reads.log").unlink()
    _, err = again()
    assert "resuming run" in err
    assert "covariances" not in err, "no fit"
    assert {file: file.stat().st_mtime_ns for file in receipts} == receipts
    read = set(reads(traps))
    assert read
    blocks = 2
    finished_shards = {shard for shard in done if sum(file.name.startswith(f"{shard:06d}") for file in receipts) == blocks}
    # Example 0 is read when a model is opened.
    assert not {example // 2 for example in read - {0}} & finished_shards
    assert digests(tda.open_run(store)) == digests(undisturbed)


def test_two_runs_of_one_configuration_at_once_both_end_well(config: Path, undisturbed: Run, tmp_path: Path, cluster: str) -> None:
    store = tmp_path / "store"
    both = [forked(tmp_path / f"run-{i}.log", "run", config, "--store", store, "--set", cluster) for i in range(2)]
    for status, _, err in map(finished, both):
        assert status == 0, err
    for run in manifests(store):
        assert digests(tda.open_run(store, run)) == digests(undisturbed)


@pytest.mark.parametrize("example", [0, 22])
def test_a_worker_that_dies_in_a_shard_costs_nothing_but_time(
    config: Path, undisturbed: Run, traps: Path, tmp_path: Path, cluster: str, example: int
) -> None:
    (traps / f"die-{example}").touch()
    _, run = attribute(config, f"{tmp_path}/store", cluster)
    assert not (traps / f"die-{example}").exists(), "it has sprung"
    assert digests(run) == digests(undisturbed)


def test_a_shard_that_always_fails_ends_the_run_with_one_line_and_the_way_on(
    config: Path, undisturbed: Run, traps: Path, tmp_path: Path, cluster: str
) -> None:
    store = tmp_path / "store"
    (traps / "fail-9").touch()
    status, _, err = finished(command("run", config, "--store", store, marker=str(tmp_path), own_api=True))
    assert status == 1
    told = [line for line in err.splitlines() if not line.endswith(" done")]
    assert len(told) == 1, err
    for words in ("stage 'covariances", "shard 4: RuntimeError: example 9 is cursed", f"kept in file://{store}", f"`tda run {config}"):
        assert words in told[0]
    assert not left_behind(str(tmp_path))
    partial = list(store.glob("artifacts/factors/*/partial/covariance/000000/0/*"))
    kept = {file: file.stat().st_mtime_ns for file in partial}
    assert kept, "the other shards are kept"
    (traps / "fail-9").unlink()
    resume = told[0].split("`")[1].split()
    assert resume[:2] == ["tda", "run"]
    assert cli.status([*resume[1:], "--set", cluster]) == 0
    assert digests(tda.open_run(store)) == digests(undisturbed)


def test_what_a_data_source_cannot_read_is_a_failed_run_and_not_wrong_input(
    config: Path, traps: Path, tmp_path: Path, cluster: str
) -> None:
    (traps / "misread-9").touch()
    with pytest.raises(RunFailed, match=r"shard 4: OSError: \[Errno 5\] Input/output error.*resumes it"):
        attribute(config, f"{tmp_path}/store", cluster)


@pytest.mark.parametrize(
    ("methods", "stage"), [('[{name = "graddot"}]', "scores"), ('[{name = "ekfac", fisher = "exact"}]', r"covariances \(exact\)")]
)
def test_wrong_input_that_only_a_shard_can_see_names_example_and_shard(
    config: Path, traps: Path, tmp_path: Path, cluster: str, methods: str, stage: str
) -> None:
    (traps / "nan-9").touch()
    with pytest.raises(
        InputError, match=f"the loss of train example 9 is nan.*stage '{stage}', shard 4; what is finished is kept in"
    ) as caught:
        attribute(config, f"{tmp_path}/store", cluster, f"methods={methods}")
    assert "\n" not in str(caught.value)


def test_ctrl_c_ends_a_run_with_one_line_no_orphans_and_the_same_command_resumes(
    config: Path, undisturbed: Run, traps: Path, tmp_path: Path, prefect_api: None
) -> None:
    store = tmp_path / "store"
    (traps / "slow").touch()
    process = command("run", config, "--store", store, marker=str(tmp_path), own_api=True, start_new_session=True)
    try:
        wait_until(lambda: len(list(store.glob("artifacts/factors/*/partial/covariance/000000/0/*"))) >= 2, process, seconds=120)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
        with suppress(subprocess.TimeoutExpired):
            process.wait(6)
        if process.poll() is None:  # Python drops an interrupt that meets a finaliser; a user presses again
            os.killpg(process.pid, signal.SIGINT)
        status, _, err = finished(process, timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert status == 130
    told = [line for line in err.splitlines() if not line.endswith(" done")]
    assert told == ["tda: interrupted; the same command resumes"]
    assert not left_behind(str(tmp_path))
    (traps / "slow").unlink()
    status, _, err = finished(command("run", config, "--store", store))
    assert status == 0, err
    assert len(manifests(store)) == 1
    assert digests(tda.open_run(store)) == digests(undisturbed)
