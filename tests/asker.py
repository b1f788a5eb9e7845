"""What asks a server as a device does, for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from brokers import wait_until
from kinflow import topics
from kinflow.awaited import Answered
from kinflow.family import Family
from kinflow.link import Link
from kinflow.messages import NodeStatus, Reply, Request, Tier
from kinflow.mqtt import BrokerAddress
from kinflow.preprocess import Preprocessor
from system_fixtures import sample_images

IMAGES = sample_images(24)


class Asker:
    """A device without its member: sends coded features of real images, and returns what comes back."""

    def __init__(self, bundle: Path, broker: str, tier: Tier = "edge") -> None:
        self.family = Family.load(bundle)
        self.tier = tier
        self.link = Link(BrokerAddress.parse(broker), f"asker-{os.urandom(4).hex()}")
        prepare = Preprocessor(self.family.preprocess)
        features = self.family.member("device").run(np.concatenate([prepare(image) for image in IMAGES])).features
        assert features is not None
        self._payloads = [self.family.codec("s1").encode(item) for item in features]

    def __enter__(self) -> Asker:
        self.link.start()
        assert self.link.wait_connected(10)
        wait_until(lambda: any(status.state == "ready" for status in self.link.nodes.values()))
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()

    def send(self, number: int = 0, deadline_s: float = 10.0, **changes: Any) -> Any:
        fields = {
            "id": os.urandom(16),
            "client": self.link.client,
            "family": self.family.id,
            "version": self.family.version,
            "split": "s1",
            "codec": self.family.codec("s1").name,
            "deadline_ms": deadline_s * 1e3,
        }
        request = Request(**{**fields, **changes})
        return self.link.request(
            topics.request(self.tier, self.family.id, "s1", self.link.client), request, self._payloads[number]
        )

    def ask(self, number: int = 0, deadline_s: float = 10.0) -> Reply:
        answered: Answered = self.send(number, deadline_s).result(deadline_s + 5)
        return answered.reply

    def status(self, node: str) -> NodeStatus:
        return self.link.nodes[node]
