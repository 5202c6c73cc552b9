"""Telling Prefect's server of events (the states of tasks are some) without waiting for a server that is gone.

Prefect's own client tries each event for seven seconds, one after the other, also while the interpreter is about to end: a run that was
complete would end minutes later. Ours keeps what it could not send, as Prefect's does, but does not try at every event.
"""

import time
from typing import Any

from prefect.events.clients import PrefectEventsClient
from prefect.events.schemas.events import Event
from prefect.events.worker import EventsWorker, emit_events_to_cloud

#: Seconds after a failure in which the server is not tried again.
PAUSE = 20.0


class PatientEvents(PrefectEventsClient):
    """Sends events; those that a server which is gone does not take go with the first one that it takes again."""

    def __init__(self) -> None:
        super().__init__(reconnection_attempts=1)
        self._silent_until = 0.0

    async def _emit(self, event: Event) -> None:
        if time.monotonic() < self._silent_until:
            self._unconfirmed_events.append(event)
            return
        try:
            await super()._emit(event)
        except Exception:  # noqa: BLE001  (whatever it is, the numbers do not depend on it, and the event is kept)
            self._silent_until = time.monotonic() + PAUSE

    async def _reconnect(self) -> Any:
        self._silent_until = 0.0  # it sends what was kept by `emit`
        try:
            return await super()._reconnect()
        except Exception:
            self._silent_until = time.monotonic() + PAUSE
            raise


def use_patient_events() -> None:
    """Let events of this process be sent so; not to Prefect's cloud, which has a client of its own."""
    if not emit_events_to_cloud():
        EventsWorker.set_client_override(PatientEvents)
