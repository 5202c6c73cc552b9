"""How the system scales: workers of this machine on compute-bound shards, and a simulated thousand on a real scheduler.

    python -m tests.benchmarks.scaling                                            # 1 and 2 workers, products of matrices
    python -m tests.benchmarks.scaling --run docs/examples/digits.toml --set ...  # 1 and 2 workers, the shards of a run
    python -m tests.benchmarks.scaling --simulate                                 # 1,000 workers, 100,000 shards

Each measurement of one and two workers stands beside the same shards in plain processes without Dask: what this machine gives, with
whatever else runs on it. --run makes the run twice into folders of its own; --record FILE writes what each of its shards took.

The simulation runs Dask's scheduler in a process of its own, with `run_shards` at one end and, at the other, workers that wait instead of
computing (`tests.benchmarks.played`): for times drawn from those recorded (--times FILE, seconds one per line; 1 s where none are given),
divided by --speed. What is measured is the scheduler: seconds of its processor and bytes of its memory for each shard, and the shards a
second at which it saturates. Processor time is not changed much by what else runs.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
#: While the scheduler takes in 100,000 shards at once on a busy machine, it answers nobody for longer than Dask would wait.
PATIENT = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "600s", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "600s"}
#: Products of matrices so large that nothing but the processor limits a shard.
WIDTH, PRODUCTS, SHARDS = 512, 200, 20


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="CONFIG")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of tda run")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--times", type=Path)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--bytes", type=int, default=2500, help="of a shard's description")
    parser.add_argument("--until", type=int, help="end after so many shards; the rest is known to the scheduler, or would have been")
    parser.add_argument("--window", type=int, help="shards known to the scheduler at a time; run_shards' own when absent")
    options = parser.parse_args()
    if options.simulate:
        simulate(options)
    elif options.run:
        run(options)
    else:
        throughput()


def compute(seed: int) -> float:
    """A shard that does nothing but multiply; its sum keeps it from being left out."""
    import torch

    a = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    total = a
    for _ in range(PRODUCTS):
        total = (a @ total) / WIDTH
    return float(total.sum())


def throughput() -> None:
    """Shards a second at 1 and 2 workers of one thread, with Dask and without."""
    for told, rate in (("without Dask", plain), ("with Dask", clustered)):
        one, two = rate(1), rate(2)
        print(f"{told:<14} 1 worker {one:6.2f} shards/s   2 workers {two:6.2f} shards/s   {two / one:.2f} x", flush=True)


def clustered(workers: int) -> float:
    """Shards a second of workers that have imported what they need."""
    from infra.cluster import ClusterSpec, open_cluster, run_shards

    with open_cluster(ClusterSpec(workers=workers)) as client:
        client.run(compute, 0)  # on each of them
        started = time.perf_counter()
        run_shards(client, compute, range(SHARDS), stage="compute")
        return SHARDS / (time.perf_counter() - started)


def plain(workers: int) -> float:
    """Shards a second of a pool of processes."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with get_context("spawn").Pool(workers) as pool:
            pool.map(_slow_start, range(workers), chunksize=1)
            started = time.perf_counter()
            for _ in pool.imap_unordered(compute, range(SHARDS)):
                pass
            return SHARDS / (time.perf_counter() - started)
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


def _slow_start(seed: int) -> None:
    compute(seed)
    time.sleep(2)  # so that no process warms up twice, and another not at all


def run(options: argparse.Namespace) -> None:
    """The stages of a run at 1 and 2 workers, by what each took from its first shard to its last."""
    from flows import stages
    from flows.attribute import request_of
    from flows.cli import status
    from flows.config import load_config

    taken: list[float] = []
    largest = [0]
    original = stages.run_shards

    def recorded(*arguments: Any, **keywords: Any) -> list[Any]:
        receipts = original(*arguments, **keywords)
        taken.extend(receipt["seconds"] for receipt in receipts)
        largest[0] = max(largest[0], *(len(pickle.dumps(shard)) for shard in arguments[2][:3]))
        return receipts

    stages.run_shards = recorded  # type: ignore[attr-defined]
    request_of(load_config(options.run, options.set))  # what is wrong is told before anything is run
    walls: list[dict[str, dict[str, float]]] = []
    for workers in (1, 2):
        taken.clear()
        with tempfile.TemporaryDirectory() as folder:
            told = [*options.set, f"cluster.workers={workers}"]
            if status(["run", options.run, "--store", folder, *(word for each in told for word in ("--set", each))]):
                sys.exit(1)
            import tda

            walls.append(tda.open_run(folder).manifest["timings"])
        if options.record and workers == 1:
            options.record.write_text("\n".join(f"{seconds:.6f}" for seconds in taken) + "\n")
    print(f"\n{'stage':<34}{'1 worker':>10}{'2 workers':>11}")
    print(f"descriptions of shards are up to {largest[0]:,} bytes")
    shared = [stage for stage in walls[0] if stage not in ("total", "report") and walls[0][stage]["wall"] > 1]
    for stage in shared:
        one, two = (each[stage]["wall"] for each in walls)
        print(f"{stage:<34}{one:>8.1f} s{two:>9.1f} s   {one / two:.2f} x")
    one, two = (sum(each[stage]["wall"] for stage in shared) for each in walls)
    print(f"{'these':<34}{one:>8.1f} s{two:>9.1f} s   {one / two:.2f} x")


