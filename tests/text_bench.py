"""A text worker at work without a broker: what is sent to it, and what it published."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from brokers import wait_until
from kinflow import topics
from kinflow.frame import pack, unpack
from kinflow.messages import Cancel, Probe, Release, Verdict, Verify
from kinflow.settings import ServerSettings, SessionSettings
from kinflow.text.family import TextFamily
from kinflow.text.sampling import Sampling
from kinflow_edge.text.model import ServedText
from kinflow_edge.text.worker import TextWorker
from text_client import Writer

SAMPLED = Sampling(0.9, 0.95, 7)
PROMPT = [5, 17, 99, 230, 41, 8]


@dataclass
class Bench:
    """A worker at work, and what it published."""

    family: TextFamily
    worker: TextWorker
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)

    def publish(self, topic: str, data: bytes) -> None:
        assert self.open.wait(20)
        self.sent.append((topic, data))

    def send(self, verify: Verify, payload: bytes) -> Verify:
        topic = topics.request_to("node-1", verify.family, verify.split, verify.client)
        self.worker.on_message(topic, pack(verify, payload))
        return verify

    def tell(self, message: Release | Cancel | Probe) -> None:
        topic = topics.request_to("node-1", self.family.id, "s1", message.client)
        self.worker.on_message(topic, pack(message))

    def one(self, request_id: bytes, timeout_s: float = 20.0) -> Any:
        """The message for that request; there must be exactly one."""

        def found() -> list[Any]:
            messages = [unpack(data).message for _, data in list(self.sent)]
            return [message for message in messages if message.id == request_id]

        wait_until(found, timeout_s)
        (message,) = found()
        return message

    def ask(self, verify: Verify, payload: bytes) -> Any:
        return self.one(self.send(verify, payload).id)

    def writer(self, client: str = "device-1", **changes: Any) -> Writer:
        def ask(verify: Verify, payload: bytes) -> Verdict:
            answer = self.ask(verify, payload)
            assert isinstance(answer, Verdict), answer
            return answer

        return Writer(self.family, client, ask, **changes)

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """The worker's thread hangs: what comes meanwhile waits."""
        go = threading.Event()
        self.worker._inbox.put(lambda: go.wait(20) and None)
        try:
            yield
        finally:
            go.set()


@contextmanager
def at_work(family: TextFamily, member: str = "cloud", **settings: Any) -> Iterator[Bench]:
    held = SessionSettings(**settings.pop("sessions", {}))
    bench = Bench(family, None)  # type: ignore[arg-type]
    bench.open.set()
    bench.worker = TextWorker(
        "node-1",
        "edge" if member == "edge" else "cloud",
        {family.id: ServedText.open(family, member, 1)},
        ServerSettings(sessions=held, **settings),
        publish=bench.publish,
        uplinks={},
        test_client="own-test",
    )
    bench.worker.start()
    try:
        yield bench
    finally:
        bench.open.set()
        bench.worker.close()
