"""Devices under chaos, a few in one process: each asks one image after the other and writes down each answer.

Started by chaos.py as `python -m kinflow_bench.chaos_devices '<job as JSON>'`; a JSON array a line on standard
output, until standard input is closed. Every so often one hands an image in for an answer some day
(`when="eventually"`) and goes on.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

import msgspec

from kinflow import idx
from kinflow.answer import Answer
from kinflow.device import Device
from kinflow.outbox import Outbox
from kinflow.ready import ready
from kinflow.settings import DeviceSettings, TlsSettings

# What still waits for a server then has had time enough: all of them are back.
LAST_ANSWERS_S = 30.0


@ready
class Job(msgspec.Struct, frozen=True):
    images: str
    image_count: int
    deadline_s: float
    devices: int
    interval_s: float
    """Between two inferences of one device, on average."""
    eventually: float
    """Share of the images that are handed in instead."""
    first: int = 0
    """The number of the first of these devices."""
    bundle: str = ""
    broker: str = ""
    cloud: str = ""
    outboxes: str = ""
    """Folder for them."""
    insecure_lan: bool = False


@ready
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
    wall_s: float
    """time.time() then."""
    eventually: bool
    """It was handed in; `total_ms` says nothing then."""


@ready
class Ended(msgspec.Struct, frozen=True):
    """The last line of a process."""

    started: int
    """Inferences that were begun."""
    handed_in: int
    left: int
    """Entries of outboxes that nobody waited for any more: what is answered twice, or never, stays there."""


def main(job: Job) -> None:
    images = idx.read(Path(job.images), axes=3)[: job.image_count]
    stop = threading.Event()
    ends: list[Ended] = []

    def work(number: int) -> None:
        choose = random.Random(number)
        outbox = Path(job.outboxes) / f"outbox-{number}"
        settings = DeviceSettings(
            broker=job.broker,
            cloud=job.cloud,
            deadline_s=job.deadline_s,
            outbox=str(outbox),
            tls=TlsSettings(insecure_lan=job.insecure_lan),
        )
        started = 0
        handed_in: list[Future[Answer]] = []
        with Device.open(job.bundle, settings) as device:
            device.wait_for_server(10)
            while not stop.wait(job.interval_s * choose.uniform(0.5, 1.5)):
                image = choose.randrange(len(images))
                if choose.random() < job.eventually:
                    future = device.submit(images[image], when="eventually")
                    future.add_done_callback(partial(say_later, number, image))
                    handed_in.append(future)
                else:
                    started += 1
                    say(number, image, device.infer(images[image]), eventually=False)
            wait(handed_in, LAST_ANSWERS_S)
            left = sum(1 for _ in device.collect())
        waiting = Outbox(outbox, capacity=1)
        ends.append(Ended(started, len(handed_in), left + len(waiting)))
        waiting.close()

    threads = [threading.Thread(target=work, args=(job.first + offset,)) for offset in range(job.devices)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    total = Ended(sum(e.started for e in ends), sum(e.handed_in for e in ends), sum(e.left for e in ends))
    os.write(sys.stdout.fileno(), msgspec.json.encode(total) + b"\n")


def say_later(device: int, image: int, done: Future[Answer]) -> None:
    if not done.cancelled():
        say(device, image, done.result(), eventually=True)


def say(device: int, image: int, answer: Answer, *, eventually: bool) -> None:
    node = answer.timings.hops[0].node if answer.timings.hops else ""
    row = Row(
        device,
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
        time.time(),
        eventually,
    )
    # In one write, which a pipe keeps together: several threads speak.
    os.write(sys.stdout.fileno(), msgspec.json.encode(row) + b"\n")


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1].encode(), type=Job))
