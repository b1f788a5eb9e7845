"""Calls to be made at given times, and the sleep of the one thread that makes them."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections.abc import Callable

log = logging.getLogger("kinflow.link")

_AWAKE = float("-inf")


class Timers:
    """A heap of calls and an epoll to sleep on. `add` and `wake` are for any thread, the rest for the one.

    A thread that adds a call wakes the sleeper only when it would sleep past it: a call that is later than
    one that stands already costs no switch of threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._asleep_until_s = _AWAKE
        self._wake_fd = -1
        self._epoll: select.epoll | None = None

    def open(self) -> select.epoll:
        """What the sleeper sleeps on; it may register more there. Nothing is opened before."""
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        return self._epoll

    def close(self) -> None:
        """Calls that were not due yet are forgotten; `add` and `wake` do nothing from now on."""
        with self._lock:
            if self._epoll is not None:
                self._epoll.close()
                os.close(self._wake_fd)
            self._epoll = None
            self._heap.clear()

    def add(self, when_s: float, fn: Callable[[], None]) -> None:
        """Call `fn` when time.monotonic() reaches `when_s`."""
        with self._lock:
            heapq.heappush(self._heap, (when_s, next(self._order), fn))
            if when_s < self._asleep_until_s:
                self._poke()

    def wake(self) -> None:
        """End the present sleep, or the next one when nobody sleeps."""
        with self._lock:
            self._poke()

    def sleep(self, until_s: float) -> list[tuple[int, int]]:
        """Sleep until an event, a call, a wake or `until_s`, then make the calls that are due; the events."""
        assert self._epoll is not None
        with self._lock:
            if self._heap and self._heap[0][0] < until_s:
                until_s = self._heap[0][0]
            self._asleep_until_s = until_s
        events = self._epoll.poll(max(0.0, until_s - time.monotonic()))
        self._asleep_until_s = _AWAKE
        if any(fd == self._wake_fd for fd, _ in events):
            os.eventfd_read(self._wake_fd)
        if self._heap and self._heap[0][0] <= time.monotonic():
            self._call_due()
        return events

    def _call_due(self) -> None:
        while True:
            with self._lock:
                if not self._heap or self._heap[0][0] > time.monotonic():
                    return
                fn = heapq.heappop(self._heap)[2]
            try:
                fn()
            except Exception:
                log.exception("a timed call failed")

    def _poke(self) -> None:
        self._asleep_until_s = _AWAKE  # once is enough
        if self._epoll is not None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._wake_fd, 1)
