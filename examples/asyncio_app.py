"""Many images at the same time from asyncio: `python examples/asyncio_app.py BUNDLE IMAGES.idx [BROKER]`."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import kinflow
from kinflow import idx


async def classify(device: kinflow.Device, images: list[object]) -> list[kinflow.Answer]:
    """All answers; the event loop stays free meanwhile."""
    return await asyncio.gather(*(asyncio.wrap_future(device.submit(image)) for image in images))


def main(bundle: str, images: str, broker: str = "") -> None:
    settings = kinflow.DeviceSettings(broker=broker, workers=16)
    with kinflow.Device.open(bundle, settings) as device:
        device.wait_for_server(2.0)
        answers = asyncio.run(classify(device, list(idx.read(images, axes=3)[:64])))
    for tier, count in Counter(answer.tier for answer in answers).most_common():
        print(f"{tier}\t{count}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
