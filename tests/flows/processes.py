"""Schedulers, workers and flows as processes that may be killed, forked from one that has imported everything: a start takes little."""

import multiprocessing
import os
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import dask

_PRELOADED = ["flows.attribute", "flows.cli", "distributed.cli.dask_worker", "distributed.cli.dask_scheduler", "tests.flows.processes"]


@dataclass(frozen=True)
class Forked:
    """The command `tda` with this process's environment, used as `tests.flows.runs.command` is; its output and errors are one text."""

    process: BaseProcess
    log: Path

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it has ended: what it printed, twice."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.log.read_text()}"
        return (self.log.read_text(),) * 2


def forked(log: Path, *arguments: object) -> Forked:
    """`tda` with arguments, which prints into a file of its own.

    Where a test asks how a command starts, ends or what it leaves behind, take `tests.flows.runs.command`.
    """
    log.write_text("")
    return Forked(started(log, dict(os.environ), "tda", *map(str, arguments)), log)


def started(log: Path, environment: dict[str, str], *arguments: str) -> BaseProcess:
    """A process that runs `tda`, `dask_scheduler` or `dask_worker` with arguments; what it prints is added to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_main, args=(os.getpid(), str(log), environment, arguments))
    process.start()
    return process


def _main(parent: int, log: str, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # With it, a worker may stop for good: see infra.cluster.LOCAL_CONFIG.
    dask.config.set({"distributed.worker.profile.enabled": False})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    program, rest = arguments[0], list(arguments[1:])
    if "PREFECT_API_URL" in environment:  # Prefect read its settings when it was imported, before the fork
        from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        held = temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"], PREFECT_CLIENT_MAX_RETRIES: 0})
        held.__enter__()  # to the end of the process
    if program == "tda":
        from flows.cli import status

        code = status(rest)
    else:
        from distributed.cli import dask_scheduler, dask_worker

        code = 0
        {"dask_scheduler": dask_scheduler, "dask_worker": dask_worker}[program].main(rest, standalone_mode=False)
    sys.stdout.flush()
    os._exit(code)


def _end_with(parent: int) -> None:
    """A test that was stopped leaves nothing behind."""
    while Path(f"/proc/{parent}").exists():
        time.sleep(1)
    os._exit(1)
