"""One progress bar per stage while a run works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from infra.masking import masked

#: Who else is told as shards finish, where somebody is: the stage's name, how many of its shards are done, and of how many.
FOLLOWER: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("follower", default=None)


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
        bar, follow, done = self._bars.add_task(name, total=total), FOLLOWER.get(), count(1)

        def advance() -> None:
            self._bars.advance(bar)
            if follow is not None:
                follow(name, next(done), total)

        yield advance
        if self._bars.disable:
            self._console.print(f"{name}: {total} done", highlight=False)

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(masked(text), highlight=False)
