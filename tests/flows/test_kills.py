"""Whatever is killed, and whenever: the same command finishes the run with the same bytes, and no shard that was finished is done again.

A campaign is a sequence of runs of one configuration into fresh stores. In each, processes are killed (SIGKILL) at moments drawn by a
seed, and the same command is given again until the run comes through. Killed are workers, the scheduler, the process of the flow, and,
where there is time for it, a Prefect server.
"""

import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import tda
from tests.conftest import free_ports
from tests.flows.prefect_server import PrefectServer
from tests.flows.processes import started
from tests.flows.runs import CONFIG, PROBLEM, digests, wait_until, write_config, written

WORKERS = 2
TARGETS = ("worker", "scheduler", "flow")
ALL = (*TARGETS, "server")


@dataclass
class Cluster:
    """A Dask scheduler and its workers, each a process that is started again when it has been killed."""

    folder: Path
    port: int
    scheduler: BaseProcess | None = None
    workers: list[BaseProcess] = field(default_factory=list)
    server: PrefectServer | None = None
    """Prefect's, where it is killed too."""

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(self, *arguments: str) -> BaseProcess:
        return started(self.folder / "cluster.log", {"TDA_TEST_WORKER": "1"}, *arguments)

    def mend(self) -> None:
        """Start what is not there."""
        if self.server is not None:
            self.server.start()
        if self.scheduler is None or not self.scheduler.is_alive():
            for worker in self.workers:  # without their scheduler they end by themselves, sooner or later
                gone(worker)
            place = ("--host", "127.0.0.1", "--port", str(self.port), "--dashboard-address", "127.0.0.1:0")
            self.scheduler = self.start("dask_scheduler", *place, "--no-dashboard")
        self.workers = [worker for worker in self.workers if worker.is_alive()]
        scratch = ("--local-directory", str(self.folder / "scratch"))
        while len(self.workers) < WORKERS:
            alone = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0")
            self.workers.append(self.start("dask_worker", self.address, *alone, *scratch))


def gone(process: BaseProcess) -> None:
    process.kill()
    process.join()


@contextmanager
def cluster_of(folder: Path, targets: tuple[str, ...] = TARGETS) -> Iterator[Cluster]:
    found = Cluster(folder, free_ports(1)[0], server=PrefectServer(folder / "prefect") if "server" in targets else None)
    found.mend()
    try:
        yield found
    finally:
        for process in [*found.workers, *([found.scheduler] if found.scheduler else [])]:
            gone(process)
        if found.server is not None:
            found.server.kill()


