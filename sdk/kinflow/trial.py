"""`python -m kinflow.trial BUNDLE MEMBER BACKEND`: one answer to a grey image, or one token. For pull.py."""

from __future__ import annotations

import sys
from typing import cast

import numpy as np

from kinflow.bundle import task_of
from kinflow.device import Device
from kinflow.manifest import BackendName
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from kinflow.text.manifest import TASK


def main(bundle: str, member: str, backend: str) -> None:
    settings = DeviceSettings(member=member, backend=cast(BackendName, backend), offload=False)
    if task_of(bundle) == TASK:
        with TextDevice.open(bundle, settings) as text:
            print([token.text for token in text.generate("Hello.", max_tokens=1)])
        return
    with Device.open(bundle, settings) as device:
        size = device.family.preprocess
        shape = (size.height, size.width) if size.mode == "L" else (size.height, size.width, 3)
        print(device.infer(np.full(shape, 128, np.uint8)).label)


if __name__ == "__main__":
    main(*sys.argv[1:])
