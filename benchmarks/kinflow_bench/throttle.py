"""A process that has only a share of a core, as a server has that others keep busy.

Another process stops and continues it: one that outlives a benchmark that is killed by a moment, and leaves nobody
stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import TracebackType

from kinflow import children

PERIOD_S = 0.02


class Throttle:
    """Stops and continues `pid` while the `with` block lasts."""

    def __init__(self, pid: int, share: float) -> None:
        """`share`: of the time in which it may run; 1 leaves it alone."""
        self._pid, self._share = pid, share
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Throttle:
        if self._share < 1:
            self._process = children.spawn([sys.executable, "-m", __name__, str(self._pid), str(self._share)])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            children.stop(self._process)


def main(pid: int, share: float) -> None:
    """Until SIGTERM, or until there is no such process any more."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        while True:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(PERIOD_S * (1 - share))
            os.kill(pid, signal.SIGCONT)
            time.sleep(PERIOD_S * share)
    except ProcessLookupError:
        return
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
