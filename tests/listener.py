"""A connection that keeps what it is told, for tests."""

from __future__ import annotations

import os
import queue
import threading

from kinflow.mqtt import BrokerAddress, Connection


class Listener:
    """A connection, what it received and what it was told."""

    def __init__(self, address: BrokerAddress, *topics: str, **options: object) -> None:
        self.received: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self.threads: set[threading.Thread] = set()
        self.connects = 0
        self.losses = 0
        self.connection = Connection(
            address,
            f"test-{os.urandom(4).hex()}",
            on_message=self._on_message,
            subscriptions=topics,
            on_connected=self._on_connected,
            on_lost=self._on_lost,
            **options,
        )

    def __enter__(self) -> Listener:
        self.connection.start()
        assert self.connection.wait_connected(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def _on_message(self, topic: str, data: bytes) -> None:
        self.threads.add(threading.current_thread())
        self.received.put((topic, data))

    def _on_connected(self) -> None:
        self.connects += 1

    def _on_lost(self) -> None:
        self.losses += 1
