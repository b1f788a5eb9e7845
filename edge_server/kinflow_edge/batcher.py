"""Requests wait here and leave in batches. Knows nothing of MQTT or graphs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from kinflow_edge.fair import FairQueue

Item = TypeVar("Item")

# Weight of the newest batch in the smoothed cost of one item.
SMOOTHING = 0.2


class Batcher(Generic[Item]):
    """A fair queue that hands out what has come, up to `size`, waiting up to `wait_s` for a full batch."""

    def __init__(self, *, size: int, wait_s: float, capacity: int, per_client: int) -> None:
        self._size = size
        self._wait_s = wait_s
        self._items: FairQueue[Item] = FairQueue(capacity, per_client)
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        self._busy_since_s: float | None = None
        self._batch_items = 0
        self._item_s = 0.0

    def put(self, client: str, item: Item) -> bool:
        """False when the queue is full, as a whole or for this client, or closed."""
        with self._changed:
            if self._closed or not self._items.put(client, item):
                return False
            self._changed.notify()
            return True

    def remove(self, client: str, matches: Callable[[Item], bool]) -> bool:
        """Take back what waits; whether it still did."""
        with self._changed:
            return self._items.remove(client, matches)

    @property
    def waiting(self) -> int:
        """Items in the queue and in the batch that is computed now."""
        return len(self._items) + self._batch_items

    def ready(self) -> bool:
        """`take` would return at once, but for the wait for a full batch."""
        return len(self._items) > 0 or self._closed

    def wait(self, until_s: float) -> bool:
        """Wait until `ready`, at most until `until_s` of time.monotonic(); whether it is."""
        with self._changed:
            return self._changed.wait_for(self.ready, max(0.0, until_s - time.monotonic()))

    def take(self) -> list[Item]:
        """The next batch, in order; waits for one. Empty when the batcher was closed and nothing is left."""
        with self._changed:
            while not len(self._items) and not self._closed:
                self._changed.wait()
            if self._wait_s > 0 and len(self._items):
                until = time.monotonic() + self._wait_s
                while len(self._items) < self._size and not self._closed:
                    if not self._changed.wait(max(0.0, until - time.monotonic())):
                        break
            batch = [self._items.take() for _ in range(min(self._size, len(self._items)))]
            self._busy_since_s = time.monotonic()
            self._batch_items = len(batch)
            return batch

    def done(self, items: int, spent_s: float) -> None:
        """Tell what the batch just computed cost: the queue delay is estimated from it."""
        with self._changed:
            self._busy_since_s = None
            self._batch_items = 0
            per_item = spent_s / max(items, 1)
            self._item_s = per_item if self._item_s == 0.0 else (1 - SMOOTHING) * self._item_s + SMOOTHING * per_item

    def queue_s(self, client: str = "") -> float:
        """How long an item that this client puts in now would wait until it is computed, its own computing included."""
        with self._changed:
            computing_s = 0.0
            if self._busy_since_s is not None:
                # What the batch still needs; one that takes longer than expected may be stuck, and then its
                # overtime is the best guess of what is still to come.
                elapsed_s = time.monotonic() - self._busy_since_s
                computing_s = abs(self._batch_items * self._item_s - elapsed_s)
            return computing_s + (self._items.ahead(client) + 1) * self._item_s

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
