"""Ctrl-C that is not lost: Python drops one that meets a finaliser, and asyncio one that meets a task which shrugs it off."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

_pressed = threading.Event()


def hear() -> None:
    """From now on Ctrl-C is remembered, besides ending what the main thread is at; for commands, at their start."""
    signal.signal(signal.SIGINT, _press)
    before = sys.unraisablehook

    def told(unraisable: Any) -> None:
        """A finaliser that was interrupted has nothing to tell: `check` ends the command."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)

    sys.unraisablehook = told


def check() -> None:
    """KeyboardInterrupt where Ctrl-C was pressed since `hear`, and the command is still at work."""
    if _pressed.is_set():
        raise KeyboardInterrupt


def _press(_number: int, _frame: FrameType | None) -> None:
    _pressed.set()
    raise KeyboardInterrupt
