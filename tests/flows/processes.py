"""Schedulers, workers and flows as processes that may be killed, forked from one that has imported everything: a start takes little."""

import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import dask

_PRELOADED = ["flows.attribute", "flows.cli", "distributed.cli.dask_worker", "distributed.cli.dask_scheduler", "tests.flows.processes"]


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
