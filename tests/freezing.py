"""Processes that hang: stopped by a signal, and known to have stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from brokers import wait_until


def freeze(pid: int) -> None:
    """Returns when no thread of the process runs any more: on a busy machine a signal is not obeyed at once."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _states(pid) == {"T"})


def _states(pid: int) -> set[str]:
    return {path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")}
