"""Requests seen lately, so that a repeat is answered without computing it again. Pure but for the lock.

A request is known by its client and its id: nobody is answered from what was computed for another.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

CAPACITY = 8192


class RecentRequests:
    """Remembers the last `capacity` request ids and, once known, their replies."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._replies: OrderedDict[tuple[str, bytes], bytes | None] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, client: str, request_id: bytes) -> tuple[bool, bytes | None]:
        """(is it new, the reply to send again); (False, None) while the first is still being computed."""
        with self._lock:
            key = client, request_id
            if key in self._replies:
                return False, self._replies[key]
            self._replies[key] = None
            if len(self._replies) > self._capacity:
                self._replies.popitem(last=False)
            return True, None

    def finish(self, client: str, request_id: bytes, reply: bytes) -> None:
        with self._lock:
            if (client, request_id) in self._replies:
                self._replies[client, request_id] = reply

    def forget(self, client: str, request_id: bytes) -> None:
        """A refused request may be tried again."""
        with self._lock:
            self._replies.pop((client, request_id), None)
