"""Prefect's API for the length of one command: a server process of our own, unless a setting names one that runs elsewhere.

Prefect would start such a server itself, at the first flow, and wait for it. Ours starts while the run's input is still being
examined, spares this process the import of the server's code, and ends with this process however that ends.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from infra.settings import Settings, quiet_prefect

STOP_SECONDS = 5
#: The URLs of servers that this process started.
_OWN: set[str] = set()


class ApiError(RuntimeError):
    """Prefect's API did not start, or does not answer. The message is one line with the way out."""


class Api:
    """A server that is starting or running; `process` is None where a setting names another one."""

    def __init__(self, process: "subprocess.Popen[str] | None") -> None:
        """Args: process: runs `serve`."""
        self._process = process

    @contextmanager
    def used(self) -> Iterator[None]:
        """Wait until the server answers, and let Prefect use it while the block runs.

        Raises:
            ApiError: it ended instead.
        """
        from infra.prefect_events import use_patient_events

        use_patient_events()
        if self._process is None:
            try:
                yield
            finally:
                _drain_events()
            return
        from prefect.settings import PREFECT_API_URL, temporary_settings

        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("http"):
            raise ApiError("Prefect's API does not start; `tda doctor` says what to mend, or set PREFECT_API_URL to a server's")
        _OWN.add(line.strip())
        with temporary_settings({PREFECT_API_URL: line.strip()}):
            try:
                yield
            finally:
                _drain_events()


def _drain_events() -> None:
    """Let what Prefect tells its server in the background arrive, and end the thread that tells it.

    The next server in this process would be told by the same thread, at this one's address, and at exit Prefect waits for it for ever.
    """
    worker = sys.modules.get("prefect.events.worker")
    if worker is not None:
        worker.EventsWorker.drain_all(timeout=STOP_SECONDS)


@contextmanager
def embedded_api() -> Iterator[Api]:
    """An API server for the length of the block; it starts at once, beside what the block does first.

    Raises:
        ApiError: a setting names a server that does not answer.
    """
    quiet_prefect()
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if url:
        _check_answers(url)
        yield Api(None)
        return
    # -P: a folder named "infra" where the user stands is not ours.
    command = [sys.executable, "-P", "-m", "infra.prefect_api"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    process = subprocess.Popen(  # noqa: S603  (our own module)
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
        start_new_session=True,  # Ctrl-C is for the run, which needs the API to the end
    )
    try:
        yield Api(process)
    finally:
        _stop(process)


def gone(error: BaseException) -> str:
    """What to tell where an error means that Prefect's server does not answer any more, or not as it should; empty for any other error."""
    if isinstance(error, RuntimeError) and str(error).startswith("Failed to reach API") and error.__cause__ is not None:
        error = error.__cause__  # so a client says it that is just begun
    if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore") and type(error).__name__ != "PrefectHTTPStatusError":
        return ""
    from prefect.settings import PREFECT_API_URL

    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"Prefect's server at {PREFECT_API_URL.value()} does not answer any more ({said})"


def way_back() -> str:
    """What to do about a server that is gone before a command is given again; empty where the command starts one itself."""
    from prefect.settings import PREFECT_API_URL

    return "" if PREFECT_API_URL.value() in _OWN else "start it again or unset PREFECT_API_URL, and "


def lasting_server(what: str) -> str:
    """The URL of the API of a server that outlives this process; it answers. what: who needs it, for the message.

    Raises:
        ApiError: no setting names a server, or it does not answer.
    """
    quiet_prefect()
    from prefect.settings import PREFECT_API_URL

    url = str(PREFECT_API_URL.value() or "")
    if not url:
        raise ApiError(
            f"{what} needs a Prefect server that stays, and PREFECT_API_URL names none; start one (prefect server start), "
            "then export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    _check_answers(url)
    return url


def _check_answers(url: str) -> None:
    """Any answer will do, a refusal too: what Prefect says about it later is clear enough."""
    import httpx

    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=Settings().connect_timeout)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ApiError(f"no Prefect server answers at PREFECT_API_URL = {url} ({said}); start it, correct the URL, or unset it") from error


def _stop(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def serve() -> None:
    """Run the server until it is terminated or whoever started it is gone; its URL goes to standard output once it answers."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}
    quiet_prefect()
    import socket

    import uvicorn
    from prefect.server.api.server import create_app

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))

    class Telling(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}/api\n")
                sys.stdout.flush()

    Telling(uvicorn.Config(create_app(ephemeral=True), lifespan="on", log_level="critical")).run(sockets=[listener])


def _end_with_parent() -> None:
    """Standard input is a pipe that nobody writes to: it ends when the process at its other end does."""
    sys.stdin.read()
    with suppress(ProcessLookupError):
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(STOP_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    serve()
