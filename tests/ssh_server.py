"""An ssh server that lets one key in and runs what it is told in a shell: python ssh_server.py HOST_KEY AUTHORIZED; prints its port."""

import asyncio
import os
import signal
import sys
from contextlib import suppress

import asyncssh


async def shell(process: asyncssh.SSHServerProcess) -> None:
    running = await asyncio.create_subprocess_shell(str(process.command), stdin=-1, stdout=-1, stderr=-1, start_new_session=True)
    await process.redirect(stdin=running.stdin, stdout=running.stdout, stderr=running.stderr)
    gone = asyncio.ensure_future(process.channel.wait_closed())
    ended = asyncio.ensure_future(running.wait())
    await asyncio.wait([gone, ended], return_when=asyncio.FIRST_COMPLETED)
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    process.exit(await ended)


async def main(host_key: str, authorized: str) -> None:
    options = {"server_host_keys": [host_key], "authorized_client_keys": authorized}
    server = await asyncssh.listen("127.0.0.1", 0, process_factory=shell, encoding=None, **options)
    sys.stdout.write(f"{server.get_port()}\n")
    sys.stdout.flush()
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
