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

from kinflow import idx, topics
from kinflow.codec import Features
from kinflow.errors import LinkError
from kinflow.family import Family
from kinflow.fleet import Fleet
from kinflow.link import Link
from kinflow.messages import Request
from kinflow.mqtt import BrokerAddress
from kinflow.preprocess import Preprocessor
from kinflow_bench.timing import spread

BATCHES = (1, 2, 4, 8, 16, 32)
BARE_S = 0.4
LOAD_S = 2.0
IN_FLIGHT = 64
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
        with Link(BrokerAddress.parse(server.broker), f"bench-{os.getpid()}") as link:
            if not link.wait_connected(10.0):
                raise LinkError(f"no connection to {server.broker}")
            load = _Load(family, split, features, link)
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
    """Keeps IN_FLIGHT requests under way."""

    def __init__(self, family: Family, split: str, features: Features, link: Link) -> None:
        codec = family.codec(split)
        self._payloads = [codec.encode(item) for item in features]
        self._family = family
        self._split = split
        self._codec = codec.name
        self._topic = topics.request("cloud", family.id, split, link.client)
        self._link = link
        self.refused = 0

    def run(self, seconds: float) -> float:
        """Answered requests per second.

        Each reply's thread sends the next request: the generator shares the cores with the server, so it does
        not hand replies from thread to thread.
        """
        answered = 0
        left = IN_FLIGHT
        over = threading.Event()
        until = time.perf_counter() + seconds

        def ask_next() -> None:
            request = Request(
                id=os.urandom(16),
                client=self._link.client,
                family=self._family.id,
                version=self._family.version,
                split=self._split,
                codec=self._codec,
                deadline_ms=5000.0,
            )
            payload = self._payloads[request.id[0] % len(self._payloads)]
            self._link.request(self._topic, request, payload).add_done_callback(finished)

        def finished(future: Any) -> None:
            nonlocal answered, left
            if time.perf_counter() >= until:
                left -= 1
                if left == 0:
                    over.set()
                return
            if future.exception() is None:
                answered += 1
            else:
                self.refused += 1
            ask_next()

        for _ in range(IN_FLIGHT):
            ask_next()
        over.wait()
        return answered / seconds
