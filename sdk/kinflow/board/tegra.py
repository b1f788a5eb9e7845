"""NVIDIA's `tegrastats` beside a watch: one child that goes on talking, and what it said last."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from types import TracebackType

from kinflow import children
from kinflow.board import tegrastats
from kinflow.errors import InputError
from kinflow.logs import event

log = logging.getLogger("kinflow.board")

# What is older says nothing of now: the program has ended, or hangs.
FRESH_S = 10.0


class Tegra:
    """Runs the program while it is open. A program that fails is logged, and `said` is None then."""

    def __init__(self, program: str, interval_s: float) -> None:
        self._command = [program, "--interval", str(max(int(interval_s * 1000), 100))]
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = threading.Thread(target=self._read, name="kinflow-tegrastats", daemon=True)
        self._last: tuple[float, tegrastats.Tegrastats] | None = None

    def __enter__(self) -> Tegra:
        try:
            self._process = children.spawn(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as exc:
            event(log, logging.WARNING, "tegrastats", error=exc)
            return self
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            children.stop(self._process)
            self._reader.join()

    @property
    def said(self) -> tegrastats.Tegrastats | None:
        """The last line that could be read, while it is fresh."""
        last = self._last
        return None if last is None or time.monotonic() - last[0] > FRESH_S else last[1]

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                try:
                    self._last = time.monotonic(), tegrastats.parse(line.decode(errors="replace"))
                except InputError as exc:
                    event(log, logging.DEBUG, "tegrastats", error=exc)
        event(log, logging.INFO, "tegrastats ended", status=self._process.wait())
