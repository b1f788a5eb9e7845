"""Being told to stop: by SIGTERM or Ctrl-C, and by other threads."""

from __future__ import annotations

import signal
from contextlib import suppress
from queue import Empty, SimpleQueue


class Stop:
    """What the main thread waits for.

    `threading.Event` will not do: a handler runs in the thread that it interrupts, and where that one is in `wait` and
    holds the event's lock, `set` waits for the lock for ever. `SimpleQueue.put` may be called anywhere.
    """

    def __init__(self) -> None:
        self._asked: SimpleQueue[None] = SimpleQueue()
        self._is_set = False

    def set(self) -> None:
        """From a signal handler, or any thread."""
        self._is_set = True
        self._asked.put(None)

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it is set, at once or before the time is over. For one thread."""
        if not self._is_set:
            with suppress(Empty):
                self._asked.get(timeout=timeout_s)
        return self._is_set


def on_signals() -> Stop:
    """Set by SIGTERM and Ctrl-C from now on. For the main thread."""
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
