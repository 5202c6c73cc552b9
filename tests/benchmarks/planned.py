"""What `tda plan` says of a run, beside the run: seconds, and memory of a worker, of each stage.

    python -m tests.benchmarks.planned docs/examples/digits.toml --set problem_options.width=1024 --set problem_options.depth=3

The plan is timed first, on this machine, with the threads that a worker has. The run goes to a folder of its own. Memory is the highest
resident size of any worker process while the stage ran, looked at fifty times a second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

EVERY = 0.02


def main() -> None:
    """Plan, run, and print a table of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of tda run")
    options = parser.parse_args()
    from flows.attribute import request_of
    from flows.cli import status
    from flows.command_plan import hours
    from flows.config import load_config
    from tasks.planned import on_paper, readable
    from tasks.projected import project
    from tasks.timed import measured_flops

    config = load_config(options.config, options.set)
    paper, workers = on_paper(request_of(config)), config.cluster.workers
    assert paper.opened is not None, "a model on paper cannot be run"
    work = paper.work(workers)
    flops, seen = measured_flops(paper.opened, work), Seen()
    with tempfile.TemporaryDirectory() as folder:
        if status(["run", options.config, "--store", folder, *(word for each in options.set for word in ("--set", each))]):
            sys.exit(1)
        import tda

        timings = tda.open_run(folder).manifest["timings"]
        stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    stages = project(work)
    print(f"\n{'stage':<32}{'planned':>10}{'took':>10}{'planned':>12}{'held':>12}")
    for stage in stages:
        planned, took = (hours(stage, workers, flops) or 0.0) * 3600, timings[stage.name]["wall"]
        held = readable(seen.highest.get(stage.name, 0))
        print(f"{stage.name:<32}{planned:>8.2f} s{took:>8.2f} s{readable(stage.peak):>12}{held:>12}")
    planned, took = sum((hours(stage, workers, flops) or 0.0) * 3600 for stage in stages), sum(timings[s.name]["wall"] for s in stages)
    peak, held = max(stage.peak for stage in stages), max(seen.highest.values())
    print(f"{'all, and the most':<32}{planned:>8.2f} s{took:>8.2f} s{readable(peak):>12}{readable(held):>12}")
    print(f"{'':<32}{planned / took:>8.2f} x{'':>10}{peak / held:>10.2f} x")
    print(f"{workers} workers of {flops:.2g} operations a second (timed); the store holds {readable(stored)}")
    print(f"planned to be kept: {readable(sum(stage.kept for stage in stages))}, before compression")


class Seen:
    """The highest resident size of this process's worker processes while each stage runs, in bytes."""

    def __init__(self) -> None:
        from flows import stages

        self.highest: dict[str, int] = {}
        self.stage: str | None = None
        original = stages.run_shards

        def watched(*arguments: Any, stage: str, **keywords: Any) -> list[Any]:
            self.stage = stage
            try:
                return original(*arguments, stage=stage, **keywords)
            finally:
                self.stage = None

        stages.run_shards = watched  # type: ignore[attr-defined]
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        me, workers, looked = psutil.Process(), [], 0.0
        while True:
            if time.monotonic() - looked > 1:
                workers = [child for child in me.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]
                looked = time.monotonic()
            if self.stage is not None:
                for worker in workers:
                    try:
                        size = worker.memory_info().rss
                    except psutil.NoSuchProcess:
                        continue
                    self.highest[self.stage] = max(self.highest.get(self.stage, 0), size)
            time.sleep(EVERY)


if __name__ == "__main__":
    main()
