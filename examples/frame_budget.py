"""A loop that may not fall behind: each frame gets what is left of its slot, answered or degraded.

`python examples/frame_budget.py BUNDLE IMAGES.idx [FRAMES_PER_SECOND]`; the images stand for a camera's frames.
"""

from __future__ import annotations

import sys
import time

import kinflow
from kinflow import idx

FRAMES = 60


def main(bundle: str, images: str, frames_per_s: str = "30") -> None:
    slot_s = 1 / float(frames_per_s)
    degraded = late = 0
    with kinflow.Device.open(bundle) as device:
        start_s = time.monotonic()
        for number, frame in enumerate(idx.read(images, axes=3)[:FRAMES]):
            due_s = start_s + (number + 1) * slot_s
            left_s = due_s - time.monotonic()
            if left_s <= 0:
                late += 1  # this slot has passed: the next frame is more use than this one
                continue
            answer = device.infer(frame, deadline_s=left_s)
            degraded += answer.degraded
            time.sleep(max(0.0, due_s - time.monotonic()))
    print(f"{FRAMES} frames, {degraded} degraded, {late} skipped")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
