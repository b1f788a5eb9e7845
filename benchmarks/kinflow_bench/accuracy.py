"""`bench accuracy`: every member on the test images, fed with the device's own coded features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kinflow.family import Family, Member
from kinflow.manifest import BackendName
from kinflow.preprocess import Preprocessor

BATCH = 100
Array = npt.NDArray[np.float32]


def run(
    bundle: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], backend: BackendName
) -> dict[str, Any]:
    """Top-1 in percent. `images` uint8 [n, height, width] or [n, height, width, 3]."""
    family = Family.load(bundle)
    prepare = Preprocessor(family.preprocess)
    device = family.member("device", backend=backend)
    tails: dict[str, Member] = {}
    right: dict[str, int] = {}
    sent: dict[str, list[int]] = {}
    for start in range(0, len(images), BATCH):
        batch = np.concatenate([prepare(image) for image in images[start : start + BATCH]])
        truth = labels[start : start + BATCH]
        output = device.run(batch)
        _count(right, "device", output.logits, truth)
        split, coded, full = output.split, output.features, output.features
        for name in ("edge", "cloud"):
            if split is None or coded is None or full is None:
                break
            coded = _through_codec(family, split, coded, sent)
            if name not in tails:
                tails[name] = family.member(name, source=split)
            member = tails[name]
            coded_output, full_output = member.run(coded), member.run(full)
            _count(right, name, coded_output.logits, truth)
            _count(right, f"{name}_full_precision", full_output.logits, truth)
            split, coded, full = coded_output.split, coded_output.features, full_output.features
    return {
        **{name: 100.0 * count / len(images) for name, count in right.items()},
        "images": len(images),
        "feature_bytes": {split: float(np.mean(sizes)) for split, sizes in sent.items()},
        "backend": backend,
    }


def _count(right: dict[str, int], name: str, logits: Array, truth: npt.NDArray[np.uint8]) -> None:
    right[name] = right.get(name, 0) + int((logits.argmax(axis=1) == truth).sum())


def _through_codec(family: Family, split: str, features: Array, sent: dict[str, list[int]]) -> Array:
    """What the server gets after coding, the bytes noted in `sent`."""
    codec = family.codec(split)
    coded = [codec.encode(item) for item in features]
    sent.setdefault(split, []).extend(len(data) for data in coded)
    return np.stack([codec.decode(data) for data in coded])