def described(shard: tuple[str, int]) -> None:
    """A shard of a long description. No worker computes it: all are played."""


def simulate(options: argparse.Namespace) -> None:
    """One run of so many shards on so many simulated workers."""
    os.environ.update(PATIENT)
    from distributed import Client

    from infra import shards
    from tests.conftest import free_ports

    if options.window:
        shards.WINDOW, shards.WINDOW_PER_WORKER = options.window, 0
    times = [float(t) / options.speed for t in options.times.read_text().split()] if options.times else [1.0 / options.speed]
    draw = random.Random(0)  # noqa: S311
    drawn = [draw.choice(times) for _ in range(options.shards)]
    (port,) = free_ports(1)
    address = f"tcp://127.0.0.1:{port}"
    local = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    scheduler = _start("-c", "from distributed.cli.dask_scheduler import main; main()", *local)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("\n".join(map(str, drawn)))
        file.flush()
        player = _start("-m", "tests.benchmarks.played", address, str(options.workers), file.name)
        try:
            process = psutil.Process(scheduler.pid)
            with Client(address, set_as_default=False, timeout=600) as client:
                client.wait_for_workers(options.workers, timeout=600)
                _measure(client, process, psutil.Process(player.pid), drawn, options)
        finally:
            for each_process in (player, scheduler):
                each_process.kill()
                each_process.wait()


def _measure(client: Any, scheduler: psutil.Process, player: psutil.Process, drawn: list[float], options: argparse.Namespace) -> None:
    from infra import shards

    began, before = time.perf_counter(), _spent(scheduler)
    time.sleep(10)
    beats = (_spent(scheduler) - before) / (time.perf_counter() - began)
    idle, before, own, played = scheduler.memory_info().rss, _spent(scheduler), time.process_time(), _spent(player)
    highest, done, first, began = idle, 0, 0.0, time.perf_counter()

    def watch(_: int) -> None:
        nonlocal highest, done, first
        done += 1
        first = first or _spent(scheduler) - before - beats * (time.perf_counter() - began)
        if done % 1000 == 0 or done == options.until:
            highest = max(highest, scheduler.memory_info().rss)
            print(f"           {done:,} after {time.perf_counter() - began:.0f} s", file=sys.stderr)
        if done == options.until:
            raise Enough

    count, text = len(drawn), "x" * options.bytes
    with suppress(Enough):
        shards.run_shards(client, described, [(text, i) for i in range(count)], stage="simulated", on_done=watch)
    wall, spent = time.perf_counter() - began, _spent(scheduler) - before
    own, played = (time.process_time() - own) / done, (_spent(player) - played) / done
    highest = max(highest, scheduler.memory_info().rss)
    window = min(count, max(shards.WINDOW, shards.WINDOW_PER_WORKER * options.workers))
    ideal, working = sum(drawn[:done]) / options.workers, spent - beats * wall
    each = first / window + (working - first) / done if options.until else working / done
    print(f"{options.workers:,} workers, {count:,} shards of {sum(drawn) / count:.3g} s (up to {max(drawn):.3g} s), window {window:,}")
    print(f"done       {done:,}")
    print(f"wall       {wall:.1f} s, of which {ideal:.1f} s are the shards' own ({ideal / wall:.0%} of the workers' time is used)")
    print(f"scheduler  {each * 1e3:.2f} ms of processor a shard, and {beats:.1%} of a core for heartbeats")
    print(f"           saturates at {(1 - beats) / each:.0f} shards/s; was at work {spent / wall:.0%} of the time")
    print(f"run_shards {own * 1e3:.2f} ms of processor a shard; the played workers {played * 1e3:.2f} ms, with their heartbeats")
    known = (highest - idle) / window
    print(f"memory     {idle >> 20} MiB before, {highest >> 20} MiB at most: {known:.0f} bytes for each shard known at once")


class Enough(Exception):  # noqa: N818
    """So many shards are done as were asked for."""


def _spent(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "DASK_LOGGING__DISTRIBUTED": "error",
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1h",
    }
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=environment)


if __name__ == "__main__":
    main()
