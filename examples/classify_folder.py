"""Classify the pictures of a folder: `python examples/classify_folder.py BUNDLE FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import kinflow


def main(bundle: str, folder: str) -> None:
    with kinflow.Device.open(bundle) as device:
        device.wait_for_server(2.0)  # without it the first answers would stay on the device
        for path in sorted(Path(folder).iterdir()):
            try:
                image = kinflow.read_image(path, device.family.preprocess)
            except kinflow.InputError as exc:
                print(f"skipped: {exc}", file=sys.stderr)
                continue
            answer = device.infer(image)
            print(f"{path.name}\t{answer.label}\t{answer.confidence:.2f}\t{answer.tier}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
