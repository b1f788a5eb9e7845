"""A camera app for the Jetson, and an example of embedding the SDK: counts what passes by, many frames at a time.

python camera.py ~/.local/share/kinflow/families/fashion jetson:0
python camera.py BUNDLE folder:photos        # without a camera
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import Future

import kinflow
from kinflow.runtime import sources
from kinflow.runtime.sampler import Sampler

AT_A_TIME = 4


def main(bundle: str, source: str) -> None:
    family = kinflow.Family.load(bundle)
    # TensorRT, else CUDA, else the CPU; an engine is built once, which takes minutes, and kept.
    settings = kinflow.DeviceSettings(accelerator="auto", engine_cache="engines", workers=AT_A_TIME, deadline_s=0.5)
    seen: Counter[str] = Counter()
    waiting: list[Future[kinflow.Answer]] = []
    with (
        kinflow.Device(family, settings) as device,
        Sampler(sources.parse(source, family.preprocess), rate_hz=0) as frames,
    ):
        while not frames.ended or waiting:
            # While offloaded frames are on their way, the next ones are computed.
            if not frames.ended and len(waiting) < AT_A_TIME and (frame := frames.take(timeout_s=1.0)) is not None:
                waiting.append(device.submit(frame.image))
                continue
            if waiting:
                answer = waiting.pop(0).result()
                seen[answer.label] += 1
                print(f"{answer.label:<16} {answer.tier:<7} {answer.total_ms:.0f} ms   {dict(seen)}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2])
    except kinflow.KinflowError as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
