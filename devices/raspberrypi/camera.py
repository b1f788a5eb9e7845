"""A camera app for the Raspberry Pi, and an example of embedding the SDK: acts only on answers that are sure.

python camera.py ~/.local/share/kinflow/families/fashion picamera2:0
python camera.py BUNDLE folder:photos        # without a camera
"""

from __future__ import annotations

import sys

import kinflow
from kinflow.board import BoardWatch
from kinflow.runtime import sources
from kinflow.runtime.sampler import Sampler

SURE = 0.8
FRAMES_PER_SECOND = 2.0


def act(answer: kinflow.Answer) -> None:
    """Your part: open a door, count a parcel, switch a lamp."""
    print(f"{answer.label:<16} {answer.confidence:.2f}  by the {answer.tier}  {answer.total_ms:.0f} ms", flush=True)


def main(bundle: str, source: str) -> None:
    family = kinflow.Family.load(bundle)
    settings = kinflow.DeviceSettings(backend="tflite", deadline_s=0.5)
    with (
        BoardWatch() as board,  # a hot Pi keeps fewer answers to itself
        kinflow.Device(family, settings, strain=board) as device,
        Sampler(sources.parse(source, family.preprocess), FRAMES_PER_SECOND) as frames,
    ):
        while not frames.ended:
            frame = frames.take(timeout_s=1.0)
            if frame is None:
                continue
            answer = device.infer(frame.image)  # the device's own answer, or a server's if that one was unsure
            if answer.confidence >= SURE and not answer.degraded:
                act(answer)
            else:
                print(f"unsure: {answer.label} {answer.confidence:.2f} ({answer.reason})", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2])
    except kinflow.KinflowError as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
