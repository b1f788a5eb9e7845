"""Child processes that end with their parent, however it ends."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

STOP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


def spawn(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Popen in a session of its own: Ctrl-C reaches only the parent, which stops its children in order.

    On Linux the kernel sends SIGTERM when the parent is killed. Call it from a thread that lives on: the kernel
    watches the thread, not the process.
    """
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent, **options
    )


def stop(process: subprocess.Popen[bytes], timeout_s: float = STOP_TIMEOUT_S) -> int:
    """SIGTERM, then SIGKILL after `timeout_s`. Returns the exit status; harmless when it has ended already."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def _prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return ctypes.CDLL(None).prctl


# Looked up before any fork: between fork and exec as little as possible may happen.
_set_option = _prctl()


def _die_with_parent() -> None:
    if _set_option is not None:
        _set_option(_PR_SET_PDEATHSIG, signal.SIGTERM)
