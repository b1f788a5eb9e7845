"""The log of a build: a line per step into train.log, and a progress bar with the time left on a terminal."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@dataclass
class BuildLog:
    """Appends to `path`; shows the same lines on `console`."""

    path: Path
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def line(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(text + "\n")
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def truncate(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Steps]:
        """A bar over `total` steps, of which `done` lie behind us."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            yield Steps(bar, bar.add_task(what, total=total, completed=done))


@dataclass(frozen=True)
class Steps:
    """A running bar."""

    bar: Progress
    task: TaskID

    def advance(self, count: int = 1) -> None:
        self.bar.advance(self.task, count)

    def describe(self, what: str) -> None:
        self.bar.update(self.task, description=what)


@contextmanager
def hushed() -> Iterator[None]:
    """Foreign converters print, warn and log a great deal; what is wrong they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
