"""The API server that a command brings along."""

import threading

from infra.prefect_api import embedded_api
from infra.settings import quiet_prefect


def test_nothing_that_speaks_to_a_server_outlives_it():
    quiet_prefect()
    from prefect import flow
    from prefect.events import emit_event

    @flow
    def telling():
        emit_event("tda.test", {"prefect.resource.id": "tda.test"})
        return [thread.name for thread in threading.enumerate()]

    with embedded_api() as api, api.used():
        during = telling()
    assert "EventsWorkerThread" in during
    assert "EventsWorkerThread" not in [thread.name for thread in threading.enumerate()]
