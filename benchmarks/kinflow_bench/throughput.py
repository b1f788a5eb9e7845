"""`bench throughput`: offloads per second of one server process, over the same graph in a bare loop."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from kinflow import frame, idx, topics
from kinflow.codec import Features
from kinflow.errors import LinkError
from kinflow.family import Family
from kinflow.fleet import Fleet
from kinflow.messages import Busy, Failure, Reply, Request
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.preprocess import Preprocessor
from kinflow_bench.timing import spread

BATCHES = (1, 2, 4, 8, 16, 32)
BARE_S = 0.4
LOAD_S = 2.0
IN_FLIGHT = 64
PATIENCE_S = 10.0
SAMPLES = "samples/images-idx3-ubyte.gz"


def run(bundle: Path, rounds: int, batch_size: int, batch_wait_ms: float, broker_kind: str) -> dict[str, Any]:
    """The largest member, continued from the split that devices send to."""
    family = Family.load(bundle)
    split = family.manifest.segments[family.manifest.members["device"].segments[-1]].split
    if split is None:
        raise LinkError(f"{bundle}: the device member ends without a split, so nothing can be offloaded")
    features = _features(family, split, bundle.parent / SAMPLES)
    bare: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    served: list[float] = []
    options = (
        "--batch-size",
        str(batch_size),
        "--batch-wait-ms",
        str(batch_wait_ms),
        "--broker-kind",
        broker_kind,
    )
    with Fleet([bundle]) as fleet, tempfile.TemporaryDirectory() as folder:
        # One client is all load here: what protects servers from such a one is no part of the measurement.
        unlimited = Path(folder) / "cloud.toml"
        unlimited.write_text("requests_per_s_per_device = 1e6\n")
        server = fleet.start("cloud", "--no-advertise", "--settings", str(unlimited), *options)
        with _Load(family, split, features, server.broker) as load:
            load.run(LOAD_S / 2)
            for _ in range(rounds):
                for batch in BATCHES:
                    bare[batch].append(_bare(family, split, features, batch))
                served.append(load.run(LOAD_S))
    best = max(BATCHES, key=lambda batch: statistics.median(bare[batch]))
    return {
        "ratio": statistics.median(served) / statistics.median(bare[best]),
        "offloads_per_s": spread(served),
        "bare_per_s": spread(bare[best]),
        "bare_best_batch": best,
        "bare_per_s_by_batch": {str(batch): statistics.median(values) for batch, values in bare.items()},
        "batch_size": batch_size,
        "batch_wait_ms": batch_wait_ms,
        "in_flight": IN_FLIGHT,
        "refused": load.refused,
        "threads": 1,
        "broker": server.ready["broker_kind"],
    }


def _features(family: Family, split: str, samples: Path) -> Features:
    """Features as the server gets them: [32, channels, height, width], of the family's samples or of noise."""
    codec = family.codec(split)
    spec = family.manifest.preprocess
    if samples.is_file():
        prepare = Preprocessor(spec)
        images = np.concatenate([prepare(image) for image in idx.read(samples, axes=3)[: max(BATCHES)]])
    else:
        shape = max(BATCHES), len(spec.mean), spec.height, spec.width
        images = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    output = family.member("device").run(images)
    assert output.features is not None
    return np.stack([codec.decode(codec.encode(item)) for item in output.features])


def _bare(family: Family, split: str, features: Features, batch: int) -> float:
    """Items per second of the member alone."""
    member = family.member("cloud", source=split)
    inputs = np.ascontiguousarray(features[:batch])
    member.run(inputs)
    items, start = 0, time.perf_counter()
    while time.perf_counter() - start < BARE_S:
        member.run(inputs)
        items += batch
    return items / (time.perf_counter() - start)


class _Load:
    """Keeps IN_FLIGHT requests under way.

    It shares the cores with the server, so it is as light as a client can be: the connection's thread sends the next
    request when it has read a reply, and there are no futures and no timers.
    """

    def __init__(self, family: Family, split: str, features: Features, broker: str) -> None:
        codec = family.codec(split)
        self._payloads = [codec.encode(item) for item in features]
        self._family = family
        self._split = split
        self._codec = codec.name
        self._client = f"bench-{os.getpid()}"
        self._topic = topics.request("cloud", family.id, split, self._client)
        self._connection = Connection(
            BrokerAddress.parse(broker),
            self._client,
            on_message=self._received,
            subscriptions=[topics.reply(self._client)],
        )
        self._asked: set[bytes] = set()
        self._until_s = 0.0
        self._over = threading.Event()
        self.answered = 0
        self.refused = 0

    def __enter__(self) -> _Load:
        self._connection.start()
        if not self._connection.wait_connected(10.0):
            raise LinkError(f"no connection to {self._connection.address}")
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def run(self, seconds: float) -> float:
        """Answered requests per second."""
        self.answered = 0
        self._over.clear()
        self._until_s = time.perf_counter() + seconds
        for _ in range(IN_FLIGHT):
            self._ask()
        if not self._over.wait(seconds + PATIENCE_S):
            raise LinkError(f"{len(self._asked)} requests were never answered")
        return self.answered / seconds

    def _ask(self) -> None:
        request = Request(
            id=os.urandom(16),
            client=self._client,
            family=self._family.id,
            version=self._family.version,
            split=self._split,
            codec=self._codec,
            deadline_ms=5000.0,
        )
        self._asked.add(request.id)
        payload = self._payloads[request.id[0] % len(self._payloads)]
        self._connection.publish(self._topic, *frame.parts(request, payload))

    def _received(self, _: str, data: frame.Buffer) -> None:
        message = frame.unpack(data).message
        if not isinstance(message, Reply | Busy | Failure) or message.id not in self._asked:
            return
        self._asked.remove(message.id)
        over = time.perf_counter() >= self._until_s
        if not isinstance(message, Reply):
            self.refused += 1
        elif not over:
            self.answered += 1
        if not over:
            self._ask()
        elif not self._asked:
            self._over.set()
