"""Ctrl-C ends a command also where Python or asyncio lose it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FINALISER = """
class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

del_me = Late()
del del_me
"""
SHRUGGED_OFF = """
async def stubborn():
    try:
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(1)
    except asyncio.CancelledError:
        pass

try:
    asyncio.run(stubborn())
except KeyboardInterrupt:
    pass
"""


@pytest.mark.parametrize("lost", [FINALISER, SHRUGGED_OFF])
def test_an_interrupt_that_was_lost_ends_the_command_at_the_next_look(lost: str) -> None:
    script = (
        f"import asyncio, signal\nfrom infra import interrupts\ninterrupts.check()\ninterrupts.hear()\n{lost}\nprint('lost')\n"
        "try:\n    interrupts.check()\nexcept KeyboardInterrupt:\n    print('heard')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "lost\nheard\n", "")
