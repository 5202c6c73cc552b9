"""What `tda doctor` looks at: storage, cluster, Prefect, GPU; each finding says what to mend."""

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Each of these breaks something in silence when the version is outside.
PINS = {
    "prefect": (">=3.8.8,<3.9", "3.9 asks for a certifi that is not published"),
    "fastapi": ("<0.151", "newer: Prefect's server fails on import"),
    "sqlalchemy": (">=2,<2.1", "newer: Prefect's cron scheduler creates no runs"),
}
WORKER_TIMEOUT = 60  # seconds


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it works, what was seen, and what to do where it does not."""

    what: str
    works: bool
    seen: str
    mend: str = ""


def examine(store: str) -> list[Finding]:
    """Look at everything that a run needs, with the store at this URL; no check raises."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("Python", _python),
        ("storage", lambda: _storage(store)),
        ("cluster", _cluster),
        ("Prefect", _prefect),
        ("versions", _versions),
        ("GPU", _gpu),
    ]
    return [_guarded(what, check) for what, check in checks]


def print_findings(findings: Sequence[Finding]) -> bool:
    """Print a table of the findings; whether all of them work."""
    from flows.tables import print_table

    print_table(
        ["", "check", "found", "to mend it"],
        [["ok" if finding.works else "FAIL", finding.what, finding.seen, finding.mend] for finding in findings],
    )
    return all(finding.works for finding in findings)


def _guarded(what: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # noqa: BLE001  (a check that breaks is a finding too)
        return Finding(what, works=False, seen=" ".join(f"{type(error).__name__}: {error}".split()), mend="see the message")


def _python() -> Finding:
    return Finding("Python", works=True, seen=f"{platform.python_version()} at {sys.executable}")


def _storage(store: str) -> Finding:
    from infra.storage import StoreError, check_store
    from tda.errors import InputError
    from tda.location import resolve

    try:
        url = resolve(store)
        check_store(url)
    except (StoreError, InputError) as error:
        said, _, mend = str(error).partition("; ")
        return Finding("storage", works=False, seen=said, mend=mend)
    return Finding("storage", works=True, seen=f"{url} can be written")


def _cluster() -> Finding:
    from infra.cluster import ClusterSpec, open_cluster, run_shards

    started = time.perf_counter()
    with open_cluster(ClusterSpec(workers=1)) as client:
        (pid,) = run_shards(client, _process_id, [0], stage="doctor")
    if pid == os.getpid():
        return Finding("cluster", works=False, seen="a task ran in this process", mend="look for a dask configuration that overrides ours")
    return Finding("cluster", works=True, seen=f"a local worker ran a task, {time.perf_counter() - started:.1f} s with start and stop")


def _process_id(_: int) -> int:
    return os.getpid()


def _prefect() -> Finding:
    from infra.settings import quiet_prefect

    quiet_prefect()
    started = time.perf_counter()
    try:
        import prefect
        import prefect.server.api.server  # what an embedded run starts; a wrong fastapi breaks here
    except Exception as error:  # noqa: BLE001  (it is the import that is examined)
        seen = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding("Prefect", works=False, seen=f"import fails: {seen}", mend="make venv (the pins are in constraints.txt)")
    server = os.environ.get("PREFECT_API_URL") or "embedded server"
    return Finding("Prefect", works=True, seen=f"{prefect.__version__}, {server}; imported in {time.perf_counter() - started:.1f} s")


def _versions() -> Finding:
    from packaging.specifiers import SpecifierSet

    wrong, found = [], []
    for name, (wanted, why) in PINS.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        found.append(f"{name} {installed}")
        if installed not in SpecifierSet(wanted):
            wrong.append(f"{name} {installed} is not {wanted} ({why})")
    if wrong:
        return Finding("versions", works=False, seen="; ".join(wrong), mend="make venv, or pip install with -c constraints.txt")
    return Finding("versions", works=True, seen=", ".join(found))


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPU", works=True, seen=f"{', '.join(names)} (CUDA {torch.version.cuda})")
    if not Path("/proc/driver/nvidia/version").exists():
        return Finding("GPU", works=True, seen="none; runs use the CPU")
    cause = "this torch is built for the CPU" if torch.version.cuda is None else f"torch (CUDA {torch.version.cuda}) cannot use it"
    return Finding(
        "GPU", works=False, seen=f"a driver is there but {cause}", mend="install a torch wheel built for the driver's CUDA version"
    )
