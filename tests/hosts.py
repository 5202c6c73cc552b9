"""Several hosts on one machine: network namespaces on a bridge, each with an address of its own, any of which can be cut off."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Hosts:
    """Namespaces by number; `here` is this process's address on their network."""

    prefix: str
    network: str

    @property
    def here(self) -> str:
        return f"{self.network}.1"

    def address(self, host: int) -> str:
        return f"{self.network}.{host + 2}"

    def start(self, host: int, command: Sequence[str], log, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", f"{self.prefix}{host}", *command]
        return subprocess.Popen(inside, stdout=log, stderr=log, env=environment, start_new_session=True)

    def cut_off(self, host: int) -> None:
        _ip("link", "set", f"{self.prefix}{host}", "down")

    def restore(self, host: int) -> None:
        _ip("link", "set", f"{self.prefix}{host}", "up")


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """So many namespaces; skips the test, with the reason, where that is not possible."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    found = Hosts(f"tda{os.getpid() % 10_000}n", f"10.77.{os.getpid() % 250}")
    bridge = f"{found.prefix}b"
    with ExitStack() as undo:
        try:
            _ip("link", "add", bridge, "type", "bridge")
            undo.callback(_ip, "link", "del", bridge)
            _ip("addr", "add", f"{found.here}/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for host in range(count):
                name = f"{found.prefix}{host}"
                _ip("netns", "add", name)
                undo.callback(_ip, "netns", "del", name)
                _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("link", "set", name, "master", bridge, "up")
                _ip("-n", name, "addr", "add", f"{found.address(host)}/24", "dev", "eth0")
                for device in ("eth0", "lo"):
                    _ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield found


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
