"""Workers that are played: what Dask's scheduler sees of a worker, without processes, threads or shards that compute.

    python -m tests.benchmarks.played tcp://SCHEDULER COUNT TIMES

Each registers, sends heartbeats, holds Dask's own state machine of a worker, and hands out results as a worker does. A shard whose key ends
in -i is done TIMES[i % len] seconds (one per line) after it began. A thousand take one process and some 200 MiB.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import dask
from distributed import worker_state_machine as machine
from distributed.batched import BatchedSend
from distributed.comm import Comm, CommClosedError, connect, listen
from distributed.core import rpc
from distributed.protocol import to_serialize
from distributed.versions import get_versions

EVENTS = {
    "compute-task": machine.ComputeTaskEvent,
    "free-keys": machine.FreeKeysEvent,
    "remove-replicas": machine.RemoveReplicasEvent,
    "cancel-compute": machine.CancelComputeEvent,
    "steal-request": machine.StealRequestEvent,
}
METRICS: dict[str, Any] = {
    "task_counts": {}, "bandwidth": {"total": 1e8, "workers": {}, "types": {}}, "digests_total_since_heartbeat": {},
    "managed_bytes": 0, "spilled_bytes": {"memory": 0, "disk": 0}, "event_loop_interval": 0.02, "cpu": 100.0, "memory": 1 << 30,
    "transfer": dict.fromkeys(("incoming_bytes", "incoming_count", "outgoing_bytes", "outgoing_count"), 0),
    "host_net_io": {"read_bps": 0.0, "write_bps": 0.0}, "host_disk_io": {"read_bps": 0.0, "write_bps": 0.0}, "num_fds": 50,
}  # fmt: skip


class Played:
    """One worker of one thread."""

    def __init__(self, scheduler: str, times: list[float]) -> None:
        self.scheduler, self.times = scheduler, times
        self.state = machine.WorkerState(nthreads=1, validate=False)
        self.stream = BatchedSend(interval="2ms")
        self.loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Register, and do what the scheduler says until it is gone."""
        listener = await listen("tcp://127.0.0.1:0", self.answer, deserialize=False)
        self.state.address = listener.contact_address
        comm = await connect(self.scheduler, deserialize=False, timeout=600)
        await comm.write(self.registration(), serializers=["msgpack"])
        self.stream.start(comm)
        beats = asyncio.create_task(self.beat())
        assert (await comm.read())["status"] == "OK"
        try:
            while True:
                for message in await comm.read():
                    told = dict(message)
                    if (event := EVENTS.get(told.pop("op"))) is not None:
                        self.handle(event(**told))
        except CommClosedError:
            beats.cancel()
            listener.stop()

    def registration(self) -> dict[str, Any]:
        """What a worker says of itself."""
        name, now = self.state.address, time.time()
        told = {"op": "register-worker", "reply": False, "address": name, "name": name, "server_id": name, "status": "running", "now": now}
        told |= {"nthreads": 1, "resources": {}, "memory_limit": 4 << 30, "local_directory": "/tmp", "services": {}, "nanny": None}  # noqa: S108
        return told | {"pid": os.getpid(), "versions": VERSIONS, "metrics": METRICS, "extra": {}, "stimulus_id": f"connect-{now}"}

    async def beat(self) -> None:
        """Send a heartbeat as often as the scheduler asks."""
        there, interval = rpc(self.scheduler), 1.0
        while True:
            await asyncio.sleep(interval)
            told = {"address": self.state.address, "now": time.time(), "metrics": METRICS, "executing": {}, "extensions": {}}
            interval = (await there.heartbeat_worker(**told))["heartbeat-interval"]

    def handle(self, event: machine.StateMachineEvent) -> None:
        """Let the state machine decide, and do what it asks for."""
        for asked in self.state.handle_stimulus(event):
            if isinstance(asked, machine.Execute):
                seconds = self.times[int(str(asked.key).rpartition("-")[2]) % len(self.times)]
                self.loop.call_later(seconds, self.finish, asked.key, time.time())
            elif isinstance(asked, machine.SendMessageToScheduler):
                self.stream.send(asked.to_dict())

    def finish(self, key: str, begun: float) -> None:
        """The shard is done; its result is small."""
        task, now = self.state.tasks[key], time.time()
        self.handle(
            machine.ExecuteSuccessEvent(
                key=key, run_id=task.run_id, value=None, start=begun, stop=now, nbytes=200, type=dict, stimulus_id=f"success-{now}"
            )
        )

    async def answer(self, comm: Comm) -> None:
        """Hand out results, in the two steps of a worker."""
        try:
            while True:
                asked = await comm.read()
                if asked.get("op") != "get_data":
                    return
                await comm.write({"status": "OK", "data": {key: to_serialize({"seconds": 1.0}) for key in asked["keys"]}})
                assert await comm.read() == "OK"
        except CommClosedError:
            return


VERSIONS = get_versions()


async def play(scheduler: str, count: int, times: list[float]) -> None:
    """So many workers, until the scheduler is gone."""
    with dask.config.set({"distributed.admin.low-level-log-length": 10}):
        await asyncio.gather(*(Played(scheduler, times).run() for _ in range(count)))


if __name__ == "__main__":
    asyncio.run(play(sys.argv[1], int(sys.argv[2]), [float(line) for line in Path(sys.argv[3]).read_text().split()]))
