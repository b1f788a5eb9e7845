"""How far a long benchmark is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Steps:
    """A benchmark under way."""

    bar: Progress
    task: TaskID
    silent: bool

    def advance(self) -> None:
        """One step is done."""
        self.bar.advance(self.task)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.silent:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: int, *, quiet: bool) -> Iterator[Steps]:
    """Over `total` steps, on standard error; `quiet`: where that is no terminal nothing is said."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield Steps(bar, bar.add_task(what, total=total), silent=quiet and not console.is_terminal)
