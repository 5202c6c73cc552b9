"""What looks at a worker as it joins; sent to the scheduler, which hands it to every worker."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distributed.diagnostics.plugin import WorkerPlugin
from distributed.protocol.pickle import dumps

from infra.workers import Standing, looked_at, said

if TYPE_CHECKING:
    from distributed import Scheduler, Worker


class Gate(WorkerPlugin):  # type: ignore[misc]  # Dask ships no types
    """Lets a worker in, or closes it: one that joins a run half way and is not as the others would spoil or fail its shards.

    client: the run's. Where a run was killed, its gate stands on in a scheduler that goes on; it is passed by.
    """

    def __init__(self, client: str, standing: Standing, here: Mapping[str, str]) -> None:
        self.client = client
        self.standing = standing
        self.here = here

    async def setup(self, worker: "Worker") -> None:
        """Look at the worker; Dask calls this before it gives it anything."""
        try:
            wrong = await looked_at(self.standing, self.here)
        except Exception as error:  # noqa: BLE001  (whatever an import raises)
            wrong = f"cannot start: {said(error)}"
        if wrong and await self._run_goes_on(worker):
            worker.log_event("tda", {"refused": wrong})
            worker.loop.add_callback(_leave, worker, wrong)

    async def _run_goes_on(self, worker: "Worker") -> bool:
        answer = await worker.scheduler.run_function(function=dumps(_clients))
        return self.client in answer["result"]


async def _leave(worker: "Worker", wrong: str) -> None:
    await worker  # one that is still starting cannot close
    await worker.close(nanny=True, reason=f"tda: {wrong}")


def _clients(dask_scheduler: "Scheduler") -> list[str]:
    return list(dask_scheduler.clients)
