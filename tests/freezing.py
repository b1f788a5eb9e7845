"""Processes that hang: stopped by a signal, and known to have stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def freeze(pid: int) -> None:
    """Returns when no thread of the process runs any more: on a busy machine a signal is not obeyed at once."""
    os.kill(pid, signal.SIGSTOP)
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    end = time.monotonic() + 10
    while any((task / "stat").read_text().rpartition(") ")[2][0] != "T" for task in tasks):
        assert time.monotonic() < end, f"process {pid} does not stop"
        time.sleep(0.001)
