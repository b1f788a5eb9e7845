"""Devices under chaos, a few in one process: each asks one image after the other and writes down each answer.

Started by chaos.py as `python -m kinflow_bench.chaos_devices '<job as JSON>'`; a JSON array a line on standard
output, until standard input is closed.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path

import msgspec

from kinflow import idx
from kinflow.device import Device
from kinflow.settings import DeviceSettings


class Job(msgspec.Struct, frozen=True):
    bundle: str
    images: str
    image_count: int
    broker: str
    cloud: str
    deadline_s: float
    devices: int
    first: int
    """The number of the first of these devices."""
    interval_s: float
    """Between two inferences of one device, on average."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One answer."""

    device: int
    image: int
    at_s: float
    """time.monotonic() when it was there: one clock for all processes of a machine."""
    total_ms: float
    tier: str
    label: int
    confidence: float
    codec: str
    degraded: bool
    reason: str
    node: str
    """The server that was asked first and answered; empty for the device's own."""


def main(job: Job) -> None:
    images = idx.read(Path(job.images), axes=3)[: job.image_count]
    stop = threading.Event()
    lock = threading.Lock()
    started = [0]

    def work(number: int) -> None:
        choose = random.Random(number)
        settings = DeviceSettings(broker=job.broker, cloud=job.cloud, deadline_s=job.deadline_s)
        with Device.open(job.bundle, settings) as device:
            device.wait_for_server(10)
            while not stop.wait(job.interval_s * choose.uniform(0.5, 1.5)):
                image = choose.randrange(len(images))
                with lock:
                    started[0] += 1
                answer = device.infer(images[image])
                node = answer.timings.hops[0].node if answer.timings.hops else ""
                row = Row(
                    number,
                    image,
                    time.monotonic(),
                    answer.total_ms,
                    answer.tier,
                    answer.index,
                    answer.confidence,
                    answer.codec,
                    answer.degraded,
                    answer.reason,
                    node,
                )
                with lock:
                    say(row)

    threads = [threading.Thread(target=work, args=(job.first + offset,)) for offset in range(job.devices)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps({"started": started[0]}) + "\n")


def say(row: Row) -> None:
    sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1].encode(), type=Job))
