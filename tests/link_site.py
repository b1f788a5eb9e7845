"""What tests of the link have in common: a server behind a broker, and what a client asks of it."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

from kinflow import topics
from kinflow.frame import pack, unpack
from kinflow.link import Link
from kinflow.messages import Busy, Failure, Reply, Request
from kinflow.mqtt import BrokerAddress, Connection

TOPIC = topics.request("edge", "fam", "s1", "any")

Serve = Callable[["Server", Request, bytes], None]


class Server:
    """What an edge server is to a link: a worker thread behind a queue."""

    def __init__(self, address: BrokerAddress, serve: Serve) -> None:
        self._serve = serve
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.seen: list[Request] = []
        self.connection = Connection(
            address,
            f"srv-{os.urandom(4).hex()}",
            on_message=lambda _topic, data: self._inbox.put(data),
            subscriptions=[topics.requests("edge", "fam", "s1", "edge")],
        )
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Server:
        self.connection.start()
        self._thread.start()
        assert self.connection.wait_connected(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.put(None)
        self._thread.join()
        self.connection.close()

    def answer(self, request: Request, label: int = 0) -> None:
        self.send(request, Reply(id=request.id, label=label, confidence=0.5, tier="edge", exit="e"))

    def send(self, request: Request, message: Reply | Busy | Failure) -> None:
        self.connection.publish(topics.reply(request.client), pack(message))

    def _work(self) -> None:
        while (data := self._inbox.get()) is not None:
            request, payload = unpack(data)
            assert isinstance(request, Request)
            self.seen.append(request)
            self._serve(self, request, payload)


def make(link: Link, deadline_ms: float = 5000) -> Request:
    return Request(
        id=os.urandom(16),
        client=link.client,
        family="fam",
        version="1",
        split="s1",
        codec="c",
        deadline_ms=float(deadline_ms),
    )


def answer(server: Server, request: Request, payload: bytes) -> None:
    server.answer(request, label=len(payload))


def keep_silent(_server: Server, _request: Request, _payload: bytes) -> None:
    pass
