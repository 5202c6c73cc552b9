"""One progress bar per stage while a run works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """Bars on standard error: one per stage, in the order in which the stages begin. Without a terminal, one line per finished stage."""

    def __init__(self, console: Console | None = None) -> None:
        """Args: console: where to draw; standard error when absent."""
        self._console = console or Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=self._console,
            disable=not self._console.is_terminal,
        )  # fmt: skip

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw while the block runs."""
        with self._bars:
            yield

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar for one stage; the function given advances it by one shard."""
        bar = self._bars.add_task(name, total=total)
        yield lambda: self._bars.advance(bar)
        if self._bars.disable:
            self._console.print(f"{name}: {total} done", highlight=False)

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(text, highlight=False)
