"""The requests of one link that wait, and when those that wait for too long are looked after."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable

from kinflow.awaited import Awaited
from kinflow.errors import LinkError


class InFlight:
    """At most `most` requests, by their ids; any thread may call.

    `call_at(when_s, fn)` is Connection's. `on_silence(request, now_s)` is called where it calls, for each request whose
    `due_s` has come; it sets another `due_s` or takes the request out. Times are of time.monotonic().
    """

    def __init__(
        self,
        most: int,
        call_at: Callable[[float, Callable[[], None]], None],
        on_silence: Callable[[Awaited, float], None],
    ) -> None:
        self._most = most
        self._call_at = call_at
        self._on_silence = on_silence
        self._lock = threading.Lock()
        self._waiting: dict[bytes, Awaited] = {}
        self._look_s = math.inf
        """When they are looked after next. One call for all: most are answered before."""

    def add(self, future: Awaited) -> None:
        """Raises LinkError when too many wait, or one with this id."""
        with self._lock:
            if len(self._waiting) >= self._most:
                raise LinkError(f"{len(self._waiting)} requests are in flight, {self._most} are allowed")
            if self._waiting.setdefault(future.request.id, future) is not future:
                raise LinkError(f"request {future.request.id.hex()} is in flight already")

    def get(self, request_id: bytes) -> Awaited | None:
        return self._waiting.get(request_id)

    def pop(self, request_id: bytes) -> Awaited | None:
        """Take it out: of several threads one gets it, and ends it."""
        with self._lock:
            return self._waiting.pop(request_id, None)

    def clear(self) -> list[Awaited]:
        """Take all of them out."""
        with self._lock:
            left = list(self._waiting.values())
            self._waiting.clear()
        return left

    def orphan(self) -> None:
        """The connection that they went out on is lost."""
        with self._lock:
            for future in self._waiting.values():
                future.orphaned = True

    def orphans(self) -> list[Awaited]:
        with self._lock:
            return [future for future in self._waiting.values() if future.orphaned]

    def expect(self, future: Awaited) -> None:
        """It has been sent: look after it when it was silent for too long."""
        now_s = time.monotonic()
        patience_s = max(future.repeat_after_s, (future.deadline_s - now_s) / 3)
        with self._lock:
            future.due_s = min(now_s + patience_s, future.deadline_s)
            self._look_by(future.due_s)

    def _look_by(self, when_s: float) -> None:
        """Under the lock: look no later than that."""
        if when_s < self._look_s:
            self._look_s = when_s
            self._call_at(when_s, functools.partial(self._look, when_s))

    def _look(self, when_s: float) -> None:
        with self._lock:
            if when_s != self._look_s:
                return  # an earlier look was called for since
            self._look_s = math.inf
            now_s = time.monotonic()
            silent = [future for future in self._waiting.values() if future.due_s <= now_s]
        try:
            for future in silent:
                self._on_silence(future, now_s)
        finally:
            with self._lock:
                self._look_by(min((future.due_s for future in self._waiting.values()), default=math.inf))
