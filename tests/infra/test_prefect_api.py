"""The API server that a command brings along."""

import os
import subprocess
import sys

TELLING = """
import threading
from infra.prefect_api import embedded_api
from infra.settings import quiet_prefect

quiet_prefect()
from prefect import flow
from prefect.events import emit_event

@flow
def telling():
    emit_event("tda.test", {"prefect.resource.id": "tda.test"})
    return speaking()

def speaking():
    return sum(thread.name == "EventsWorkerThread" for thread in threading.enumerate())

if __name__ == "__main__":
    with embedded_api() as api, api.used():
        during = telling()
    print(during, speaking())
"""


def test_nothing_that_speaks_to_a_server_outlives_it():
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}  # of other tests' server
    found = subprocess.run([sys.executable, "-c", TELLING], capture_output=True, text=True, timeout=200, check=True, env=env)
    assert found.stdout.split() == ["1", "0"]
