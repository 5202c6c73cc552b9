"""A Prefect server that a test may kill, and start again elsewhere."""

import os
import subprocess
import sys
from pathlib import Path


class PrefectServer:
    """A process of its own with a database of its own; `url` is of its API."""

    def __init__(self, home: Path) -> None:
        self._home, self._process, self.url = home, None, ""
        self.start()

    def start(self) -> None:
        """Start it where it is not there."""
        if self._process is not None and self._process.poll() is None:
            return
        environment = os.environ | {"PREFECT_HOME": str(self._home), "OMP_NUM_THREADS": "1"}
        environment.pop("PREFECT_API_URL", None)
        command = [sys.executable, "-P", "-m", "infra.prefect_api"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.url = self._process.stdout.readline().strip()
        assert self.url.startswith("http"), "it has ended"

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.communicate()
