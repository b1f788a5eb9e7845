"""What the main thread waits for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from kinflow.stopping import Stop

TRIES = 10
SPINNING = """
from kinflow.stopping import on_signals

stop = on_signals()
print("ready", flush=True)
while not stop.wait(0):
    pass
"""


def test_a_stop_is_heard_in_the_middle_of_a_wait() -> None:
    """By another thread; without one the wait ends in time, and once it is set nobody waits any more."""
    stop = Stop()
    assert not stop.wait(0.01)
    timer = threading.Timer(0.05, stop.set)
    timer.start()
    assert stop.wait(20)
    assert stop.is_set()
    assert stop.wait()
    timer.join()


def test_a_signal_ends_it_whatever_the_thread_is_at() -> None:
    """It comes while the thread goes into its wait or out of it, too: ten times out of ten."""
    for _ in range(TRIES):
        with subprocess.Popen([sys.executable, "-c", SPINNING], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline()
                time.sleep(0.005)  # it spins by then
                process.terminate()
                assert process.wait(20) == 0
            finally:
                process.kill()