@dataclass
class Told:
    """What a campaign did and found."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    differing: int = 0
    lost: int = 0
    tasks: int = 0
    repeated: int = 0
    in_flight: int = 0
    over: int = 0
    """How many runs did more again than was in flight when something was killed."""
    waiting: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} of {name}s" for name, count in sorted(self.kills.items()))
        return (
            f"{sum(self.kills.values())} kills ({kinds}) in {self.runs} runs: {self.differing} objects differ, {self.lost} scores lost; "
            f"{self.repeated} of {self.tasks} tasks begun again, {self.in_flight} in flight at most, {self.over} runs above that"
        )


def begun(traps: Path) -> int:
    """How many tasks have read a shard: each reads the second of its two examples once. But for the first shard, which a worker also
    reads when it opens the problem, and the last, which has no second."""
    log = traps / "reads.log"
    return sum(int(line) % 2 == 1 and int(line) > 1 for line in log.read_text().split()) if log.exists() else 0


def run(config: Path, store: Path, cluster: Cluster) -> BaseProcess:
    override = f'cluster={{kind="address", address="{cluster.address}"}}'
    (cluster.folder / "run.log").unlink(missing_ok=True)
    environment = {} if cluster.server is None else {"PREFECT_API_URL": cluster.server.url}
    return started(cluster.folder / "run.log", environment, "tda", "run", str(config), "--store", str(store), "--set", override)


def finished(process: BaseProcess, cluster: Cluster) -> tuple[int | None, str]:
    """Exit status of a run, and what it printed."""
    process.join(240)
    log = cluster.folder / "run.log"
    return process.exitcode, log.read_text() if log.exists() else ""


def killed(config: Path, store: Path, cluster: Cluster, rng: random.Random, told: Told, whole: int) -> tuple[str, bool]:
    """Start the run, and kill something at a random moment: what was killed, "" where the run was over before; whether it is complete."""
    cluster.mend()
    process = run(config, store, cluster)
    moment = (written(store) if store.exists() else 0) + rng.randrange(1, max(2, whole // 2))
    wait_until(lambda: not process.is_alive() or (store.exists() and written(store) >= moment), seconds=240)
    if not process.is_alive():
        status, err = finished(process, cluster)
        assert status == 0, err
        return "", True
    if not told.waiting:  # each as often as the others, in a random order
        targets = TARGETS if cluster.server is None else ALL
        told.waiting = rng.sample(targets, len(targets))
    target = told.waiting.pop()
    assert cluster.scheduler is not None
    if target == "server":
        assert cluster.server is not None
        cluster.server.kill()
    else:
        gone({"worker": rng.choice(cluster.workers), "scheduler": cluster.scheduler, "flow": process}[target])
    told.kills[target] += 1
    cluster.mend()
    status, err = finished(process, cluster)
    assert target != "worker" or status == 0, f"a lost worker does not end a run: {err}"
    if target == "server":  # missed at the end only, if the flow has begun
        assert status in {0, 1}, err
        assert "Prefect's server at" in err, err
    if target == "scheduler":
        lines = [line for line in err.splitlines() if line.startswith("tda: ")]
        assert status == 0 or (status == 1 and len(lines) == 1 and "resumes it" in lines[0]), err
    return target, status == 0


def campaign(config: Path, traps: Path, undisturbed: dict[str, str], cluster: Cluster, seed: int, kills: int) -> Told:
    """Runs into fresh stores, killed now and then, until there were so many kills."""
    told, rng, folder = Told(), random.Random(seed), config.parent.parent  # noqa: S311
    whole, alone = written(folder / "undisturbed"), begun(traps)
    while sum(told.kills.values()) < kills:
        (traps / "reads.log").unlink(missing_ok=True)
        store, in_flight = folder / f"store-{told.runs}", 0
        told.runs += 1
        for _ in range(min(rng.randrange(1, 6), kills - sum(told.kills.values()))):
            target, complete = killed(config, store, cluster, rng, told, whole)
            in_flight += {"": 0, "worker": 1, "scheduler": WORKERS, "flow": WORKERS, "server": 0}[target]
            if complete:
                break
        else:
            cluster.mend()
            status, err = finished(run(config, store, cluster), cluster)
            assert status == 0, err
        found = tda.open_run(store)
        same = digests(found)
        told.differing += sum(same.get(name) != digest for name, digest in undisturbed.items()) + len(same.keys() - undisturbed.keys())
        told.lost += int(found.influence.isnull().sum())
        repeated = begun(traps) - alone
        told.tasks, told.repeated, told.in_flight = told.tasks + alone, told.repeated + repeated, told.in_flight + in_flight
        told.over += repeated > in_flight
        sys.stderr.write(f"{told}\n")
        shutil.rmtree(store)
    return told


@pytest.mark.parametrize(
    ("kills", "seed", "targets"), [(3, 0, TARGETS), pytest.param(52, 1, ALL, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_killed_at_random_moments_runs_end_with_the_same_bytes_and_repeat_no_more_than_was_in_flight(
    tmp_path: Path, prefect_api: None, kills: int, seed: int, targets: tuple[str, ...]
) -> None:
    traps = tmp_path / "traps"
    traps.mkdir()
    text = CONFIG.replace("shard_size = 2", f'shard_size = 2\nproblem_options = {{traps = "{traps}"}}')
    # Workers are no children of multiprocessing here.
    problem = PROBLEM.replace("multiprocessing.parent_process() is not None", 'os.environ.get("TDA_TEST_WORKER")')
    config = write_config(tmp_path / "config", text, problem)
    with cluster_of(tmp_path, targets) as cluster:
        status, err = finished(run(config, tmp_path / "undisturbed", cluster), cluster)
        assert status == 0, err
        undisturbed = digests(tda.open_run(tmp_path / "undisturbed"))
        told = campaign(config, traps, undisturbed, cluster, seed, kills)
    assert (told.differing, told.lost, told.over) == (0, 0, 0), str(told)
