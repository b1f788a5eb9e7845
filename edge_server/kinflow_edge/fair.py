"""A bounded queue that serves its clients in turn: one that asks much waits longer, and only that one. Pure.

Round robin, one item each: deficit round robin (Shreedhar and Varghese 1996) where every item costs the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """At most `capacity` items, `per_client` of one client."""

    def __init__(self, capacity: int, per_client: int) -> None:
        self._capacity = capacity
        self._per_client = per_client
        self._size = 0
        # Clients with waiting items, the one whose turn it is first.
        self._turns: dict[str, deque[Item]] = {}

    def __len__(self) -> int:
        return self._size

    def put(self, client: str, item: Item) -> bool:
        """False when the queue, or this client's share of it, is full."""
        waiting = self._turns.get(client)
        if self._size >= self._capacity or (waiting is not None and len(waiting) >= self._per_client):
            return False
        if waiting is None:
            waiting = self._turns[client] = deque()
        waiting.append(item)
        self._size += 1
        return True

    def take(self) -> Item:
        """The next item; its client goes to the end of the line. Raises IndexError when empty."""
        if not self._turns:
            raise IndexError("the queue is empty")
        client = next(iter(self._turns))
        waiting = self._turns.pop(client)
        item = waiting.popleft()
        if waiting:
            self._turns[client] = waiting
        self._size -= 1
        return item

    def ahead(self, client: str) -> int:
        """How many items are taken before one that this client would put in now."""
        own = len(self._turns.get(client, ()))
        return own + sum(min(len(waiting), own + 1) for name, waiting in self._turns.items() if name != client)

    def remove(self, client: str, matches: Callable[[Item], bool]) -> bool:
        """Take the client's item that matches out of the line; whether there was one."""
        waiting = self._turns.get(client, deque())
        found = next((item for item in waiting if matches(item)), None)
        if found is None:
            return False
        waiting.remove(found)
        if not waiting:
            del self._turns[client]
        self._size -= 1
        return True
