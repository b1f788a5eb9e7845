"""A worker at work without a broker: what is sent to it, and what it published."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from brokers import wait_until
from kinflow import topics
from kinflow.confidence import read
from kinflow.family import Family
from kinflow.frame import pack, unpack
from kinflow.messages import Request
from kinflow.preprocess import Preprocessor
from kinflow.settings import ServerSettings
from kinflow_edge.model import ServedFamily
from kinflow_edge.worker import Worker
from system_fixtures import sample_images


@dataclass
class Wire:
    """What the worker publishes; `open` cleared, publishing waits, as it would on a broker that is stuck."""

    sent: list[tuple[str, bytes]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    entered: int = 0
    batches: list[int] = field(default_factory=list)

    def publish(self, topic: str, data: bytes) -> None:
        self.entered += 1
        assert self.open.wait(20)
        if self.error is not None:
            raise self.error
        self.sent.append((topic, data))

    def publish_all(self, messages: Sequence[tuple[str, bytes]]) -> None:
        self.batches.append(len(messages))
        for topic, data in messages:
            self.publish(topic, data)

    @property
    def messages(self) -> list[Any]:
        return [unpack(data).message for _, data in list(self.sent)]

    def one(self, request_id: bytes, timeout_s: float = 10.0) -> Any:
        """The message for that request; there must be exactly one."""
        wait_until(lambda: any(message.id == request_id for message in self.messages), timeout_s)
        found = [message for message in self.messages if message.id == request_id]
        assert len(found) == 1
        return found[0]


@dataclass
class Bench:
    """A worker at work and everything around it."""

    family: Family
    worker: Worker
    wire: Wire
    features: dict[str, np.ndarray]
    """By split: what the members below compute for a few images."""

    def request(self, *, split: str = "s1", codec: str = "", **changes: Any) -> Request:
        fields = {
            "id": os.urandom(16),
            "client": "device-1",
            "family": self.family.id,
            "version": self.family.version,
            "split": split,
            "codec": codec or self.family.codec(split).name,
            "deadline_ms": 20_000.0,
        }
        return Request(**{**fields, **changes})

    def payload(self, number: int = 0, split: str = "s1", codec: str = "") -> bytes:
        return self.family.codec(split, codec).encode(self.features[split][number])

    def send(self, request: Request, payload: bytes | None = None) -> Request:
        topic = topics.request("cloud", "fashion", request.split, request.client)
        self.worker.on_message(topic, pack(request, self.payload(split=request.split) if payload is None else payload))
        return request

    def ask(self, request: Request, payload: bytes | None = None) -> Any:
        return self.wire.one(self.send(request, payload).id)

    def expected(self, number: int, split: str = "s1", codec: str = "", member: str = "cloud") -> tuple[int, float]:
        """(label, confidence) of the member run directly on the features as they come out of the codec."""
        coder = self.family.codec(split, codec)
        inputs = coder.decode(coder.encode(self.features[split][number]))[None]
        output = self.family.member(member, source=split).run(inputs)
        reading = read(output.logits[0], self.family.manifest.exits[output.exit].temperature)
        return reading.label, reading.confidence

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """The worker's thread hangs in a reply: what comes meanwhile is queued."""
        self.wire.open.clear()
        before = self.wire.entered
        self.send(self.request())
        wait_until(lambda: self.wire.entered > before)
        try:
            yield
        finally:
            self.wire.open.set()


def device_features(family: Family) -> np.ndarray:
    """Of a few committed images, at the device's split."""
    prepare = Preprocessor(family.preprocess)
    features = family.member("device").run(np.concatenate([prepare(image) for image in sample_images(12)])).features
    assert features is not None
    return features


@contextmanager
def at_work(family: Family, features: dict[str, np.ndarray], member: str = "cloud", **settings: Any) -> Iterator[Bench]:
    wire = Wire()
    wire.open.set()
    worker = Worker(
        "node-1",
        "edge" if member == "edge" else "cloud",
        {family.id: ServedFamily.open(family, member, 1)},
        ServerSettings(**settings),
        publish=wire.publish,
        publish_all=wire.publish_all,
        drive=lambda _done, _until_s: None,
        uplinks={},
        test_client="own-test",
    )
    worker.start()
    try:
        yield Bench(family, worker, wire, features)
    finally:
        wire.open.set()
        worker.close()
