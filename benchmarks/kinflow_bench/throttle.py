"""A process that has only a share of a core, as a server has that others keep busy."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType

PERIOD_S = 0.02


class Throttle:
    """Stops and continues `pid` while the `with` block lasts."""

    def __init__(self, pid: int, share: float) -> None:
        """`share`: of the time in which it may run; 1 leaves it alone."""
        self._pid, self._share = pid, share
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Throttle:
        if self._share < 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._share < 1:
            self._over.set()
            self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            os.kill(self._pid, signal.SIGSTOP)
            self._over.wait(PERIOD_S * (1 - self._share))
            os.kill(self._pid, signal.SIGCONT)
            self._over.wait(PERIOD_S * self._share)
