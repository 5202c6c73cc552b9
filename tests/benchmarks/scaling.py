"""How the system scales: workers of this machine on compute-bound shards, and a simulated thousand on a real scheduler.

    python -m tests.benchmarks.scaling              # 1 and 2 workers
    python -m tests.benchmarks.scaling --simulate   # 1,000 workers, 100,000 shards

The simulation runs Dask's scheduler in a process of its own, with `run_shards` at one end and, at the other, Dask's workers, many to a
process, whose shards wait instead of computing: for times drawn from those recorded in a run (--times, seconds one per line; 1 s where
none are given), divided by --speed. What is measured is the scheduler: seconds of its processor and bytes of its memory for each shard,
and the shards a second at which it saturates.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
#: Products of matrices so large that nothing but the processor limits a shard.
WIDTH, PRODUCTS = 512, 200


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2, help="that play the workers")
    parser.add_argument("--times", type=Path)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--window", type=int, help="shards known to the scheduler at a time; run_shards' own when absent")
    parser.add_argument("--play", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        asyncio.run(play(options.play[0], int(options.play[1])))
    elif options.simulate:
        simulate(options)
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
    """Shards a second at 1 and 2 workers of one thread; alternating, the best of three each."""
    from infra.cluster import ClusterSpec, open_cluster, run_shards

    best = {1: 0.0, 2: 0.0}
    for _ in range(3):
        for workers, found in best.items():
            with open_cluster(ClusterSpec(workers=workers)) as client:
                run_shards(client, compute, range(workers), stage="warm")
                started = time.perf_counter()
                run_shards(client, compute, range(40), stage="compute")
                best[workers] = max(found, 40 / (time.perf_counter() - started))
    print(f"1 worker   {best[1]:.2f} shards/s\n2 workers  {best[2]:.2f} shards/s   {best[2] / best[1]:.2f} x")


def wait(seconds: float) -> None:
    """A shard whose time is all that is known of it."""
    time.sleep(seconds)


def simulate(options: argparse.Namespace) -> None:
    """One run of so many shards on so many simulated workers."""
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
    players = []
    try:
        each = options.workers // options.processes
        players = [_start("-m", __spec__.name, "--play", address, str(each)) for _ in range(options.processes)]
        process = psutil.Process(scheduler.pid)
        with Client(address, set_as_default=False, timeout=60) as client:
            client.wait_for_workers(each * options.processes, timeout=600)
            idle, before, own = process.memory_info().rss, sum(process.cpu_times()[:2]), time.process_time()
            highest, started = idle, time.perf_counter()

            def watch(_: int, counted: list[int] = [0]) -> None:  # noqa: B006
                nonlocal highest
                counted[0] += 1
                if counted[0] % 1000 == 0:
                    highest = max(highest, process.memory_info().rss)

            shards.run_shards(client, wait, drawn, stage="simulated", on_done=watch)
            wall, spent = time.perf_counter() - started, sum(process.cpu_times()[:2]) - before
            highest = max(highest, process.memory_info().rss)
        ideal = sum(drawn) / (each * options.processes)
        window = max(shards.WINDOW, shards.WINDOW_PER_WORKER * options.workers)
        print(f"{options.workers} workers, {options.shards} shards of {sum(times) / len(times):.3g} s, window {window}")
        print(f"wall       {wall:.1f} s, of which {ideal:.1f} s are the shards' own ({ideal / wall:.0%} of the workers' time is used)")
        print(
            f"scheduler  {spent / options.shards * 1e3:.2f} ms of processor a shard; it saturates at {options.shards / spent:.0f} shards/s"
        )
        print(f"run_shards {(time.process_time() - own) / options.shards * 1e3:.2f} ms of processor a shard")
        print(f"memory     {idle >> 20} MiB before, {highest >> 20} MiB at most: {(highest - idle) / options.shards:.0f} bytes a shard")
    finally:
        for each_process in (*players, scheduler):
            each_process.kill()
            each_process.wait()


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1h"}
    return subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)


async def play(address: str, count: int) -> None:
    """So many workers of one thread, until this process is ended."""
    import dask
    from distributed import Worker

    quiet = {"distributed.worker.profile.enabled": False, "distributed.admin.system-monitor.interval": "1h"}
    with dask.config.set(quiet):
        options = {"nthreads": 1, "host": "127.0.0.1", "dashboard": False, "memory_limit": 0, "heartbeat_interval": "60s"}
        workers = [await Worker(address, **options) for _ in range(count)]
        await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    main()
