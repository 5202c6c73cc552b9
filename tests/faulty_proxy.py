"""A proxy in front of an S3 server that injects, by a seed, what object storage does on a bad day."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

#: 500 and 503 answer in place of the server; "reset" closes the connection before the server has the request, "lost" after (so that its
#: answer is lost); "silent" never answers; "cut" sends half of an answer's body.
FAULTS = ("500", "503", "reset", "lost", "silent", "cut")
ERRORS = {"500": ("Internal Server Error", "InternalError"), "503": ("Slow Down", "SlowDown")}


@dataclass
class Proxy:
    """One proxy. rate: share of requests that get a fault; kinds: which."""

    upstream: str
    seed: int = 0
    rate: float = 0.1
    kinds: tuple[str, ...] = FAULTS
    silence: float = 3.0
    requests: int = 0
    ends_after: int | None = None
    """So many requests are served, and from then on every connection is closed: the server is gone."""
    injected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)  # noqa: S311

    def draw(self) -> str:
        """The fault of the next request; "" for none."""
        self.requests += 1
        if self.ends_after is not None and self.requests > self.ends_after:
            return "reset"
        # Silence takes longest, and so comes up less often.
        weights = [1 if kind == "silent" else 4 for kind in self.kinds]
        return self.rng.choices(self.kinds, weights)[0] if self.rng.random() < self.rate else ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client."""
        try:
            while await self.one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        headers = fields(head)
        if "100-continue" in headers.get("expect", ""):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await body_of(reader, headers)
        fault = self.draw()
        if fault in ERRORS:
            self.injected[fault] += 1
            writer.write(error(fault, head.startswith(b"HEAD")))
            await writer.drain()
            return True
        if fault == "reset":
            self.injected[fault] += 1
            return reset(writer)
        if fault == "silent":
            self.injected[fault] += 1
            await asyncio.sleep(self.silence)
            return reset(writer)
        answer, payload = await self.forwarded(head, body, headers)
        if fault == "lost":
            self.injected[fault] += 1
            return reset(writer)
        if fault == "cut" and len(payload) > 1 and not head.startswith(b"HEAD"):
            self.injected[fault] += 1
            writer.write(answer + payload[: len(payload) // 2])
            await writer.drain()
            return False
        writer.write(answer + payload)
        await writer.drain()
        return True

    async def forwarded(self, head: bytes, body: bytes, headers: dict[str, str]) -> tuple[bytes, bytes]:
        """The server's answer: its head, and its body as it goes over the wire."""
        place = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            # What was chunked is sent on as it came; the 100 Continue was ours.
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"expect:", b"connection:"))]
            writer.write(b"\r\n".join([*lines[:-2], b"Connection: close", b"", b""]) + body)
            await writer.drain()
            whole = await reader.read()
        finally:
            writer.close()
        answer, _, payload = whole.partition(b"\r\n\r\n")
        kept = [line for line in answer.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        return b"\r\n".join([*kept, b"", b""]), payload


def fields(head: bytes) -> dict[str, str]:
    """The headers of a request, by their names in small letters."""
    pairs = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:] if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


async def body_of(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """A request's body as it came over the wire."""
    if "chunked" not in headers.get("transfer-encoding", "").lower():
        return await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        body += line + await reader.readexactly(size + 2)
        if not size:
            return body


def error(fault: str, is_head: bool) -> bytes:
    reason, code = ERRORS[fault]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{reason}</Message></Error>".encode()
    head = f"HTTP/1.1 {fault} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return head if is_head else head + body


def reset(writer: asyncio.StreamWriter) -> bool:
    writer.transport.abort()
    return False


@contextmanager
def proxied(upstream: str, **options: object) -> Iterator[tuple[str, Proxy]]:
    """A proxy in a thread: its URL, and what counts its faults."""
    proxy, loop, port = Proxy(upstream, **options), asyncio.new_event_loop(), list[int]()  # type: ignore[arg-type]
    ready, connections = threading.Event(), set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.current_task())
        await proxy.serve(reader, writer)

    async def run() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=2**26)
        port.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port[0]}", proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
